// Products of one block of items in bf16, by torch's brgemm: AMX tiles where the CPU has them.
//
// Operands round to bf16, sums are fp32. Weights are packed once a call (`PairedWeights`), the other operands here.
// Without AMX the same products run through oneDNN's AVX-512 code, slower than `multiply` in fp32; tests ask for it.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "packing.h"
#include "parallel.h"
#include "rows.h"

namespace crossan_fast {

// Whether torch multiplies bf16 by brgemm on this CPU at all, with AMX or without.
bool has_brgemm();
// Whether bf16 products are to go through brgemm: CROSSAN_FAST_CPU_BF16 = auto (where AMX is), brgemm, fp32. A wish
// that cannot be served is an error.
bool use_brgemm();
std::string described_bf16();  // the way they go and why, or why they cannot

// C[M, N] += A[M, K] · B: A row-major with K even, B one panel of pairs.
void brgemm_panel(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, const uint16_t* pairs, float* c,
                  int64_t c_row);
void end_brgemm();  // gives the thread's tiles back

inline constexpr int64_t kPairPanel = 64;  // columns of B walked at a time

inline int64_t even(int64_t depth) { return (depth + 1) / 2 * 2; }
inline int64_t pair_row(int64_t columns) { return (columns + 15) / 16 * 16; }  // oneDNN takes no other distance
inline int64_t pairs_size(int64_t depth, int64_t columns) { return even(depth) * pair_row(columns); }

// Panels of B [K, N] given by two strides: pairs[panel][k / 2][column][k % 2], zeros beyond K and N.
inline void pack_pairs(const float* b, int64_t row, int64_t column, int64_t depth, int64_t columns, uint16_t* pairs) {
  for (int64_t first = 0; first < columns; first += kPairPanel) {
    const int64_t count = std::min(kPairPanel, columns - first);
    for (int64_t k = 0; k < depth; k += 2)
      for (int64_t j = 0; j < pair_row(count); ++j) {
        const float* from = b + k * row + (first + j) * column;
        *pairs++ = j < count ? to_bf16(from[0]) : uint16_t{0};
        *pairs++ = j < count && k + 1 < depth ? to_bf16(from[row]) : uint16_t{0};
      }
  }
}

// B of W [count][rows, columns] as pairs: W itself, or Wᵀ. There once `tasks` have run.
class PairedWeights {
 public:
  PairedWeights(Tasks& tasks, const float* weight, int64_t count, int64_t rows, int64_t columns, As as)
      : depth_(as == As::plain ? rows : columns) {
    const bool plain = as == As::plain;
    const int64_t width = plain ? columns : rows;
    each_ = pairs_size(depth_, width);
    memory_ = Buffer<uint16_t>(count * each_);
    for (int64_t i = 0; i < count; ++i)
      tasks.add([=, depth = depth_, from = weight + i * rows * columns, to = memory_.data() + i * each_] {
        pack_pairs(from, plain ? columns : 1, plain ? 1 : columns, depth, width, to);
      });
  }
  const uint16_t* operator[](int64_t which) const { return memory_.data() + which * each_; }
  int64_t depth() const { return even(depth_); }

 private:
  int64_t depth_, each_;
  Buffer<uint16_t> memory_;
};

// Where in the weights of a level a product begins: a row of its right side, and a column that is a multiple of
// kPairPanel.
struct From {
  int64_t level, row = 0, column = 0;
};

// A right side packed as pairs, from its row `row` on; `depth` is that of all its rows.
struct Pairs {
  const uint16_t* data;
  int64_t depth, row;
};

// A thread's operands on their way to bf16.
class PairedProducts {
 public:
  // C = (keep · C +) bias + A · B as `multiply`.
  void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_column, Pairs b,
                float* c, int64_t c_row, Into into, const float* bias = nullptr, float keep = 1.0f) {
    if (rows == 0) return;
    const int64_t deep = even(depth);
    left_.resize(static_cast<size_t>(rows * deep));
    for (int64_t i = 0; i < rows; ++i) {
      uint16_t* to = left_.data() + i * deep;
      for (int64_t k = 0; k < depth; ++k) to[k] = to_bf16(a[i * a_row + k * a_column]);
      if (deep > depth) to[depth] = 0;
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        float& value = c[i * c_row + j];
        value = (into == Into::add ? keep * value : 0.0f) + (bias ? bias[j] : 0.0f);
      }
    for (int64_t j = 0; deep > 0 && j < columns; j += kPairPanel) {
      const int64_t count = std::min(kPairPanel, columns - j);
      brgemm_panel(rows, count, deep, left_.data(), b.data + j * b.depth + b.row * pair_row(count), c + j, c_row);
    }
  }

