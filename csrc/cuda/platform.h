// The one place that knows whether nvcc compiles these sources for a GPU, or a host compiler runs them on
// the emulator in host_shim.h (which is how their logic is tested on machines without a GPU).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <cstdio>

namespace crossan_fast {

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

__device__ __forceinline__ unsigned char* shared_memory() { return dynamic_shared_memory; }

// A wrong id found on the device: the launch fails, and nothing out of bounds is read.
__device__ __noinline__ inline void device_fail(const char* message, long long value) {
  printf("crossan_fast: %s (got %lld)\n", message, value);
  __trap();
}

// Starts `kernel` and returns cudaSuccess or the error; `cluster` blocks in a row form a cluster.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared, void* stream,
           unsigned cluster, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (shared > 48 * 1024) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

struct DeviceLimits {
  int architecture;  // 10 · major + minor
  int multiprocessors;
  int shared_per_block;
};

inline DeviceLimits device_limits() {
  int device = 0, major = 0, minor = 0;
  DeviceLimits limits = {};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.architecture = 10 * major + minor;
  return limits;
}

inline const char* launch_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace crossan_fast

#else
#include "cuda/emulation/host_shim.h"
#endif
