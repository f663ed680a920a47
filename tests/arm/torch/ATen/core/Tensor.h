// As much of torch's Tensor as the borders of csrc/cpu use: dense ones on the CPU, contiguous. Torch itself is not
// there for the machines that these tests run on; the borders then compile as they stand, and check what they are
// given.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <ostream>
#include <vector>

namespace c10 {

template <class T>
class ArrayRef {
 public:
  ArrayRef() = default;
  ArrayRef(const T* data, size_t size) : data_(data), size_(size) {}
  ArrayRef(std::initializer_list<T> list) : ArrayRef(list.begin(), list.size()) {}
  ArrayRef(const std::vector<T>& list) : ArrayRef(list.data(), list.size()) {}

  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  const T& operator[](size_t i) const { return data_[i]; }
  ArrayRef slice(size_t first, size_t count) const { return {data_ + first, count}; }
  std::vector<T> vec() const { return {begin(), end()}; }
  bool operator==(ArrayRef other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

 private:
  const T* data_ = nullptr;
  size_t size_ = 0;
};
using IntArrayRef = ArrayRef<int64_t>;

enum class ScalarType { Char, Int, Long, Half, Float, Double, Bool, BFloat16, Float8_e4m3fn };
enum class DeviceType { CPU };
enum class Layout { Strided };

inline std::ostream& operator<<(std::ostream& out, ScalarType type) {
  constexpr const char* names[] = {"Char", "Int", "Long", "Half", "Float", "Double", "Bool", "BFloat16", "Float8"};
  return out << names[static_cast<int>(type)];
}
template <class T>
std::ostream& operator<<(std::ostream& out, ArrayRef<T> list) {
  const char* before = "[";
  for (const T& entry : list) out << std::exchange(before, ", ") << entry;
  return out << (list.empty() ? "[]" : "]");
}
inline const char* DeviceTypeName(DeviceType, bool) { return "cpu"; }

}  // namespace c10

namespace at {

using c10::ArrayRef;
using c10::DeviceType;
using c10::IntArrayRef;
using c10::ScalarType;

inline constexpr auto kChar = ScalarType::Char, kInt = ScalarType::Int, kLong = ScalarType::Long,
                      kHalf = ScalarType::Half, kFloat = ScalarType::Float, kDouble = ScalarType::Double,
                      kBool = ScalarType::Bool, kBFloat16 = ScalarType::BFloat16,
                      kFloat8_e4m3fn = ScalarType::Float8_e4m3fn;
inline constexpr auto kCPU = DeviceType::CPU;
inline constexpr auto kStrided = c10::Layout::Strided;

struct Device {
  DeviceType type() const { return kCPU; }
};
inline std::ostream& operator<<(std::ostream& out, Device) { return out << "cpu"; }

class Tensor {
 public:
  Tensor() = default;
  // Bits of ones: a NaN where a kernel forgets to write.
  Tensor(IntArrayRef sizes, ScalarType type) : sizes_(sizes.vec()), type_(type) {
    const size_t bytes = (static_cast<size_t>(numel()) * bytes_each() + 64) / 64 * 64;
    memory_ = {static_cast<char*>(std::aligned_alloc(64, bytes)), std::free};
    std::memset(memory_.get(), 0xff, bytes);
  }

  bool defined() const { return memory_ != nullptr; }
  IntArrayRef sizes() const { return sizes_; }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_[static_cast<size_t>(i < 0 ? i + dim() : i)]; }
  int64_t stride(int64_t i) const {
    int64_t stride = 1;
    for (int64_t after = (i < 0 ? i + dim() : i) + 1; after < dim(); ++after) stride *= size(after);
    return stride;
  }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }
  ScalarType scalar_type() const { return type_; }
  Device device() const { return {}; }
  c10::Layout layout() const { return kStrided; }

  const Tensor& contiguous() const { return *this; }
  Tensor to(ScalarType type) const;  // between floating types, see torch.cpp
  void zero_() const { std::memset(memory_.get(), 0, static_cast<size_t>(numel()) * bytes_each()); }

  template <class T = void>
  const T* const_data_ptr() const {
    return reinterpret_cast<const T*>(memory_.get());
  }
  template <class T = void>
  T* mutable_data_ptr() const {
    return reinterpret_cast<T*>(memory_.get());
  }
  void* data_ptr() const { return memory_.get(); }

 private:
  size_t bytes_each() const {
    constexpr size_t bytes[] = {1, 4, 8, 2, 4, 8, 1, 2, 1};
    return bytes[static_cast<int>(type_)];
  }

  std::vector<int64_t> sizes_;
  ScalarType type_ = kFloat;
  std::shared_ptr<char> memory_;
};
using TensorList = ArrayRef<Tensor>;

}  // namespace at
