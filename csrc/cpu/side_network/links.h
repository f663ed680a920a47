// Products of weights that link a level to those before it, made once a call: G_lp = κ_lp W_l W_up,p, [k, r], k being
// r, or d at the head's level L.
#pragma once

#include <algorithm>
#include <vector>

#include "plan.h"

namespace crossan_fast::side_network {

// A tower's links as a backward takes them, level p after level p: the matrix [depth(p), r] of G_lp over
// l = p + 1 … L. The forward keeps them so.
struct Columns {
  int64_t levels, rank, embedding;
  explicit Columns(const Structure& s) : levels(s.levels), rank(s.rank), embedding(s.embedding) {}

  int64_t depth(int64_t p) const { return (levels - 1 - p) * rank + embedding; }
  int64_t start(int64_t p) const { return (p * (levels - 1) - p * (p - 1) / 2) * rank * rank + p * embedding * rank; }
  int64_t block(int64_t l, int64_t p) const { return start(p) + (l - p - 1) * rank * rank; }
  int64_t size() const { return start(levels); }
};

// And as a forward takes them, level l after level l: the matrix [l·r, k] of G_lpᵀ over p < l.
struct Rows {
  int64_t levels, rank, embedding;
  explicit Rows(const Structure& s) : levels(s.levels), rank(s.rank), embedding(s.embedding) {}

  int64_t width(int64_t l) const { return l < levels ? rank : embedding; }
  int64_t start(int64_t l) const { return l * (l - 1) / 2 * rank * rank; }
  int64_t size() const { return start(levels) + levels * rank * embedding; }
};

// κ_lp
template <class T>
T carry(const Plan<T>& plan, size_t t, int64_t l, int64_t p) {
  T kept = T(1);
  for (int64_t i = p + 1; i <= l; ++i) kept *= plan.keeps(t, i);
  return kept;
}

// W_l of a tower, [k, D]
template <class T>
const T* level_weight(const Plan<T>& plan, size_t t, int64_t l) {
  const Structure& s = plan.structure;
  return l < s.levels ? plan.weights.down_weight[t] + l * s.rank * s.width(s.towers[t]) : plan.weights.head_weight[t];
}

// Σ_{p<l} κ_lp b_up,p of a tower for l = 0 … L, [L + 1, D]: what x_l has of the biases.
template <class T>
std::vector<T> carried_biases(const Plan<T>& plan, size_t t) {
  const Structure& s = plan.structure;
  const int64_t width = s.width(s.towers[t]);
  std::vector<T> carried(static_cast<size_t>((s.levels + 1) * width));
  for (int64_t l = 1; l <= s.levels; ++l) {
    const T* before = carried.data() + (l - 1) * width;
    const T* bias = plan.weights.up_bias[t] + (l - 1) * width;
    for (int64_t d = 0; d < width; ++d) carried[l * width + d] = plan.keeps(t, l) * (before[d] + bias[d]);
  }
  return carried;
}

// The links and biases of a forward.
template <class T>
class ForwardLinks {
 public:
  // The links go to `columns` [T, Columns::size()] too. Both are there once `tasks` have run, and `lay_out` has.
  ForwardLinks(Tasks& tasks, const Plan<T>& plan, T* columns) : plan_(plan), rows_(plan.structure) {
    const Structure& s = plan.structure;
    const Columns by_column(s);
    for (size_t t = 0; t < s.towers.size(); ++t) {
      matrices_.emplace_back(rows_.size());
      biases_.emplace_back(s.levels * s.rank + s.embedding);
      T* across = matrices_.back().data();
      T* down = columns + static_cast<int64_t>(t) * by_column.size();
      for (int64_t l = s.levels; l >= 1; --l)
        for (int64_t p = 0; p < l; ++p)
          tasks.add([=, this, to = down + by_column.block(l, p), turned = across + rows_.start(l)] {
            multiply_out(t, l, p, to, turned + p * plan_.structure.rank * rows_.width(l));
          });
      tasks.add([=, this, to = biases_.back().data()] { add_up_biases(t, to); });
    }
  }

  void lay_out(Tasks& tasks) {
    const Structure& s = plan_.structure;
    for (const Buffer<T>& matrix : matrices_) {
      laid_.emplace_back();
      for (int64_t l = 1; l <= s.levels; ++l)
        laid_.back().emplace_back(tasks, matrix.data() + rows_.start(l), 1, l * s.rank, rows_.width(l), As::plain,
                                  plan_.in_pairs);
    }
  }

  // Of levels l ≥ 1: [l·r, k]
  const LevelWeights<T>& operator()(size_t t, int64_t l) const { return laid_[t][static_cast<size_t>(l - 1)]; }
  const T* bias(size_t t, int64_t l) const { return biases_[t].data() + l * plan_.structure.rank; }

 private:
  void multiply_out(size_t t, int64_t l, int64_t p, T* to, T* turned) const {
    const Structure& s = plan_.structure;
    const int64_t width = s.width(s.towers[t]), rank = s.rank, rows = rows_.width(l);
    Products<T> products(plan_.in_pairs);
    products.multiply_plain(rows, rank, width, level_weight(plan_, t, l), width, 1,
                            plan_.weights.up_weight[t] + p * width * rank, rank, to, rank, Into::overwrite);
    products.end();
    const T kept = carry(plan_, t, l, p);
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t j = 0; j < rank; ++j) turned[j * rows + k] = to[k * rank + j] *= kept;
  }

  void add_up_biases(size_t t, T* to) const {
    const Structure& s = plan_.structure;
    const int64_t width = s.width(s.towers[t]);
    const std::vector<T> carried = carried_biases(plan_, t);
    for (int64_t l = 0; l <= s.levels; ++l) {
      const T* own = l < s.levels ? plan_.weights.down_bias[t] + l * s.rank : plan_.weights.head_bias[t];
      for (int64_t k = 0; k < rows_.width(l); ++k)
        to[l * s.rank + k] = own[k] + dot(width, level_weight(plan_, t, l) + k * width, carried.data() + l * width);
    }
  }

  const Plan<T>& plan_;
  Rows rows_;
  std::vector<Buffer<T>> matrices_, biases_;  // per tower [Rows::size()], [L·r + d]
  std::vector<std::vector<LevelWeights<T>>> laid_;
};

// The links of a backward, [depth(p), r] for each level p; there once `tasks` have run.
template <class T>
std::vector<std::vector<LevelWeights<T>>> backward_links(Tasks& tasks, const Plan<T>& plan, const T* columns) {
  const Structure& s = plan.structure;
  const Columns place(s);
  std::vector<std::vector<LevelWeights<T>>> laid(s.towers.size());
  for (size_t t = 0; t < laid.size(); ++t)
    for (int64_t p = 0; p < s.levels; ++p)
      laid[t].emplace_back(tasks, columns + static_cast<int64_t>(t) * place.size() + place.start(p), 1, place.depth(p),
                           s.rank, As::plain, plan.in_pairs);
  return laid;
}

}  // namespace crossan_fast::side_network
