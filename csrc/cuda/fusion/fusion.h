// MOMEF's experts on the GPU: what the forward's and the backward's kernels share.
//
//     E_m(e) = e + W2_m · gelu(W1_m e + b1_m) + b2_m,    item = Σ_m share_m · E_m(e_m)
//
// An expert works on the items that chose it and on no others: a list of them per expert is made on the device
// (no host learns its length), and a block takes 64 entries of one list. The hidden units pass by in slices of
// 64, so that no [items, hidden] tensor exists; the backward computes them again. Whatever is summed over
// experts, slices or items is summed in a fixed order.
#pragma once

#include "cuda/activation.h"
#include "cuda/tile_product.h"

namespace crossan_fast {

constexpr int kExpertRows = 64, kExpertThreads = 256, kExpertTileBytes = 64 * 128;

struct Experts {
  const unsigned char* joined;    // e [items, experts · width]
  const float* share;             // [items, experts]; 0: the expert does not run
  const void *w1, *b1, *w2, *b2;  // [experts, hidden, width], [experts, hidden], [experts, width, hidden], …
  int64_t items;
  int experts, width, hidden, weight_kind, splits;
  int32_t *rows, *counts;     // the lists: [experts, items], [experts]
  float* parts;               // forward: share · E_m(e_m) [items, experts, width] where it runs
  unsigned char* output;      // forward: [items, width]
  const unsigned char* grad;  // backward: of the output
  float* grad_joined;         // [items, experts · width], zeros before
  float* grad_share;          // [items, experts], zeros before
  float* partial;             // [splits, experts, partial_floats()]
  void *grad_w1, *grad_b1, *grad_w2, *grad_b2;

  // ∂W1 [hidden, width], ∂W2ᵀ [hidden, width], ∂b1 [hidden], ∂b2 [width].
  __host__ __device__ int64_t partial_floats() const { return (2 * int64_t(width) + 1) * hidden + width; }
};

int launch_expert_lists(const Experts& experts, void* stream);
int launch_experts(const Experts& experts, int kind, void* stream);
int launch_experts_backward(const Experts& experts, int kind, void* stream);

// Eight neighbouring weights of any kind as 16-bit ones.
template <class T>
__device__ __forceinline__ Raw8 load_weight8(const void* weights, int64_t index, int kind) {
  const auto* from = static_cast<const unsigned char*>(weights) + index * element_size(kind);
  float values[8];
  if (kind == kFloat32) {
    Raw8 low = load16(from), high = load16(from + 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = bits_to_float(low.words[i]);
      values[i + 4] = bits_to_float(high.words[i]);
    }
  } else {
    unpack8(load16(from), kind, values);
  }
  return pack8<T>(values);
}

// A block's expert and the part of its list that is in shared memory. kPanels: of 64 columns of the width.
template <class T, int kPanels>
struct ExpertBlock {
  const Experts& p;
  const int expert;
  unsigned char *states, *w1, *w2;  // e [64, width]; the slice's W1 [64, width] and W2 [width, 64]
  int32_t* items;                   // [64]; −1 past the list's end
  float* shares;                    // [64]

  __device__ ExpertBlock(const Experts& p, int expert, unsigned char* memory)
      : p(p),
        expert(expert),
        states(memory),
        w1(states + kPanels * kExpertTileBytes),
        w2(w1 + kPanels * kExpertTileBytes),
        items(reinterpret_cast<int32_t*>(w2 + kPanels * kExpertTileBytes)),
        shares(reinterpret_cast<float*>(items + kExpertRows)) {}

  static constexpr int kBytes = 3 * kPanels * kExpertTileBytes + 8 * kExpertRows;

  // Entries `first` … of the list, for everyone to see.
  __device__ __forceinline__ void load_items(int64_t first) {
    if (threadIdx.x < kExpertRows) {
      bool valid = first + threadIdx.x < p.counts[expert];
      int32_t item = valid ? p.rows[int64_t(expert) * p.items + first + threadIdx.x] : -1;
      items[threadIdx.x] = item;
      shares[threadIdx.x] = valid ? p.share[int64_t(item) * p.experts + expert] : 0.0f;
    }
    __syncthreads();
  }

  // The rows of `source` [items, stride] that the list names, from column `start` on; zeros past its end.
  __device__ __forceinline__ void load_rows(unsigned char* panels, const unsigned char* source, int64_t stride,
                                            int64_t start) {
#pragma unroll 2
    for (int i = threadIdx.x; i < kExpertRows * 8 * kPanels; i += kExpertThreads) {
      int row = i / (8 * kPanels), chunk = i % (8 * kPanels);
      bool valid = items[row] >= 0 && chunk * 8 < p.width;
      Raw8 raw = {};
      if (valid) raw = load16(source + 2 * (items[row] * stride + start + chunk * 8));
      store16(panels + chunk / 8 * kExpertTileBytes + swizzled(row, chunk % 8), raw);
    }
  }
  __device__ __forceinline__ void load_states() {
    load_rows(states, p.joined, int64_t(p.experts) * p.width, int64_t(expert) * p.width);
  }

  // The weights of hidden units 64·slice …; zeros past the ends.
  __device__ __forceinline__ void load_slice(int slice) {
#pragma unroll 2
    for (int i = threadIdx.x; i < 64 * 8 * kPanels; i += kExpertThreads) {
      int unit = slice * 64 + i / (8 * kPanels), chunk = i % (8 * kPanels);
      Raw8 raw = {};
      if (unit < p.hidden && chunk * 8 < p.width)
        raw = load_weight8<T>(p.w1, (int64_t(expert) * p.hidden + unit) * p.width + chunk * 8, p.weight_kind);
      store16(w1 + chunk / 8 * kExpertTileBytes + swizzled(i / (8 * kPanels), chunk % 8), raw);
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < 64 * 8 * kPanels; i += kExpertThreads) {
      int column = i / 8, unit = slice * 64 + i % 8 * 8;
      Raw8 raw = {};
      if (column < p.width && unit < p.hidden)
        raw = load_weight8<T>(p.w2, (int64_t(expert) * p.width + column) * p.hidden + unit, p.weight_kind);
      store16(w2 + column / 64 * kExpertTileBytes + swizzled(column % 64, i % 8), raw);
    }
  }

  __device__ __forceinline__ float bias1(int slice, int column) const {
    int unit = slice * 64 + column;
    return unit < p.hidden ? load_element(p.b1, int64_t(expert) * p.hidden + unit, p.weight_kind) : 0.0f;
  }
  __device__ __forceinline__ float bias2(int column) const {
    return column < p.width ? load_element(p.b2, int64_t(expert) * p.width + column, p.weight_kind) : 0.0f;
  }

  // W1 e + b1 of the slice.
  __device__ __forceinline__ void pre_activation(float (&pre)[16], int slice) {
    const Fragment at;
#pragma unroll
    for (int index = 0; index < 16; ++index) pre[index] = bias1(slice, at.column_of(index));
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      warp_product<T, false, false>(pre, states + panel * kExpertTileBytes, w1 + panel * kExpertTileBytes);
  }
};

template <class T>
__device__ __forceinline__ float tile_element_at(const unsigned char* panels, int row, int column) {
  const unsigned char* tile = panels + column / 64 * kExpertTileBytes;
  return to_float(*reinterpret_cast<const T*>(tile + swizzled(row, column % 64 / 8) + column % 8 * 2));
}

}  // namespace crossan_fast
