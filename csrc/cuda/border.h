// What the borders share: the wall of checks in front of the C interface, and the stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#if defined(CROSSAN_EMULATE_CUDA)
#include <c10/core/DeviceGuard.h>
#else
#include <ATen/core/CachingHostAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "interface.h"

namespace crossan_fast::border {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The kernels move 16 bytes at a time; a view may begin anywhere.
inline Tensor dense_and_aligned(const Tensor& tensor) {
  Tensor dense = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

// The emulator serves CPU tensors, so that tests go through the same checks and launches as a GPU.
#if defined(CROSSAN_EMULATE_CUDA)
#define CROSSAN_DISPATCH_KEY CPU
#define CROSSAN_NAMESPACE crossan_fast_cuda_emulated
constexpr auto kDeviceType = at::kCPU;
using DeviceGuard = c10::DeviceGuard;
inline void* current_stream(const Tensor&) { return nullptr; }
inline void keep_until_read(const Tensor&, const Tensor&) {}
#else
#define CROSSAN_DISPATCH_KEY CUDA
#define CROSSAN_NAMESPACE crossan_fast_cuda
constexpr auto kDeviceType = at::kCUDA;
using DeviceGuard = c10::cuda::CUDAGuard;
inline void* current_stream(const Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream();
}
// Page-locked host memory that a kernel reads on the stream of `output`: were `host` freed while the kernel runs, torch
// would give its block to the next who asks, as of torch's own copies it is told not to.
inline void keep_until_read(const Tensor& host, const Tensor& output) {
  if (!host.is_cpu()) return;
  at::getHostAllocator(at::kCUDA)->record_event(const_cast<void*>(host.const_data_ptr()),
                                                host.storage().data_ptr().get_context(),
                                                c10::cuda::getCurrentCUDAStream(output.get_device()).unwrap());
}
#endif

// torch's macros, with their names expanded first.
#define CROSSAN_LIBRARY_FRAGMENT(name, library) TORCH_LIBRARY_FRAGMENT(name, library)
#define CROSSAN_LIBRARY_IMPL(name, key, library) TORCH_LIBRARY_IMPL(name, key, library)

inline int kind_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return 0;
    case at::kHalf: return 1;
    case at::kBFloat16: return 2;
    case at::kFloat8_e4m3fn: return 3;
    case at::kChar: return 4;
    default: return -1;
  }
}

inline void check_code(int code, const char* op) { TORCH_CHECK(code == 0, op, ": ", crossan_error(code)); }

inline void check_device(const std::string& name, const Tensor& tensor, const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, ": expected device ", device, ", got ", tensor.device());
}

// −1 in `shape`: any size.
inline void check_tensor(const std::string& name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType type,
                         const at::Device& device) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || shape[i] == tensor.size(i);
  TORCH_CHECK_VALUE(fits, name, ": expected shape ", shape, " (-1: any), got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, ": expected ", type, ", got ", tensor.scalar_type());
  check_device(name, tensor, device);
}

inline void check_ids(const char* name, const Tensor& ids) {
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, name,
                   ": expected int64 or int32, got ", ids.scalar_type());
}

inline bool is_wide(const OptionalTensor& ids) { return ids && ids->scalar_type() == at::kLong; }

template <class T>
T* pointer(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

}  // namespace crossan_fast::border
