// Calls of the CPU's ops through their borders on numbers that are the same everywhere, in float and in double.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cpu/border.h"
#include "cpu/library.h"

namespace crossan_fast::arm {

using at::Tensor;

// Numbers that repeat bit for bit on every machine: every step is exact or rounded once. SplitMix64 (Steele, Lea and
// Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
class Draw {
 public:
  explicit Draw(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t bound) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(bound)); }
  double uniform() { return static_cast<double>(bits() >> 40) * 0x1p-24; }
  double normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0) * 1.7320508075688772; }

  // Normal numbers that float holds, in `type`.
  Tensor normals(at::IntArrayRef shape, at::ScalarType type, double scale = 1);
  Tensor ids(at::IntArrayRef shape, int64_t low, int64_t high);
  Tensor flags(at::IntArrayRef shape, double probability);

 private:
  uint64_t state_;
};

// The type that weights and sums have where results have `type`.
inline at::ScalarType wide(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

struct Output {
  std::string name;
  Tensor value;
  int like = -1;  // the output that shows how large the terms are of a sum that cancels; −1: this one
};
using Outputs = std::vector<Output>;

// `compute` makes the same call in the type that it is given: `type`, and double, which is the truth about it. `depth`:
// the length of the sums that a number may go through, 0 where both must be equal.
void judge(const std::string& name, int64_t depth, const std::function<Outputs(at::ScalarType)>& compute,
           at::ScalarType type = at::kFloat);

void judge_conversions();
void judge_functions();
void judge_side_networks();
void judge_fusion();
void judge_sequence_encoder();
void judge_losses();
void judge_ranking();
void judge_deduplicate();

}  // namespace crossan_fast::arm
