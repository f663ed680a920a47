// What the blocks of side_network's backward add to, and what is made of it once all have.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "links.h"
#include "plan.h"
#include "side_network.h"

namespace crossan_fast::side_network {

// Of one tower, per level l = 1 … L: Σ dz_l [a_0 … a_{l−1}]ᵀ over items, [k, l·r].
template <class T>
class LevelProducts {
 public:
  explicit LevelProducts(const Structure& s) : place_(s), sums_(place_.size()) {}
  T* operator[](int64_t l) const { return sums_.data() + place_.start(l); }

 private:
  Rows place_;
  Buffer<T> sums_;
};

template <class T>
struct Sums {
  using PerLevel = std::vector<std::vector<double>>;  // [tower or pair][level], over items

  const Weights<T*>& grads;
  std::vector<LevelProducts<T>> products;  // per tower; none where a block walks with h
  PerLevel mu;          // ⟨dx, c⟩; less ⟨dx, the other c⟩ of a pair's, less ⟨dx, h⟩ where a block walks with it
  PerLevel bottleneck;  // ⟨da, a⟩ − ⟨dz, z⟩
  PerLevel cross;       // ⟨dx, T s⟩ per cross pair

  Sums(const Structure& s, const Weights<T*>& to)
      : grads(to),
        mu(s.towers.size(), std::vector<double>(static_cast<size_t>(s.levels))),
        bottleneck(mu),
        cross(s.cross_pairs().size(), std::vector<double>(static_cast<size_t>(s.levels))) {
    for (size_t t = 0; !s.walks_with_h() && t < s.towers.size(); ++t) products.emplace_back(s);
  }
};

// ⟨dx, row⟩ over items, for each of the rows that a tower's x is a sum of. By lanes, and every few items in double.
template <class T>
class GateDots {
 public:
  void clear() { *this = GateDots(); }

  void add(int64_t width, const T* dx, int count, const T* const* rows) {
    if (static_cast<size_t>(count) > sums_.size()) sums_.resize(static_cast<size_t>(count));
    switch (count) {
      case 1: add_fused<1>(width, dx, rows); break;
      case 2: add_fused<2>(width, dx, rows); break;
      case 3: add_fused<3>(width, dx, rows); break;
      case 4: add_fused<4>(width, dx, rows); break;
      case 5: add_fused<5>(width, dx, rows); break;
      case 6: add_fused<6>(width, dx, rows); break;
      case 7: add_fused<7>(width, dx, rows); break;
      case 8: add_fused<8>(width, dx, rows); break;
      default:  // more modalities than anyone has
        for (int j = 0; j < count; ++j) sums_[static_cast<size_t>(j)] += static_cast<double>(dot(width, dx, rows[j]));
    }
    if (++pending_ == 16) gather();
  }

  void gather() {
    for (size_t j = 0; j < sums_.size() && j < kFused; ++j) {
      sums_[j] += static_cast<double>(sum_of_lanes<T>(lanes_[j])) + static_cast<double>(rest_[j]);
      lanes_[j] = Vec<T>{};
      rest_[j] = 0;
    }
    pending_ = 0;
  }

  double sum(int j) const { return static_cast<size_t>(j) < sums_.size() ? sums_[static_cast<size_t>(j)] : 0.0; }

 private:
  static constexpr size_t kFused = 8;

  template <int count>
  void add_fused(int64_t width, const T* dx, const T* const* rows) {
    constexpr int lanes = kLanes<T, Vec<T>>;
    Vec<T> sum[count];
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) sum[j] = lanes_[j];
    int64_t d = 0;
    for (; d + lanes <= width; d += lanes) {
      const Vec<T> g = load<Vec<T>>(dx + d);
#pragma GCC unroll 8
      for (int j = 0; j < count; ++j) sum[j] += g * load<Vec<T>>(rows[j] + d);
    }
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) lanes_[j] = sum[j];
    for (; d < width; ++d)
      for (int j = 0; j < count; ++j) rest_[j] += dx[d] * rows[j][d];
  }

  Vec<T> lanes_[kFused] = {};
  T rest_[kFused] = {};
  std::vector<double> sums_;
  int pending_ = 0;
};

// Some columns of D of one tower's weights: what the sums over items leave to add.
template <class T>
class FinishColumns {
 public:
  static constexpr int64_t kColumns = 64;

  explicit FinishColumns(const Plan<T>& plan)
      : s_(plan.structure),
        plan_(plan),
        in_pairs_(plan.in_pairs && s_.rank % 2 == 0),
        up_(in_pairs_ ? 0 : s_.levels * s_.rank * kColumns),
        up_pairs_(in_pairs_ ? s_.levels * s_.rank * kColumns : 0),
        weight_(std::max(s_.rank, s_.embedding) * kColumns) {}

