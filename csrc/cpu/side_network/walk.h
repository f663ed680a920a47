// What the forward and the backward walk of side_network share: packed weights, gates, and the states of a block.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/packing.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/rows.h"
#include "side_network.h"

namespace crossan_fast::side_network {

inline constexpr int64_t kBlock = 64;  // items at most; a block's h, states and one level's weights fit in L2

// Blocks of near equal size; about a multiple of four of them once there is work for four threads, so that no
// thread idles at the end, and two where one would leave a thread idle. Their size depends on the items alone:
// results must not depend on the threads.
struct Blocks {
  int64_t items, count, size;
  explicit Blocks(int64_t n) : items(n), count((n + kBlock - 1) / kBlock), size(0) {
    if (count > 2) count = (count + 3) / 4 * 4;
    if (count == 1 && n >= kBlock / 2) count = 2;
    size = count == 0 ? 0 : (n + count - 1) / count;
    count = size == 0 ? 0 : (n + size - 1) / size;
  }
  int64_t first(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return std::min(size, items - block * size); }
};

// One cross sum's source: which modality, its gate, and T where widths differ.
template <class T>
struct CrossSource {
  int pair;        // in the order of cross_pairs
  int from;        // n
  int projection;  // in the order of the pairs of unequal widths, or −1
  std::vector<T> gate;
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
  // As right sides: Wᵀ each, but W itself of the `_plain` ones, which the backward needs.
  std::vector<LevelWeights<T>> down, up, down_plain, up_plain;
  std::vector<PackedWeights<T>> cross_down, cross_up, pair_weight;
  bool in_pairs;  // products in bf16 through brgemm
  std::vector<T> zeros;
  int64_t widest;

  Plan(const Structure& s, const Inputs& in, const Weights<const T*>& w, Stored type, bool backward)
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
      if (s.widths[m] != s.widths[n]) {
        source.projection = static_cast<int>(projected);
        cross_down.emplace_back(w.cross_down[projected], 1, rank, s.widths[n], As::transposed);
        cross_up.emplace_back(w.cross_up[projected], 1, s.widths[m], rank, As::transposed);
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
      if (backward) {
        down_plain.emplace_back(w.down_weight[t], levels, rank, s.width(tower), As::plain, in_pairs);
        up_plain.emplace_back(w.up_weight[t], levels, s.width(tower), rank, As::plain, in_pairs);
      } else {
        down.emplace_back(w.down_weight[t], levels, rank, s.width(tower), As::transposed, in_pairs);
      }
      if (!backward || s.cross == Cross::side)
        up.emplace_back(w.up_weight[t], levels, s.width(tower), rank, As::transposed, in_pairs);
      narrowing.push_back(s.narrowed(tower) ? static_cast<int>(pair_weight.size()) : -1);
      if (s.narrowed(tower)) {
        const int wide = s.wide(tower);
        pair_weight.emplace_back(w.pair_weight[narrowing[t]], levels, s.width(tower), s.widths[wide], As::transposed);
        dense[wide] = true;
      }
    }
  }

