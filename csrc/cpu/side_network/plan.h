// What every block of a call shares: gates, weights laid out for products, sizes of blocks and slices.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/caches.h"
#include "cpu/packing.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/rows.h"
#include "side_network.h"

namespace crossan_fast::side_network {

inline constexpr int64_t kBlock = 96;  // items at most

// Blocks of near equal size; about a multiple of four of them once there is work for four threads, so that no
// thread idles at the end, and two where one would leave a thread idle. Their size depends on the items alone:
// results must not depend on the threads.
struct Blocks {
  int64_t items, count, size;
  Blocks(int64_t n, int64_t most) : items(n), count((n + most - 1) / most), size(0) {
    if (count > 2) count = (count + 3) / 4 * 4;
    if (count == 1 && n >= most / 4) count = 2;
    size = count == 0 ? 0 : (n + count - 1) / count;
    count = size == 0 ? 0 : (n + size - 1) / size;
  }
  int64_t first(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return std::min(size, items - block * size); }
};

// One cross sum's source: which modality, its gate, and T where it is a pair of matrices.
template <class T>
struct CrossSource {
  int pair;        // in the order of cross_pairs
  int from;        // n
  int projection;  // in the order of the pairs that have one, or −1
  std::vector<T> gate;
};

// Columns [first, first + count) of D; of a tower or modality that is narrower, those that it has.
struct Slice {
  int64_t first, count;
  int64_t of(int64_t width) const { return std::clamp<int64_t>(width - first, 0, count); }
};

template <class T>
struct Plan {
  const Structure& structure;
  const Inputs& inputs;
  const Weights<const T*>& weights;
  std::vector<std::vector<T>> mu;                     // [tower][level]
  std::vector<std::vector<CrossSource<T>>> incoming;  // per tower
  std::vector<int> narrowing;                         // per tower, its index among the narrowed ones, or −1
  std::vector<bool> dense;                            // modalities whose rows must stand in one matrix
  std::vector<PackedWeights<T>> cross_down, cross_up, pair_weight;
  bool in_pairs;  // products in bf16 through brgemm
  std::vector<T> zeros;
  int64_t widest;

  // The packed weights are there once `tasks` have run.
  Plan(Tasks& tasks, const Structure& s, const Inputs& in, const Weights<const T*>& w, Stored type)
      : structure(s),
        inputs(in),
        weights(w),
        dense(s.widths.size(), false),
        in_pairs(sizeof(T) == 4 && type == Stored::bf16 && use_brgemm()) {
    const int64_t levels = s.levels, rank = s.rank;
    widest = *std::max_element(s.widths.begin(), s.widths.end());
    zeros.assign(static_cast<size_t>(widest), T(0));
    const auto pairs = s.cross_pairs();
    incoming.resize(s.towers.size());
    for (size_t p = 0, projected = 0; p < pairs.size(); ++p) {
      const auto [m, n] = pairs[p];
      CrossSource<T> source{static_cast<int>(p), n, -1, {}};
      for (int64_t l = 0; l < levels; ++l) source.gate.push_back(std::tanh(w.cross_gate[p][l]));
      if (s.projected(m, n)) {
        source.projection = static_cast<int>(projected);
        cross_down.emplace_back(tasks, w.cross_down[projected], 1, rank, s.widths[n], As::transposed);
        cross_up.emplace_back(tasks, w.cross_up[projected], 1, s.widths[m], rank, As::transposed);
        dense[n] = true;
        ++projected;
      }
      incoming[m].push_back(std::move(source));
    }
    for (size_t t = 0; t < s.towers.size(); ++t) {
      const Tower& tower = s.towers[t];
      mu.emplace_back();
      for (int64_t l = 0; l < levels; ++l)
        mu[t].push_back(static_cast<T>(1.0 / (1.0 + std::exp(-static_cast<double>(w.gate[t][l]) / s.temperature))));
      narrowing.push_back(s.narrowed(tower) ? static_cast<int>(pair_weight.size()) : -1);
      if (s.narrowed(tower)) {
        const int wide = s.wide(tower);
        pair_weight.emplace_back(tasks, w.pair_weight[narrowing[t]], levels, s.width(tower), s.widths[wide],
                                 As::transposed);
        dense[wide] = true;
      }
    }
  }

  // W [levels][k, D] of each tower as a right side, level by level.
  std::vector<LevelWeights<T>> across(Tasks& tasks, const std::vector<const T*>& matrices, int64_t levels, int64_t k,
                                      As as) const {
    std::vector<LevelWeights<T>> laid;
    for (size_t t = 0; t < matrices.size(); ++t)
      laid.emplace_back(tasks, matrices[t], levels, k, structure.width(structure.towers[t]), as, in_pairs);
    return laid;
  }

  // Columns of D that a block walks through all levels at a time: what a slice's sums and states take fits in twice L2,
  // as 256 columns do but for many modalities. (Zen 3, 512 kB, M = 2, 4 and 6: 256 columns are 4, 8 and 16 % faster
  // than what half of L2 holds. Products of fewer columns cost more than states that come again from L3.) All of D at
  // once where a product needs whole rows.
  int64_t slice(int64_t block) const {
    if (std::find(dense.begin(), dense.end(), true) != dense.end()) return widest;
    const auto rows = static_cast<int64_t>(structure.widths.size() + structure.towers.size());
    const int64_t fitting = cache_sizes().l2 * 2 / (block * rows * static_cast<int64_t>(sizeof(T)));
    return std::clamp<int64_t>(fitting / kPairPanel * kPairPanel, kPairPanel, 256);
  }

  // The next slice of D; nothing of it after the last.
  Slice after(Slice slice) const {
    const int64_t first = slice.first + slice.count;
    return {first, std::min(slice.count, widest - first)};
  }

  // Whether the cross sums of a level have terms: towers' h before the first level is zero.
  bool crosses(int64_t level) const { return structure.cross == Cross::backbone || level > 0; }
  // The share of h that a tower's x keeps; of the last h its head takes all.
  T keeps(size_t tower, int64_t level) const {
    const bool all = structure.towers[tower].second >= 0 || level == structure.levels;
    return all ? T(1) : T(1) - mu[tower][level];
  }

  bool exists(const Tower& tower, int64_t item) const {
    if (!inputs.present) return true;
    const bool* row = inputs.present + item * structure.modalities();
    return row[tower.first] || (tower.second >= 0 && row[tower.second]);
  }

  void zero_absent(const Tower& tower, int64_t first, int64_t count, T* x, int64_t row, int64_t width) const {
    if (!inputs.present) return;
    for (int64_t i = 0; i < count; ++i)
      if (!exists(tower, first + i)) std::fill_n(x + i * row, width, T(0));
  }
};

}  // namespace crossan_fast::side_network
