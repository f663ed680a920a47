// Runs every call and writes a line for each of its results:
//   call | result | numbers | sum of the doubles | scale | largest error of the floats | bound | bound of doubles
// the last three by the scale, the largest of the doubles. Descriptor 3 takes the numbers themselves, doubles before
// floats.
#include "driver.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>

namespace crossan_fast::arm {
namespace {

int failures = 0;

std::vector<double> numbers(const Tensor& tensor) {
  std::vector<double> out(static_cast<size_t>(tensor.numel()));
  if (tensor.scalar_type() == at::kLong)
    std::copy_n(tensor.const_data_ptr<int64_t>(), out.size(), out.begin());
  else
    convert_from<double>(stored_type(tensor.scalar_type()), tensor.const_data_ptr(), out.data(), tensor.numel(), 1);
  return out;
}

// By how much a number of the type may be off that was rounded to it once, relative.
double unit(at::ScalarType type) {
  return type == at::kBFloat16 ? 0x1p-8 : type == at::kHalf ? 0x1p-11 : type == at::kFloat ? 0x1p-24 : 0x1p-53;
}

void write_all(const std::vector<double>& values) {
  const char* from = reinterpret_cast<const char*>(values.data());
  for (size_t left = values.size() * sizeof(double); left > 0;) {
    const ssize_t done = write(3, from, left);
    if (done <= 0) return;
    from += done;
    left -= static_cast<size_t>(done);
  }
}

double largest(const std::vector<double>& values) {
  double most = 0;
  for (const double value : values)
    if (std::isfinite(value)) most = std::max(most, std::fabs(value));
  return most;
}

double difference(const std::vector<double>& got, const std::vector<double>& expected) {
  if (got.size() != expected.size()) return INFINITY;
  double most = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double x = got[i], y = expected[i];
    if (x == y || (std::isnan(x) && std::isnan(y))) continue;
    most = std::isfinite(x) && std::isfinite(y) ? std::max(most, std::fabs(x - y)) : INFINITY;
  }
  return most;
}

// The error of a sum of n numbers grows as √n where roundings know nothing of each other; 8: several such sums follow
// on each other, and the largest of thousands of errors is looked at.
double allowed(int64_t depth, double rounded) { return 8 * std::sqrt(static_cast<double>(depth)) * rounded; }

}  // namespace

Tensor Draw::normals(at::IntArrayRef shape, at::ScalarType type, double scale) {
  Tensor tensor(shape, at::kFloat);
  for (int64_t i = 0; i < tensor.numel(); ++i)
    tensor.mutable_data_ptr<float>()[i] = static_cast<float>(normal() * scale);
  return tensor.to(type);
}

Tensor Draw::ids(at::IntArrayRef shape, int64_t low, int64_t high) {
  Tensor tensor(shape, at::kLong);
  for (int64_t i = 0; i < tensor.numel(); ++i) tensor.mutable_data_ptr<int64_t>()[i] = low + below(high - low);
  return tensor;
}

Tensor Draw::flags(at::IntArrayRef shape, double probability) {
  Tensor tensor(shape, at::kBool);
  for (int64_t i = 0; i < tensor.numel(); ++i) tensor.mutable_data_ptr<bool>()[i] = uniform() < probability;
  return tensor;
}

void judge(const std::string& name, int64_t depth, const std::function<Outputs(at::ScalarType)>& compute,
           at::ScalarType type) {
  const Outputs got = compute(type), expected = compute(at::kDouble);
  for (size_t i = 0; i < got.size(); ++i) {
    const std::vector<double> x = numbers(got[i].value), truth = numbers(expected[i].value);
    double sum = 0, most = largest(truth);
    if (expected[i].like >= 0) most = largest(numbers(expected[static_cast<size_t>(expected[i].like)].value));
    for (size_t n = 0; n < truth.size(); ++n) sum += std::isfinite(truth[n]) ? truth[n] : 0;
    double off = difference(x, truth), may = 0, may_double = 0;
    if (most > 0) off /= most;
    if (depth > 0 && got[i].value.scalar_type() != at::kLong) {
      may = allowed(depth, 0x1p-24);
      may_double = allowed(depth, 0x1p-53);
      for (const Tensor& tensor : {got[i].value, expected[i].value})
        if (unit(tensor.scalar_type()) > 0x1p-24) may += unit(tensor.scalar_type());
    }
    if (!(off <= may)) ++failures;
    std::printf("%s|%s|%zu|%a|%a|%.3g|%.3g|%.3g\n", name.c_str(), got[i].name.c_str(), x.size(), sum, most, off, may,
                may_double);
    write_all(truth);
    write_all(x);
  }
}

}  // namespace crossan_fast::arm

int main() {
  using namespace crossan_fast::arm;
  for (const auto part : {judge_conversions, judge_functions, judge_side_networks, judge_fusion, judge_sequence_encoder,
                          judge_losses, judge_ranking, judge_deduplicate}) {
    part();
    std::fflush(stdout);
  }
  return failures == 0 ? 0 : 1;
}