  // Whether the cross sums of a level have terms: towers' h before the first level is zero.
  bool crosses(int64_t level) const { return structure.cross == Cross::backbone || level > 0; }
  // The share of h that a tower's x keeps.
  T keeps(size_t tower, int64_t level) const {
    return structure.towers[tower].second >= 0 ? T(1) : T(1) - mu[tower][level];
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

// The states of one level of a block: rows read where they stand if they are of type T already, converted else.
template <class T>
class BlockStates {
 public:
  BlockStates(const Plan<T>& plan, int64_t block)
      : plan_(plan), rows_(plan.structure.widths.size()), memory_(plan.structure.widths.size()) {
    for (size_t m = 0; m < rows_.size(); ++m) {
      rows_[m].resize(static_cast<size_t>(block));
      if (copies(m)) memory_[m] = Buffer<T>(block * stride(m));
    }
  }

  int64_t stride(size_t m) const { return padded<T>(plan_.structure.widths[m]); }
  const T* row(size_t m, int64_t i) const { return rows_[m][static_cast<size_t>(i)]; }
  const T* matrix(size_t m) const { return memory_[m].data(); }  // of a dense modality

  void read(int64_t level, int64_t first, int64_t count) {
    const Inputs& in = plan_.inputs;
    for (size_t m = 0; m < rows_.size(); ++m) {
      const States& s = in.states[m];
      const int64_t width = plan_.structure.widths[m];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t item = first + i, id = in.ids ? in.ids[item] : item;
        const bool here = present(m, item);
        const char* from = stored(m, level, item);
        T* to = copies(m) ? memory_[m].data() + i * stride(m) : nullptr;
        const T*& row = rows_[m][static_cast<size_t>(i)];
        if (!to) {
          row = here ? reinterpret_cast<const T*>(from) : plan_.zeros.data();
          continue;
        }
        row = to;
        const T scale = s.scale ? static_cast<T>(s.scale[id * s.scale_row + level * s.scale_level]) : T(1);
        if (here)
          convert_from(s.type, from, to, width, scale);
        else
          std::fill_n(to, width, T(0));
      }
    }
  }

 private:
  bool present(size_t m, int64_t item) const {
    const bool* all = plan_.inputs.present;
    return !all || all[item * plan_.structure.modalities() + static_cast<int64_t>(m)];
  }
  const char* stored(size_t m, int64_t level, int64_t item) const {
    const States& s = plan_.inputs.states[m];
    const int64_t id = plan_.inputs.ids ? plan_.inputs.ids[item] : item;
    return static_cast<const char*>(s.data) + (id * s.row + level * s.level) * bytes_of(s.type);
  }
  bool copies(size_t m) const {
    const States& s = plan_.inputs.states[m];
    const Stored own = sizeof(T) == 8 ? Stored::f64 : Stored::f32;
    return plan_.dense[m] || s.type != own || s.scale != nullptr;
  }

  const Plan<T>& plan_;
  std::vector<std::vector<const T*>> rows_;
  std::vector<Buffer<T>> memory_;
};

// What enters the towers at one level of a block: x[t] = keep · h[t] + Σ weight · row over its terms, and the cross
// terms that are products.
template <class T>
class LevelInputs {
 public:
  LevelInputs(const Plan<T>& plan, int64_t block) : plan_(plan), states_(plan, block) {
    const Structure& s = plan.structure;
    towers_.resize(s.towers.size());
    for (size_t t = 0; t < towers_.size(); ++t)
      if (plan.narrowing[t] >= 0) towers_[t].narrow = Buffer<T>(block * padded<T>(s.width(s.towers[t])));
    source_.resize(s.widths.size() + 1);
  }

  // `before[n]`: tower n's h of the level before, [count, D]; read where cross = side and beyond the first level.
  void read(int64_t level, int64_t first, int64_t count, const std::vector<T*>& before) {
    const Structure& s = plan_.structure;
    level_ = level;
    count_ = count;
    before_ = &before;
    states_.read(level, first, count);
    for (size_t t = 0; t < towers_.size(); ++t) {
      const Tower& tower = s.towers[t];
      Terms& terms = towers_[t];
      terms.weight.clear();
      terms.from.clear();
      const T mu = plan_.mu[t][level];
      add_term(terms, mu, tower.first, -1);
      if (tower.second >= 0) {
        narrow(t, level, first);
        add_term(terms, T(1) - mu, tower.second, -1);
      } else if (plan_.crosses(level)) {
        for (const auto& c : plan_.incoming[t])
          if (c.projection < 0) add_term(terms, c.gate[level], c.from, c.pair);
      }
    }
  }

  int terms(size_t t) const { return static_cast<int>(towers_[t].from.size()); }
  const T* weights(size_t t) const { return towers_[t].weight.data(); }
  int pair(size_t t, int j) const { return towers_[t].from[static_cast<size_t>(j)].pair; }
  T* narrowed(size_t t) const { return towers_[t].narrow.data(); }
  const T* matrix(int modality) const { return states_.matrix(static_cast<size_t>(modality)); }

