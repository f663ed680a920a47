// side_network on CPUs: what it computes is written in crossan_fast/ops/side_network.py.
//
// All but the activations is linear. So h of an item is never made: let u walk like x, but without up-projections,
// and κ_lp be the product of what levels p + 1 … l keep of h; then, the head being one more level L that takes no
// states, has no activation and keeps all,
//
//     z_l = W_l u_l + bias_l + Σ_{p<l} G_lp a_p,      G_lp = κ_lp W_l W_up,p,      a = act(z),      e = z_L,
//     x_l = u_l + Σ_{p<l} κ_lp (W_up,p a_p + b_up,p),
//
// W_l being W_down,l or the head's. With cross = side, towers take each other's h, and κ would differ from item to
// item with what is present; and in narrow towers the G, r × r each, cost more than h. There a block walks with h
// itself (coupled.h).
//
// The border (border.cpp) has checked every shape, range and type before anything here runs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/functions.h"
#include "cpu/simd.h"
#include "side_network_fields.h"

namespace crossan_fast::side_network {

struct Structure : Fields {
  int64_t items, rows, levels, rank, embedding;

  Activation activation() const { return relu ? Activation::relu : Activation::gelu; }
  int modalities() const { return static_cast<int>(widths.size()); }
  int64_t width(const Tower& t) const {
    return t.second < 0 ? widths[t.first] : std::min(widths[t.first], widths[t.second]);
  }
  bool narrowed(const Tower& t) const { return t.second >= 0 && widths[t.first] != widths[t.second]; }
  int wide(const Tower& t) const { return widths[t.first] > widths[t.second] ? t.first : t.second; }
  // Numbers of all G of a tower.
  int64_t links() const { return levels * (levels - 1) / 2 * rank * rank + levels * rank * embedding; }
  // Whether a block walks with h itself: by structure alone, so that an item's e doesn't depend on how many there are.
  // Either way a forward and a backward take 3 D·d products an item and tower for the head, and besides them 7 L·D·r
  // with h, 3 L·D·r and 3 for each number of the links without. Measured at r = d = 64, L = 7, one thread: 1.4 times
  // faster with h at D = 64, 1.15 at 128, slower at 384.
  bool walks_with_h() const {
    if (cross == Cross::side) return true;
    int64_t across = 0;
    for (const Tower& t : towers) across += width(t);
    return 4 * levels * rank * across < 3 * links() * static_cast<int64_t>(towers.size());
  }
  // Ordered pairs (m, n), tower m receiving from modality n, in the order of the weights.
  std::vector<std::pair<int, int>> cross_pairs() const {
    std::vector<std::pair<int, int>> pairs;
    if (cross == Cross::none) return pairs;
    for (int m = 0; m < modalities(); ++m)
      for (int n = 0; n < modalities(); ++n)
        if (m != n) pairs.emplace_back(m, n);
    return pairs;
  }
};

// Cached states of one modality, [rows, levels, width]: strides in elements, the last is 1.
struct States {
  const void* data;
  Stored type;
  int64_t row, level;
  const float* scale;  // [rows, levels] or null
  int64_t scale_row, scale_level;
};

struct Inputs {
  std::vector<States> states;
  const int64_t* ids;   // [items] or null
  const bool* present;  // [items, modalities] or null
};

// Weights or their gradients, contiguous, in the order of SideNetworkWeights; P is const T* or T*.
template <class P>
struct Weights {
  std::vector<P> down_weight, down_bias, up_weight, up_bias, gate, head_weight, head_bias;  // per tower
  std::vector<P> cross_gate;                                                                // per cross pair
  std::vector<P> cross_down, cross_up;    // per cross pair that is projected
  std::vector<P> pair_weight, pair_bias;  // per narrowed tower
};

// e [N, T, d] or its gradient, and z [T, N, L, r]; contiguous, each element of `type`.
struct Kept {
  void* embeddings;
  void* bottlenecks;
  Stored type;

  char* embedding(const Structure& s, int64_t item, size_t t) const {
    const int64_t at = item * static_cast<int64_t>(s.towers.size()) + static_cast<int64_t>(t);
    return static_cast<char*>(embeddings) + at * s.embedding * bytes_of(type);
  }
  char* bottleneck(const Structure& s, int64_t item, size_t t, int64_t level) const {
    const int64_t at = (static_cast<int64_t>(t) * s.items + item) * s.levels + level;
    return static_cast<char*>(bottlenecks) + at * s.rank * bytes_of(type);
  }
};

// links [T, …]: see links.h; none where a block walks with h.
template <class T>
void forward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Kept& out,
             T* links);

template <class T>
void backward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Kept& in,
              const T* links, const Weights<T*>& grads);

namespace coupled {

template <class T>
void forward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Kept& out);

template <class T>
void backward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Kept& in,
              const Weights<T*>& grads);

}  // namespace coupled
}  // namespace crossan_fast::side_network
