// What enters the towers at one level of a block: states, and what cross terms make of them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "plan.h"

namespace crossan_fast::side_network {

// A slice of the states of one level of a block: rows read where they stand if they are of type T already, converted
// else.
template <class T>
class BlockStates {
 public:
  BlockStates(const Plan<T>& plan, int64_t block, int64_t slice)
      : plan_(plan), slice_(slice), rows_(plan.structure.widths.size()), memory_(plan.structure.widths.size()) {
    for (size_t m = 0; m < rows_.size(); ++m) {
      rows_[m].resize(static_cast<size_t>(block));
      if (copies(m)) memory_[m] = Buffer<T>(block * stride(m));
    }
  }

  // How many rows ahead to fetch where products can't do it meanwhile (`announce`).
  static constexpr int64_t kSoon = 4;

  int64_t stride(size_t m) const { return padded<T>(std::min(slice_, plan_.structure.widths[m])); }
  const T* row(size_t m, int64_t i) const { return rows_[m][static_cast<size_t>(i)]; }
  const T* matrix(size_t m) const { return memory_[m].data(); }  // of a dense modality

  void read(int64_t level, int64_t first, int64_t count, Slice slice) {
    const Inputs& in = plan_.inputs;
    for (size_t m = 0; m < rows_.size(); ++m) {
      const States& s = in.states[m];
      const int64_t width = slice.of(plan_.structure.widths[m]);
      if (width == 0) continue;
      if (plan_.in_pairs)
        for (int64_t i = 0; i < std::min(kSoon, count); ++i)
          fetch(stored(m, level, first + i, slice.first), width * bytes_of(s.type));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t item = first + i, id = in.ids ? in.ids[item] : item;
        const bool here = present(m, item);
        const char* from = stored(m, level, item, slice.first);
        if (plan_.in_pairs && i + kSoon < count)
          fetch(stored(m, level, item + kSoon, slice.first), width * bytes_of(s.type));
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

  // The rows that a later `read` will want: they lie too far apart for the core to guess.
  void announce(Ahead& ahead, int64_t level, int64_t first, int64_t count, Slice slice) const {
    ahead.clear();
    if (plan_.in_pairs) return;  // `read` fetches for itself
    for (int64_t i = 0; i < count; ++i)
      for (size_t m = 0; m < rows_.size(); ++m)
        ahead.add(stored(m, level, first + i, slice.first),
                  slice.of(plan_.structure.widths[m]) * bytes_of(plan_.inputs.states[m].type));
  }

 private:
  static void fetch(const char* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 3);
    __builtin_prefetch(from + bytes - 1, 0, 3);
  }

  bool present(size_t m, int64_t item) const {
    const bool* all = plan_.inputs.present;
    return !all || all[item * plan_.structure.modalities() + static_cast<int64_t>(m)];
  }
  const char* stored(size_t m, int64_t level, int64_t item, int64_t column) const {
    const States& s = plan_.inputs.states[m];
    const int64_t id = plan_.inputs.ids ? plan_.inputs.ids[item] : item;
    return static_cast<const char*>(s.data) + (id * s.row + level * s.level + column) * bytes_of(s.type);
  }
  bool copies(size_t m) const {
    const States& s = plan_.inputs.states[m];
    const Stored own = sizeof(T) == 8 ? Stored::f64 : Stored::f32;
    return plan_.dense[m] || s.type != own || s.scale != nullptr;
  }

  const Plan<T>& plan_;
  int64_t slice_;
  std::vector<std::vector<const T*>> rows_;
  std::vector<Buffer<T>> memory_;
};

// What enters the towers at one level of a block: x[t] = keep · h[t] + Σ weight · row over its terms, and the cross
// terms that are products.
template <class T>
class LevelInputs {
 public:
  LevelInputs(const Plan<T>& plan, int64_t block, int64_t slice) : plan_(plan), states_(plan, block, slice) {
    const Structure& s = plan.structure;
    towers_.resize(s.towers.size());
    for (size_t t = 0; t < towers_.size(); ++t)
      if (plan.narrowing[t] >= 0) towers_[t].narrow = Buffer<T>(block * padded<T>(s.width(s.towers[t])));
    source_.resize(s.widths.size() + 1);
  }

  // `before[n]`: tower n's h of the level before, [count, D]; read where cross = side and beyond the first level.
  void read(int64_t level, int64_t first, int64_t count, Slice slice, const std::vector<T*>* before = nullptr) {
    const Structure& s = plan_.structure;
    level_ = level;
    count_ = count;
    before_ = before;
    states_.read(level, first, count, slice);
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

  void announce(Ahead& ahead, int64_t level, int64_t first, int64_t count, Slice slice) const {
    states_.announce(ahead, level, first, count, slice);
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

  // x = keep · before + the terms of every tower that has columns of the slice. Item by item, so that its states serve
  // every tower from L1. `rows(t, i)` gives the rows of item i: before, null where it is zero, and x, which may be it.
  template <class Rows>
  void mix_rows(Slice slice, const Rows& rows_of) {
    const Structure& s = plan_.structure;
    for (int64_t i = 0; i < count_; ++i)
      for (size_t t = 0; t < s.towers.size(); ++t)
        if (const int64_t columns = slice.of(s.width(s.towers[t]))) {
          const auto [before, x] = rows_of(t, i);
          mix<T>(columns, before, plan_.keeps(t, level_), terms(t), rows(t, i), weights(t), x);
        }
  }

  // s[n, level] of a modality whose rows a product reads.
  const T* cross_matrix(int from) const {
    return plan_.structure.cross == Cross::side ? (*before_)[static_cast<size_t>(from)] : matrix(from);
  }

  // low ← gate · s down for each cross source that is projected; `low(projection)` is [count, r].
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
