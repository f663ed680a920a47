// Activations and their slopes, in fp32.
#pragma once

#include "platform.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace crossan_fast {

enum Activation : int { kGelu = 0, kRelu = 1 };

__device__ __forceinline__ float gelu(float z) { return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f)); }

__device__ __forceinline__ float gelu_grad(float z) {
  return 0.5f * (1.0f + erff(z * 0.70710678118654752f)) + z * 0.39894228040143268f * expf(-0.5f * z * z);
}

__device__ __forceinline__ float activate(float z, int activation) {
  return activation == kRelu ? (z > 0 ? z : 0.0f) : gelu(z);
}

__device__ __forceinline__ float activate_grad(float z, int activation) {
  return activation == kRelu ? (z > 0 ? 1.0f : 0.0f) : gelu_grad(z);
}

}  // namespace crossan_fast
