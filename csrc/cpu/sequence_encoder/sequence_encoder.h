// sequence_encoder on CPUs: what it computes is written in crossan_fast/ops/sequence_encoder.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/simd.h"
#include "dropout.h"

namespace crossan_fast::sequence_encoder {

struct Sizes {
  int64_t batch, places, width, heads, inner, layers, window;  // B, S, d, heads, f, blocks, positions
  double eps;
  int64_t head_width() const { return width / heads; }
};

// Weights or their gradients, contiguous; P is const T* or T*.
template <class P>
struct Layer {
  P query, key, value, out, attention_gain, attention_bias;
  P widen, widen_bias, narrow, narrow_bias, forward_gain, forward_bias;
};
template <class P>
struct Weights {
  P position, gain, bias;
  std::vector<Layer<P>> layers;
};

struct Inputs {
  const void* items;  // [B, S, d], contiguous
  Stored type;
  const bool* mask;  // [B, S]
  Dropout dropout;
};

// Numbers kept for the backward, per place of the batch: `kept` is [B·S, kept_width].
int64_t kept_width(const Sizes& sizes);

// users [B, S, d] in `type`, written at real places only. `kept` null: nothing is kept.
template <class T>
void forward(const Sizes& sizes, const Inputs& inputs, const Weights<const T*>& weights, Stored type, void* users,
             T* kept);

// grad_items [B, S, d] in the items' type, written at real places only; every entry of `grads` is written.
template <class T>
void backward(const Sizes& sizes, const Inputs& inputs, const Weights<const T*>& weights, Stored type,
              const void* grad_users, const T* kept, void* grad_items, const Weights<T*>& grads);

}  // namespace crossan_fast::sequence_encoder