  // The same with B [K, N] row-major in fp32.
  void multiply_plain(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_column,
                      const float* b, int64_t b_row, float* c, int64_t c_row, Into into) {
    right_.resize(static_cast<size_t>(pairs_size(depth, columns)));
    pack_pairs(b, b_row, 1, depth, columns, right_.data());
    multiply(rows, columns, depth, a, a_row, a_column, {right_.data(), even(depth), 0}, c, c_row, into);
  }

 private:
  std::vector<uint16_t> left_, right_;
};

// The weights W [levels][rows, columns] of a product, level by level, as its right side: Wᵀ packed, or W where it
// stands; pairs where products are in bf16.
template <class T>
class LevelWeights {
 public:
  LevelWeights(Tasks& tasks, const T* weight, int64_t levels, int64_t rows, int64_t columns, As as, bool in_pairs)
      : weight_(weight), size_(rows * columns), row_(columns) {
    if constexpr (std::is_same_v<T, float>)
      if (in_pairs) pairs_.emplace(tasks, weight, levels, rows, columns, as);
    if (!in_pairs && as == As::transposed) packed_.emplace(tasks, weight, levels, rows, columns, as);
  }

  bool in_pairs() const { return pairs_.has_value(); }
  Pairs pairs(From from) const {
    const int64_t depth = pairs_->depth();
    return {(*pairs_)[from.level] + from.column * depth, depth, from.row};
  }
  RightSide<T> operator[](From from) const {
    if (!packed_) return plain(weight_ + from.level * size_ + from.row * row_ + from.column, row_);
    RightSide<T> side = (*packed_)[from.level];
    side.data += from.row * kPanel<T> + from.column / kPanel<T> * side.panel;
    return side;
  }

 private:
  const T* weight_;
  int64_t size_, row_;
  std::optional<PairedWeights> pairs_;
  std::optional<PackedWeights<T>> packed_;
};

// One thread's products: in T, or in bf16 where the weights are pairs.
template <class T>
class Products {
 public:
  explicit Products(bool in_pairs) : in_pairs_(in_pairs) {}

  Ahead ahead;  // what to fetch meanwhile

  // C = (keep · C +) bias + A · weights[from]
  void weigh(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, const LevelWeights<T>& weights,
             From from, T* c, int64_t c_row, Into into, const T* bias = nullptr, T keep = T(1)) {
    if constexpr (std::is_same_v<T, float>)
      if (weights.in_pairs()) {
        paired_.multiply(rows, columns, depth, a, a_row, 1, weights.pairs(from), c, c_row, into, bias, keep);
        return;
      }
    multiply<T>(rows, columns, depth, a, a_row, 1, weights[from], c, c_row, into, bias, keep, &ahead);
  }

  // C = (C +) Aᵀ · B, sums over items: A [items, rows], B [items, columns].
  void correlate(int64_t rows, int64_t columns, int64_t items, const T* a, int64_t a_row, const T* b, int64_t b_row,
                 T* c, int64_t c_row, Into into) {
    if constexpr (std::is_same_v<T, float>)
      if (in_pairs_) {
        paired_.multiply_plain(rows, columns, items, a, 1, a_row, b, b_row, c, c_row, into);
        return;
      }
    multiply<T>(rows, columns, items, a, 1, a_row, plain(b, b_row), c, c_row, into, nullptr, T(1), &ahead);
  }

  // After a block: the thread's tiles belong to others too.
  void end() const {
    if (in_pairs_) end_brgemm();
  }

 private:
  bool in_pairs_;
  PairedProducts paired_;
};

}  // namespace crossan_fast
