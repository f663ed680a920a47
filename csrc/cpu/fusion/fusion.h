// fusion on CPUs: what it computes is written in crossan_fast/ops/fusion.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/simd.h"

namespace crossan_fast::fusion {

struct Sizes {
  int64_t items, modalities, width, expansion;  // N, M, d, f
  int64_t top_k;                                // 0: every present expert
};

struct Inputs {
  const void* embeddings;  // e [N, M, d], contiguous
  Stored type;             // of e
  const bool* present;     // [N, M] or null
  const int64_t* counts;   // [N] or null
};

// Weights or their gradients, contiguous; P is const T* or T*.
template <class P>
struct Weights {
  P router_weight, router_bias, w1, b1, w2, b2;
};

// items [N, d] in `type`; logits [N, M]; assigned and probability [M].
template <class T>
void forward(const Sizes& sizes, const Inputs& inputs, const Weights<const T*>& weights, Stored type, void* items,
             T* logits, T* assigned, T* probability);

// grad_items in `type`, grad_embeddings in that of e. Sums over items go to `grads` in the order of blocks.
template <class T>
void backward(const Sizes& sizes, const Inputs& inputs, const Weights<const T*>& weights, Stored type,
              const void* grad_items, const T* grad_probability, const T* logits, void* grad_embeddings,
              const Weights<T*>& grads);

}  // namespace crossan_fast::fusion