  // The rows of item i that tower t's terms weigh.
  const T* const* rows(size_t t, int64_t i) {
    const Structure& s = plan_.structure;
    const Tower& tower = s.towers[t];
    const int wide = plan_.narrowing[t] < 0 ? -1 : s.wide(tower);
    const auto& from = towers_[t].from;
    for (size_t j = 0; j < from.size(); ++j) {
      const int m = from[j].modality;
      source_[j] = m == wide ? towers_[t].narrow.data() + i * padded<T>(s.width(tower))
                   : from[j].pair >= 0 && s.cross == Cross::side
                       ? (*before_)[static_cast<size_t>(m)] + i * padded<T>(s.widths[m])
                       : states_.row(static_cast<size_t>(m), i);
    }
    return source_.data();
  }

  // s[n, level] of a modality whose rows a product reads.
  const T* cross_matrix(int from) const {
    return plan_.structure.cross == Cross::side ? (*before_)[static_cast<size_t>(from)] : matrix(from);
  }

  // low ← gate · s down for each cross source of another width; `low(projection)` is [count, r].
  template <class Low>
  void project(size_t t, const Low& low) const {
    each_projected(t, [&](const CrossSource<T>& c) { project(c, low(c.projection)); });
  }

  // The same, and x += low up; `low` may give one buffer to all.
  template <class Low>
  void add_projected(size_t t, T* x, const Low& low) const {
    const int64_t width = plan_.structure.width(plan_.structure.towers[t]), rank = plan_.structure.rank;
    each_projected(t, [&](const CrossSource<T>& c) {
      T* own = low(c.projection);
      project(c, own);
      multiply<T>(count_, width, rank, own, rank, 1, plan_.cross_up[c.projection][0], x, padded<T>(width), Into::add);
    });
  }

 private:
  struct From {
    int modality;
    int pair;  // of cross_pairs, or −1
  };
  struct Terms {
    std::vector<T> weight;
    std::vector<From> from;
    Buffer<T> narrow;  // the wider state of a pair, narrowed: [block, D]
  };

  template <class F>
  void each_projected(size_t t, const F& visit) const {
    if (plan_.structure.towers[t].second >= 0 || !plan_.crosses(level_)) return;
    for (const auto& c : plan_.incoming[t])
      if (c.projection >= 0) visit(c);
  }

  void project(const CrossSource<T>& c, T* low) const {
    const int64_t from = plan_.structure.widths[c.from], rank = plan_.structure.rank;
    multiply<T>(count_, rank, from, cross_matrix(c.from), padded<T>(from), 1, plan_.cross_down[c.projection][0], low,
                rank, Into::overwrite);
    for (int64_t i = 0; i < count_ * rank; ++i) low[i] *= c.gate[level_];
  }

  static void add_term(Terms& terms, T weight, int modality, int pair) {
    terms.weight.push_back(weight);
    terms.from.push_back({modality, pair});
  }

  void narrow(size_t t, int64_t level, int64_t first) {
    const int which = plan_.narrowing[t];
    if (which < 0) return;
    const Structure& s = plan_.structure;
    const int wide = s.wide(s.towers[t]);
    const int64_t width = s.width(s.towers[t]), row = padded<T>(width);
    T* to = towers_[t].narrow.data();
    multiply<T>(count_, width, s.widths[wide], matrix(wide), padded<T>(s.widths[wide]), 1,
                plan_.pair_weight[which][level], to, row, Into::overwrite,
                plan_.weights.pair_bias[which] + level * width);
    plan_.zero_absent({wide, -1}, first, count_, to, row, width);
  }

  const Plan<T>& plan_;
  BlockStates<T> states_;
  std::vector<Terms> towers_;
  std::vector<const T*> source_;
  const std::vector<T*>* before_ = nullptr;
  int64_t level_ = 0, count_ = 0;
};

}  // namespace crossan_fast::side_network
