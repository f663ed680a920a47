// Products of one block of items in bf16, by torch's brgemm: AMX tiles where the CPU has them, else AVX-512's bf16.
//
// Operands round to bf16, sums are fp32. Weights are packed once a call (`PairedWeights`), the other operands here.
// Where the CPU has neither, oneDNN's AVX-512 code is slower than `multiply` in fp32; tests ask for it.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "packing.h"
#include "pairs.h"
#include "parallel.h"
#include "rows.h"

namespace crossan_fast {

// Whether torch multiplies bf16 by brgemm on this CPU at all, with AMX or without.
bool has_brgemm();
// Whether bf16 products are to go through brgemm: CROSSAN_FAST_CPU_BF16 = auto (where the CPU has bf16 products),
// brgemm, fp32. A wish that cannot be served is an error.
bool use_brgemm();
std::string described_bf16();  // the way they go and why, or why they cannot

// C[M, N] = (C +) A[M, K] · B: A row-major with K even, B one panel of pairs.
void brgemm_panel(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t a_row, const uint16_t* pairs,
                  float* c, int64_t c_row, Into into);
void end_brgemm();  // gives the thread's tiles back

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
    take(rows, depth, a, a_row, a_column);
    multiply_taken(columns, b, c, c_row, into, bias, keep);
  }

  // The same with B [K, N] row-major in fp32.
  void multiply_plain(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_column,
                      const float* b, int64_t b_row, float* c, int64_t c_row, Into into) {
    take(rows, depth, a, a_row, a_column);
    multiply_taken_plain(columns, b, b_row, c, c_row, into);
  }

  // A [rows, depth] for products that share it.
  void take(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_column) {
    rows_ = rows;
    depth_ = depth;
    grow(left_, rows * left_row_of(depth));
    pack_left(rows, depth, a, a_row, a_column, left_.data());
  }
  void multiply_taken(int64_t columns, Pairs b, float* c, int64_t c_row, Into into, const float* bias = nullptr,
                      float keep = 1.0f) const {
    if (rows_ == 0) return;
    const bool adds = into == Into::add || bias || depth_ == 0;
    if (bias || (into == Into::add ? keep != 1.0f : adds))
      for (int64_t i = 0; i < rows_; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          float& value = c[i * c_row + j];
          value = (into == Into::add ? keep * value : 0.0f) + (bias ? bias[j] : 0.0f);
        }
    for (int64_t j = 0; depth_ > 0 && j < columns; j += kPairPanel) {
      const int64_t count = std::min(kPairPanel, columns - j);
      brgemm_panel(rows_, count, even(depth_), left_.data(), left_row_of(depth_),
                   b.data + j * b.depth + b.row * pair_row(count), c + j, c_row, adds ? Into::add : Into::overwrite);
    }
  }
  void multiply_taken_plain(int64_t columns, const float* b, int64_t b_row, float* c, int64_t c_row, Into into) {
    grow(right_, pairs_size(depth_, columns));
    pack_pairs(b, b_row, 1, depth_, columns, right_.data());
    multiply_taken(columns, {right_.data(), even(depth_), 0}, c, c_row, into);
  }

 private:
  static void grow(std::vector<uint16_t>& memory, int64_t size) {
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(static_cast<size_t>(size));
  }

  std::vector<uint16_t> left_, right_;
  int64_t rows_ = 0, depth_ = 0;  // of what was taken
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
  // The same to be fetched, nothing of pairs: their products fetch for themselves.
  RightSide<T> soon(From from) const { return pairs_ ? RightSide<T>{} : (*this)[from]; }
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
             From from, T* c, int64_t c_row, Into into, const T* bias = nullptr, T keep = T(1),
             RightSide<T> then = {}) {
    if constexpr (std::is_same_v<T, float>)
      if (weights.in_pairs()) {
        paired_.multiply(rows, columns, depth, a, a_row, 1, weights.pairs(from), c, c_row, into, bias, keep);
        return;
      }
    multiply<T>(rows, columns, depth, a, a_row, 1, weights[from], c, c_row, into, bias, keep, &ahead, then);
  }

  // C = (C +) Aᵀ · B, sums over items: A [items, rows], B [items, columns].
  void correlate(int64_t rows, int64_t columns, int64_t items, const T* a, int64_t a_row, const T* b, int64_t b_row,
                 T* c, int64_t c_row, Into into) {
    multiply_plain(rows, columns, items, a, 1, a_row, b, b_row, c, c_row, into);
  }

  // C = A · B of matrices that are no weights packed before: A by two strides, B row-major.
  void multiply_plain(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_column,
                      const T* b, int64_t b_row, T* c, int64_t c_row, Into into) {
    if constexpr (std::is_same_v<T, float>)
      if (in_pairs_) {
        paired_.multiply_plain(rows, columns, depth, a, a_row, a_column, b, b_row, c, c_row, into);
        return;
      }
    multiply<T>(rows, columns, depth, a, a_row, a_column, plain(b, b_row), c, c_row, into, nullptr, T(1), &ahead);
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
