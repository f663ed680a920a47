// Checks of arguments at the border to C++: a message names the argument, what came, and what was expected.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>

namespace crossan_fast {

inline std::string described(const at::Tensor& tensor) {
  if (!tensor.defined()) return "an undefined tensor";
  return c10::str(tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
}

inline void check_shape(const std::string& name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.defined() && tensor.sizes() == shape, name, ": expected shape ", shape, ", got ",
                    described(tensor));
}

inline void check_device(const std::string& name, const at::Tensor& tensor, at::DeviceType device) {
  TORCH_CHECK_VALUE(tensor.defined() && tensor.device().type() == device && tensor.layout() == at::kStrided, name,
                    ": expected a dense tensor on ", c10::DeviceTypeName(device, true), ", got ",
                    described(tensor));
}

inline void check_type(const std::string& name, const at::Tensor& tensor, std::initializer_list<at::ScalarType> types) {
  for (const auto type : types)
    if (tensor.scalar_type() == type) return;
  TORCH_CHECK_TYPE(false, name, ": expected dtype ", at::ArrayRef<at::ScalarType>(types), ", got ",
                   described(tensor));
}

// Every floating type that the kernels store rows in.
inline void check_floating(const std::string& name, const at::Tensor& tensor) {
  check_type(name, tensor, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
}

inline std::string item(const char* name, size_t index) { return c10::str(name, "[", index, "]"); }

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
