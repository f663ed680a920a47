// What the forward and the backward walk of side_network share: packed weights, gates, and the states of a block.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "packing.h"
#include "parallel.h"
#include "rows.h"
#include "side_network.h"

namespace crossan_fast::side {

inline constexpr int64_t kBlock = 64;  // items at most; a block's h, states and one level's weights fit in L2

// Blocks of near equal size; their number is a multiple of four once there is work for four threads, so that no
// thread idles at the end. It depends on the items alone: results must not depend on the threads.
struct Blocks {
  int64_t items, count, size;
  explicit Blocks(int64_t n) : items(n), count((n + kBlock - 1) / kBlock), size(0) {
    if (count > 2) count = (count + 3) / 4 * 4;
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
  std::vector<PackedTransposes<T>> down, up, cross_down, cross_up, pair_weight;
  std::vector<T> zeros;
  int64_t widest;

  Plan(const Structure& s, const Inputs& in, const Weights<const T*>& w, bool backward)
      : structure(s), inputs(in), weights(w), dense(s.widths.size(), false) {
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
        cross_down.emplace_back(w.cross_down[projected], 1, rank, s.widths[n]);
        cross_up.emplace_back(w.cross_up[projected], 1, s.widths[m], rank);
        dense[n] = true;
        ++projected;
      }
      incoming[m].push_back(std::move(source));
    }
    for (size_t t = 0; t < s.towers.size(); ++t) {
      const Tower& tower = s.towers[t];
      mu.emplace_back();
      for (int64_t l = 0; l < levels; ++l)
        mu[t].push_back(
            static_cast<T>(1.0 / (1.0 + std::exp(-static_cast<double>(w.gate[t][l]) / s.temperature))));
      if (!backward) down.emplace_back(w.down_weight[t], levels, rank, s.width(tower));
      up.emplace_back(w.up_weight[t], levels, s.width(tower), rank);
      narrowing.push_back(s.narrowed(tower) ? static_cast<int>(pair_weight.size()) : -1);
      if (s.narrowed(tower)) {
        const int wide = s.wide(tower);
        pair_weight.emplace_back(w.pair_weight[narrowing[t]], levels, s.width(tower), s.widths[wide]);
        dense[wide] = true;
      }
    }
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
    const int64_t modalities = plan_.structure.modalities();
    for (size_t m = 0; m < rows_.size(); ++m) {
      const States& s = in.states[m];
      const int64_t width = plan_.structure.widths[m];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t item = first + i, id = in.ids ? in.ids[item] : item;
        const bool here = !in.present || in.present[item * modalities + static_cast<int64_t>(m)];
        const auto* from =
            static_cast<const char*>(s.data) + (id * s.row + level * s.level) * bytes_of(s.type);
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
  bool copies(size_t m) const {
    const States& s = plan_.inputs.states[m];
    const Stored own = sizeof(T) == 8 ? Stored::f64 : Stored::f32;
    return plan_.dense[m] || s.type != own || s.scale != nullptr;
  }

  const Plan<T>& plan_;
  std::vector<std::vector<const T*>> rows_;
  std::vector<Buffer<T>> memory_;
};

}  // namespace crossan_fast::side
