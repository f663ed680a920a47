// The gradients of what brings states of other widths to a tower's: T of cross terms, and the Linear of a pair's wider
// state. Their products need whole rows, so a block that has any walks all of D at once.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "level_inputs.h"
#include "plan.h"

namespace crossan_fast::side_network {

template <class T>
class OtherWidths {
 public:
  OtherWidths(const Plan<T>& plan, const Weights<T*>& grads, int64_t block)
      : plan_(plan),
        s_(plan.structure),
        grads_(grads),
        raw_(plan.cross_down.empty() ? 0 : block * s_.rank),
        dots_(s_.cross_pairs().size(), std::vector<double>(static_cast<size_t>(s_.levels))) {
    for (size_t p = 0; p < plan.cross_down.size(); ++p) {
      low_.emplace_back(block * s_.rank);
      d_low_.emplace_back(block * s_.rank);
    }
    for (size_t m = 0; m < s_.widths.size(); ++m)
      for (const auto& c : plan.incoming[m])
        if (c.projection >= 0) {
          d_down_.push_back({Buffer<T>(s_.rank * s_.widths[c.from]), s_.rank * s_.widths[c.from]});
          d_up_.push_back({Buffer<T>(s_.widths[m] * s_.rank), s_.widths[m] * s_.rank});
        }
  }

  bool any() const {
    return !low_.empty() || std::any_of(plan_.narrowing.begin(), plan_.narrowing.end(), [](int n) { return n >= 0; });
  }
  T* low(int projection) const { return low_[projection].data(); }      // gate · s down, [block, r]
  T* d_low(int projection) const { return d_low_[projection].data(); }  // its gradient, times the gate
  // ⟨dx, T s⟩ of a projected pair at a level, over the block.
  double dot_of(int pair, int64_t level) const { return dots_[static_cast<size_t>(pair)][level]; }

  // Gradients of T and its gate at a level, from dx [count, D] of tower t; x = … + low up. Levels come downwards.
  void projected_back(const LevelInputs<T>& inputs, size_t t, int64_t l, int64_t count, const T* dx, int64_t row) {
    if (s_.towers[t].second >= 0) return;
    const int64_t width = s_.width(s_.towers[t]), rank = s_.rank;
    const Into into = l + 1 < s_.levels ? Into::add : Into::overwrite;
    for (const auto& c : plan_.incoming[t]) {
      if (c.projection < 0) continue;
      const int64_t from = s_.widths[c.from];
      T *d_up = d_up_[c.projection].first.data(), *d_down = d_down_[c.projection].first.data();
      if (!plan_.crosses(l)) {
        if (into == Into::overwrite) {
          std::fill_n(d_up, width * rank, T(0));
          std::fill_n(d_down, rank * from, T(0));
        }
        continue;
      }
      const RightSide<T> rows = plain(inputs.cross_matrix(c.from), padded<T>(from));
      T* d_low = this->d_low(c.projection);
      multiply<T>(width, rank, count, dx, 1, row, plain(low(c.projection), rank), d_up, rank, into);
      multiply<T>(count, rank, width, dx, row, 1, plain(plan_.weights.cross_up[c.projection], rank), d_low, rank,
                  Into::overwrite);
      // ⟨d_low, s down⟩ with s down computed anew: dividing `low` by a gate near zero would lose it.
      multiply<T>(count, rank, from, rows.data, rows.row, 1, plan_.cross_down[c.projection][0], raw_.data(), rank,
                  Into::overwrite);
      dots_[static_cast<size_t>(c.pair)][l] = static_cast<double>(dot(count * rank, d_low, raw_.data()));
      for (int64_t i = 0; i < count * rank; ++i) d_low[i] *= c.gate[l];
      multiply<T>(rank, from, count, d_low, 1, rank, rows, d_down, from, into);
    }
  }

  // The Linear's gradients at a level, from dx of pair tower t; the caller's turn.
  void narrowed_back(const LevelInputs<T>& inputs, size_t t, int64_t l, int64_t first, int64_t count, const T* dx,
                     int64_t row, bool add) {
    const int which = plan_.narrowing[t];
    if (which < 0) return;
    const int wide = s_.wide(s_.towers[t]);
    const int64_t width = s_.width(s_.towers[t]), from = s_.widths[wide];
    const T weight = wide == s_.towers[t].first ? plan_.mu[t][l] : T(1) - plan_.mu[t][l];
    T* narrowed = inputs.narrowed(t);
    for (int64_t i = 0; i < count; ++i)  // the narrowed rows have served their turn; the gradient takes their place
      mix<T>(width, dx + i * row, weight, 0, nullptr, nullptr, narrowed + i * row);
    plan_.zero_absent({wide, -1}, first, count, narrowed, row, width);
    multiply<T>(width, from, count, narrowed, 1, row, plain(inputs.matrix(wide), padded<T>(from)),
                grads_.pair_weight[which] + l * width * from, from, add ? Into::add : Into::overwrite);
    sum_rows(count, width, narrowed, row, add, grads_.pair_bias[which] + l * width);
  }

  // T's gradients, which the levels share, are built per block, or those of two blocks would meet in any order; the
  // caller's turn.
  void add_shared(bool add) const {
    for (size_t p = 0; p < d_down_.size(); ++p) {
      add_up(d_down_[p], grads_.cross_down[p], add);
      add_up(d_up_[p], grads_.cross_up[p], add);
    }
  }

 private:
  static void add_up(const std::pair<Buffer<T>, int64_t>& sum, T* to, bool add) {
    const T* from = sum.first.data();
    for (int64_t i = 0; i < sum.second; ++i) to[i] = add ? to[i] + from[i] : from[i];
  }

  const Plan<T>& plan_;
  const Structure& s_;
  const Weights<T*>& grads_;
  Buffer<T> raw_;                                             // s down, [block, r]
  std::vector<Buffer<T>> low_, d_low_;                        // per projected pair
  std::vector<std::pair<Buffer<T>, int64_t>> d_down_, d_up_;  // likewise, the block's gradients and their sizes
  std::vector<std::vector<double>> dots_;                     // [pair][level]
};

}  // namespace crossan_fast::side_network
