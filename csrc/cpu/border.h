// From tensors to the plain pointers that the kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "checks.h"
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

template <class T>
std::vector<at::Tensor> all_in_type(at::TensorList tensors) {
  std::vector<at::Tensor> converted;
  for (const at::Tensor& tensor : tensors) converted.push_back(in_type<T>(tensor));
  return converted;
}

// int64 ids, contiguous, each checked to lie in [low, high): nothing may read by an id that was not.
inline at::Tensor checked_ids(const std::string& name, const at::Tensor& ids, int64_t low, int64_t high) {
  check_type(name, ids, {at::kLong, at::kInt});
  const at::Tensor plain = ids.to(at::kLong).contiguous();
  const int64_t* data = plain.const_data_ptr<int64_t>();
  for (int64_t i = 0, n = plain.numel(); i < n; ++i)
    TORCH_CHECK_INDEX(data[i] >= low && data[i] < high, name, ": expected ids in [", low, ", ", high, "), got ",
                      data[i], " at place ", i);
  return plain;
}

}  // namespace crossan_fast