  void run(const Sums<T>& sums, const std::vector<T>& carried, size_t t, int64_t j) {
    const int64_t width = s_.width(s_.towers[t]), rank = s_.rank, columns = std::min(kColumns, width - j);
    pack_up(t, j, columns);
    std::vector<double> bias(static_cast<size_t>(s_.levels * columns)), image(static_cast<size_t>(columns));
    for (int64_t l = 1; l <= s_.levels; ++l) {
      const int64_t rows = l < s_.levels ? rank : s_.embedding;
      const T* own = level_weight(plan_, t, l) + j;
      const T* total = l < s_.levels ? sums.grads.down_bias[t] + l * rank : sums.grads.head_bias[t];
      T* to = (l < s_.levels ? sums.grads.down_weight[t] + l * rank * width : sums.grads.head_weight[t]) + j;
      add_up(rows, columns, l * rank, sums.products[t][l], to, width);
      for (int64_t k = 0; k < rows; ++k) {
        std::copy_n(own + k * width, columns, weight_.data() + k * kColumns);
        for (int64_t d = 0; d < columns; ++d) to[k * width + d] += total[k] * carried[l * width + j + d];
      }
      std::fill(image.begin(), image.end(), 0.0);  // W_lᵀ Σ dz_l
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t d = 0; d < columns; ++d)
          image[d] += static_cast<double>(total[k]) * static_cast<double>(weight_.data()[k * kColumns + d]);
      if constexpr (std::is_same_v<T, float>)
        if (in_pairs_) paired_.take(columns, rows, weight_.data(), 1, kColumns);
      for (int64_t p = 0; p < l; ++p) {
        through_weight(columns, rows, sums.products[t][l] + p * rank, l * rank,
                       sums.grads.up_weight[t] + (p * width + j) * rank, l == p + 1 ? Into::overwrite : Into::add);
        const auto kept = static_cast<double>(carry(plan_, t, l, p));
        for (int64_t d = 0; d < columns; ++d) bias[p * columns + d] += kept * image[d];
      }
    }
    for (int64_t p = 0; p < s_.levels; ++p)
      for (int64_t d = 0; d < columns; ++d)
        sums.grads.up_bias[t][p * width + j + d] = static_cast<T>(bias[p * columns + d]);
    if (in_pairs_) end_brgemm();
  }

 private:
  void pack_up(size_t t, int64_t j, int64_t columns) {
    const int64_t width = s_.width(s_.towers[t]), rank = s_.rank, depth = s_.levels * rank;
    for (int64_t p = 0; p < s_.levels; ++p) {
      const T* from = plan_.weights.up_weight[t] + p * width * rank;
      if constexpr (std::is_same_v<T, float>)
        if (in_pairs_) {
          pack_pairs(from + j * rank, 1, rank, rank, columns, up_pairs_.data() + p * rank * pair_row(columns));
          continue;
        }
      for (int64_t i = 0; i < columns; i += kPanel<T>)
        pack_panel(from, int64_t{1}, rank, rank, j + i, j + columns, up_.data() + i * depth + p * rank * kPanel<T>);
    }
  }

  // to += product · up, [rows, depth] by [depth, columns]
  void add_up(int64_t rows, int64_t columns, int64_t depth, const T* product, T* to, int64_t to_row) {
    if constexpr (std::is_same_v<T, float>)
      if (in_pairs_) {
        paired_.multiply(rows, columns, depth, product, depth, 1, {up_pairs_.data(), depth, 0}, to, to_row, Into::add);
        return;
      }
    multiply<T>(rows, columns, depth, product, depth, 1, {up_.data(), kPanel<T>, s_.levels * s_.rank * kPanel<T>}, to,
                to_row, Into::add);
  }

  // to = (to +) weightᵀ · product, [columns, rows] by [rows, r]
  void through_weight(int64_t columns, int64_t rows, const T* product, int64_t row, T* to, Into into) {
    if constexpr (std::is_same_v<T, float>)
      if (in_pairs_) {
        paired_.multiply_taken_plain(s_.rank, product, row, to, s_.rank, into);
        return;
      }
    multiply<T>(columns, s_.rank, rows, weight_.data(), 1, kColumns, plain(product, row), to, s_.rank, into);
  }

  const Structure& s_;
  const Plan<T>& plan_;
  bool in_pairs_;              // pairs of an odd r would span two levels
  Buffer<T> up_;               // columns of all levels' W_upᵀ, [L·r, kColumns]
  Buffer<uint16_t> up_pairs_;  // the same as pairs
  Buffer<T> weight_;           // of W_l, [k, kColumns]
  PairedProducts paired_;
};

