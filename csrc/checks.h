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
                    ": expected a dense tensor on ", c10::DeviceTypeName(device, true), ", got ", described(tensor));
}

inline void check_type(const std::string& name, const at::Tensor& tensor, std::initializer_list<at::ScalarType> types) {
  for (const auto type : types)
    if (tensor.scalar_type() == type) return;
  TORCH_CHECK_TYPE(false, name, ": expected dtype ", at::ArrayRef<at::ScalarType>(types), ", got ", described(tensor));
}

// Every floating type that the kernels store rows in.
inline void check_floating(const std::string& name, const at::Tensor& tensor) {
  check_type(name, tensor, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
}

inline std::string item(const char* name, size_t index) { return c10::str(name, "[", index, "]"); }

}  // namespace crossan_fast
