// What the blocks of side_network's backward add to, and what is made of it once all have.
#pragma once

#include <cmath>
#include <vector>

#include "side_network.h"
#include "walk.h"

namespace crossan_fast::side_network {

// Of one tower, per level l: Σ dz_l [a_0 … a_{l−1}]ᵀ over items, [r, l·r].
template <class T>
class LevelProducts {
 public:
  explicit LevelProducts(const Structure& s)
      : square_(s.rank * s.rank), sums_(s.levels * (s.levels - 1) / 2 * square_) {}
  T* operator[](int64_t l) const { return sums_.data() + l * (l - 1) / 2 * square_; }

 private:
  int64_t square_;
  Buffer<T> sums_;
};

template <class T>
struct Sums {
  using PerLevel = std::vector<std::vector<double>>;  // [tower or pair][level], over items

  const Weights<T*>& grads;
  std::vector<LevelProducts<T>> products;  // per tower; none where cross = side
  PerLevel mu;          // ⟨dx, c⟩; less ⟨dx, the other c⟩ of a pair's, less ⟨dx, h⟩ where cross = side
  PerLevel bottleneck;  // ⟨da, a⟩ − ⟨dz, z⟩
  PerLevel cross;       // ⟨dx, T s⟩ per cross pair

  Sums(const Structure& s, const Weights<T*>& to)
      : grads(to),
        mu(s.towers.size(), std::vector<double>(static_cast<size_t>(s.levels))),
        bottleneck(mu),
        cross(s.cross_pairs().size(), std::vector<double>(static_cast<size_t>(s.levels))) {
    for (size_t t = 0; s.cross != Cross::side && t < s.towers.size(); ++t) products.emplace_back(s);
  }
};

// The gradient of W_down holds Σ dz_l u_lᵀ; what x_l has beyond u_l is
// Σ_{p<l} κ_lp (W_up,p a_p + b_up,p), κ_lp = keep_{p+1} … keep_l.
template <class T>
void finish_down(const Plan<T>& plan, const Sums<T>& sums) {
  const Structure& s = plan.structure;
  const int64_t rank = s.rank, towers = static_cast<int64_t>(sums.products.size());
  run_tasks(workers_for(towers), towers, [&](int64_t, int64_t t) {
    for (int64_t l = 1; l < s.levels; ++l) {
      T* product = sums.products[static_cast<size_t>(t)][l];
      T kept = T(1);
      for (int64_t p = l; p-- > 0;) {
        kept *= plan.keeps(static_cast<size_t>(t), p + 1);
        for (int64_t k = 0; k < rank; ++k)
          for (int64_t j = 0; j < rank; ++j) product[(k * l + p) * rank + j] *= kept;
      }
    }
  });

  struct Task {
    size_t tower;
    int64_t column;
  };
  std::vector<Task> tasks;
  for (size_t t = 0; t < sums.products.size(); ++t)
    for (int64_t j = 0; j < s.width(s.towers[t]); j += kPanel<T>) tasks.push_back({t, j});
  const auto count = static_cast<int64_t>(tasks.size());
  const int64_t workers = workers_for(count);
  std::vector<Buffer<T>> panels;  // kPanel columns of all levels' W_upᵀ but the last's, [(L − 1)·r, kPanel]
  for (int64_t w = 0; w < workers; ++w) panels.emplace_back((s.levels - 1) * rank * kPanel<T>);
  run_tasks(workers, count, [&](int64_t w, int64_t i) {
    const auto [t, j] = tasks[static_cast<size_t>(i)];
    const int64_t width = s.width(s.towers[t]), columns = std::min(kPanel<T>, width - j);
    T* panel = panels[static_cast<size_t>(w)].data();
    T bias[kPanel<T>] = {};  // Σ_{p<l} κ_lp b_up,p
    for (int64_t l = 1; l < s.levels; ++l) {
      const int64_t p = l - 1;
      pack_panel(plan.weights.up_weight[t] + p * width * rank, int64_t{1}, rank, rank, j, width,
                 panel + p * rank * kPanel<T>);
      T* to = sums.grads.down_weight[t] + l * rank * width + j;
      multiply<T>(rank, columns, l * rank, sums.products[t][l], l * rank, 1, packed(panel, l * rank), to, width,
                  Into::add);
      for (int64_t d = 0; d < columns; ++d)
        bias[d] = plan.keeps(t, l) * (bias[d] + plan.weights.up_bias[t][p * width + j + d]);
      for (int64_t k = 0; k < rank; ++k)
        for (int64_t d = 0; d < columns; ++d) to[k * width + d] += sums.grads.down_bias[t][l * rank + k] * bias[d];
    }
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
      if (s.towers[t].second >= 0 || s.cross == Cross::side) {
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