// With S_lp = κ_lp Σ dz_l a_pᵀ over items: the gradient of W_l holds Σ dz_l u_lᵀ and lacks what x_l has beyond u_l,
// Σ_p S_lp W_up,pᵀ and the biases' share; that of W_up,p is Σ_{l>p} W_lᵀ S_lp.
template <class T>
void finish_weights(const Plan<T>& plan, const Sums<T>& sums) {
  const Structure& s = plan.structure;
  struct Task {
    size_t tower;
    int64_t column;
  };
  std::vector<Task> tasks;
  std::vector<std::vector<T>> carried;
  for (size_t t = 0; t < s.towers.size(); ++t) {
    carried.push_back(carried_biases(plan, t));
    for (int64_t j = 0; j < s.width(s.towers[t]); j += FinishColumns<T>::kColumns) tasks.push_back({t, j});
  }
  for (size_t t = 0; t < s.towers.size(); ++t)
    for (int64_t l = 1; l <= s.levels; ++l) {
      T* product = sums.products[t][l];
      const int64_t rank = s.rank, rows = l < s.levels ? rank : s.embedding;
      for (int64_t p = 0; p < l; ++p) {
        const T kept = carry(plan, t, l, p);
        for (int64_t k = 0; k < rows; ++k)
          for (int64_t j = 0; j < rank; ++j) product[(k * l + p) * rank + j] *= kept;
      }
    }
  const auto count = static_cast<int64_t>(tasks.size()), workers = workers_for(count);
  std::vector<FinishColumns<T>> columns;
  for (int64_t w = 0; w < workers; ++w) columns.emplace_back(plan);
  run_tasks(workers, count, [&](int64_t w, int64_t i) {
    const auto [t, j] = tasks[static_cast<size_t>(i)];
    columns[static_cast<size_t>(w)].run(sums, carried[t], t, j);
  });
}

// ⟨dx_l, h_{l−1}⟩ from sums alone: with q_l = ⟨dh_l, h_l⟩ and h_l = x_l + W_up a + b_up, dx_l = dh_l + W_downᵀ dz,
//
//     q_l = ⟨dx_l, x_l⟩ − ⟨dz, z − b_down⟩ + ⟨da, a⟩ + ⟨Σ dh_l, b_up⟩,
//     ⟨dx_l, x_l⟩ = μ ⟨dx_l, c⟩ + Σ tanh ν ⟨dx_l, T s⟩ + q_{l−1},    (1 − μ) ⟨dx_l, h_{l−1}⟩ = q_{l−1}.
template <class T>
void finish_gates(const Plan<T>& plan, const Sums<T>& sums) {
  const Structure& s = plan.structure;
  const auto dot_of = [](int64_t count, const T* x, const T* y) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
    return sum;
  };
  for (size_t t = 0; t < s.towers.size(); ++t) {
    const int64_t width = s.width(s.towers[t]), rank = s.rank;
    double before = 0;  // q_{l−1}
    for (int64_t l = 0; l < s.levels; ++l) {
      const double mu = 1.0 / (1.0 + std::exp(-static_cast<double>(plan.weights.gate[t][l]) / s.temperature));
      if (s.towers[t].second >= 0 || s.walks_with_h()) {
        sums.grads.gate[t][l] = static_cast<T>(sums.mu[t][l] * mu * (1 - mu) / s.temperature);
        continue;
      }
      sums.grads.gate[t][l] = static_cast<T>((sums.mu[t][l] * (1 - mu) - before) * mu / s.temperature);
      before += mu * sums.mu[t][l] + sums.bottleneck[t][l] +
                dot_of(rank, sums.grads.down_bias[t] + l * rank, plan.weights.down_bias[t] + l * rank) +
                dot_of(width, sums.grads.up_bias[t] + l * width, plan.weights.up_bias[t] + l * width);
      for (const auto& c : plan.incoming[t]) before += static_cast<double>(c.gate[l]) * sums.cross[c.pair][l];
    }
  }
  for (size_t p = 0; p < sums.cross.size(); ++p)
    for (int64_t l = 0; l < s.levels; ++l) {
      const double gate = std::tanh(static_cast<double>(plan.weights.cross_gate[p][l]));
      sums.grads.cross_gate[p][l] = static_cast<T>(sums.cross[p][l] * (1 - gate * gate));
    }
}

}  // namespace crossan_fast::side_network
