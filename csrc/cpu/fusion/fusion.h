// fusion on CPUs: what it computes is written in crossan_fast/ops/fusion.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/simd.h"

namespace crossan_fast::fusion {

struct Sizes {
  int64_t items, modalities, width, expansion;  // N, M, d, f
  std::vector<int64_t> widths;                  // D_m
  int64_t top_k;                                // 0: every present expert
};

struct Rows {
  const void* data;  // [N, D_m], contiguous
  Stored type;
};

struct Inputs {
  std::vector<Rows> hidden;
  const bool* present;    // [N, M] or null
  const int64_t* counts;  // [N] or null
};

// Weights or their gradients, contiguous; P is const T* or T*.
template <class P>
struct Weights {
  std::vector<P> head_weight, head_bias;
  P router_weight, router_bias, w1, b1, w2, b2;
};

// items [N, d] and e [N, M·d] in `type`; logits [N, M]; assigned and probability [M].
template <class T>
void forward(const Sizes& sizes, const Inputs& inputs, const Weights<const T*>& weights, Stored type, void* items,
             void* e, T* logits, T* assigned, T* probability);

// grad_hidden [N, D_m] each in its hidden's type. Sums over items go to `grads` in the order of blocks.
template <class T>
void backward(const Sizes& sizes, const Inputs& inputs, const Weights<const T*>& weights, Stored type,
              const void* grad_items, const T* grad_probability, const void* e, const T* logits,
              const std::vector<void*>& grad_hidden, const Weights<T*>& grads);

}  // namespace crossan_fast::fusion
