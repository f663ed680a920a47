// From tensors to the plain pointers that the kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include "../checks.h"
#include "simd.h"

namespace crossan_fast {

inline Stored stored_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return Stored::f64;
    case at::kFloat: return Stored::f32;
    case at::kBFloat16: return Stored::bf16;
    case at::kHalf: return Stored::f16;
    case at::kFloat8_e4m3fn: return Stored::f8e4m3;
    case at::kChar: return Stored::i8;
    default: TORCH_CHECK_TYPE(false, "dtype: no kernel stores ", type);
  }
}

// The kernels compute in double for float64 and in float for everything else.
template <class F>
auto in_compute_type(at::ScalarType dtype, F&& run) {
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "dtype: expected float32, float64, bfloat16 or float16, got ", dtype);
  return dtype == at::kDouble ? run(double{}) : run(float{});
}

template <class T>
inline constexpr at::ScalarType kScalarType = sizeof(T) == 8 ? at::kDouble : at::kFloat;

// A tensor whose last dimension is contiguous; the others keep their strides.
inline at::Tensor rows_in_place(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

template <class T>
at::Tensor in_type(const at::Tensor& tensor) {
  return tensor.to(kScalarType<T>).contiguous();
}

}  // namespace crossan_fast
