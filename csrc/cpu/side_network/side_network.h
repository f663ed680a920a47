// side_network on CPUs: what it computes is written in crossan_fast/ops/side_network.py.
//
// A block of items walks all levels of its towers while its h stays in the core's cache. Its border
// (border.cpp) has checked every shape, range and type before anything here runs.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/functions.h"
#include "cpu/simd.h"
#include "side_network_fields.h"

namespace crossan_fast::side_network {

struct Structure : Fields {
  int64_t items, rows, levels, rank;

  Activation activation() const { return relu ? Activation::relu : Activation::gelu; }
  int modalities() const { return static_cast<int>(widths.size()); }
  int64_t width(const Tower& t) const {
    return t.second < 0 ? widths[t.first] : std::min(widths[t.first], widths[t.second]);
  }
  bool narrowed(const Tower& t) const { return t.second >= 0 && widths[t.first] != widths[t.second]; }
  int wide(const Tower& t) const { return widths[t.first] > widths[t.second] ? t.first : t.second; }
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
  std::vector<P> down_weight, down_bias, up_weight, up_bias, gate;  // per tower
  std::vector<P> cross_gate;                                        // per cross pair
  std::vector<P> cross_down, cross_up;                              // per cross pair of unequal widths
  std::vector<P> pair_weight, pair_bias;                            // per narrowed tower
};

// An activation or gradient tensor per tower, contiguous, each element of `type`.
struct Tensors {
  std::vector<void*> data;
  Stored type;
};

template <class T>
void forward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Tensors& outputs,
             const Tensors& saved);

template <class T>
void backward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights,
              const Tensors& grad_outputs, const Tensors& saved, const Weights<T*>& grads);

}  // namespace crossan_fast::side_network
