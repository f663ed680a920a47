// As much of torch's checks as the borders use.
#pragma once

#include <exception>
#include <sstream>
#include <string>
#include <utility>

namespace c10 {

template <class... Parts>
std::string str(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

class Error : public std::exception {
 public:
  explicit Error(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }
  const char* what_without_backtrace() const noexcept { return what(); }

 private:
  std::string message_;
};

}  // namespace c10

#define TORCH_CHECK(condition, ...) \
  if (!(condition)) throw c10::Error(c10::str(__VA_ARGS__))
#define TORCH_CHECK_VALUE TORCH_CHECK
#define TORCH_CHECK_TYPE TORCH_CHECK
#define TORCH_CHECK_INDEX TORCH_CHECK
