// side_network on the GPU: the shapes, tiles and parameters that its kernels share.
//
// In one form for all towers, with h₋₁ = 0 and per tower and level the coefficients α:
//     x = α₀·h + Σ_s α_{1+s}·c[source s],    z = W_down x + b_down,    h ← x + W_up·act(z) + b_up
// (a modality's tower: α₀ = 1 − μ, its own state first with μ, then the others with tanh ν; a pair's tower:
// α₀ = 1, μ, 1 − μ).
//
// The backward, with dh the gradient of h and g that of the last one, is two kernels:
//   walk:             da = W_upᵀ dh,   dz = da ⊙ act′(z),   dh ← α₀·(dh + W_downᵀ dz)      for falling levels
//   weight gradients: dh, x and dx = dh + W_downᵀ dz are linear in g, c, act(z) and dz with no product over
//                     the width D, so a block owns 32 columns of one tower for all levels, keeps their
//                     gradients in registers while it streams items, and rebuilds both chains on the way:
//                     dW_up += dh ⊗ act(z) on the way down, dW_down += dz ⊗ x and dα = ⟨dx, ·⟩ on the way up
//                     (one after the other with mma.sync, at once by two warpgroups with wgmma).
// Forward and backward walk are one template (walk.h): the same two thin products per level.
#pragma once

#include "cuda/activation.h"
#include "cuda/primitives.h"

namespace crossan_fast {

constexpr int kRank = 64;  // smaller ranks are padded with zeros, which changes nothing
constexpr int kTile = 64;  // weights travel as 64 × 64 tiles
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kGroupItems = 32;                 // items of a group of 128 threads
constexpr int kPanelBytes = kGroupItems * 128;  // 32 items × 64 columns
constexpr int kMaxModalities = 8, kMaxTowers = 16, kMaxSources = 4, kMaxLevels = 8;
constexpr int kCoefficients = 1 + kMaxSources;

// A source of a tower: one modality's cached states.
struct Source {
  const unsigned char* states;  // [rows, levels, width]
  const float* scales;          // [rows, levels] or null
  int kind;
  int modality;  // its column in `present`
};

struct Tower {
  Source sources[kMaxSources];
  int source_count;
  int owners;  // the first sources, of which one must be present for the tower to exist
  int width;
  const unsigned char* weights;    // tiles in the order of the walk (packed)
  const float* down_bias;          // [levels, 64]
  const float* up_bias;            // [levels, width]
  const float* coefficients;       // [levels, kCoefficients]
  const unsigned char* grad;       // backward: g [items, width]
  unsigned char* output;           // forward: h [items, width]
  unsigned char* saved;            // z [items, levels, rank]
  unsigned char* activated;        // backward: act(z) [items, levels, 64]
  unsigned char* bottleneck_grad;  // backward: dz [items, levels, 64]
};

struct Walk {
  Tower towers[kMaxTowers];
  const void* ids;
  const uint8_t* present;  // [items, modalities]
  int64_t rows, items;
  int wide, modalities, tower_count, levels, rank, activation, max_width;
};

struct Item {
  int64_t row;     // of the states
  uint32_t flags;  // bit s: source s is present; kExists: the tower exists
};
constexpr uint32_t kExists = 1u << 31;

__device__ __forceinline__ Item find_item(const Walk& walk, const Tower& tower, int64_t index) {
  Item item = {0, 0};
  if (index >= walk.items) return item;
  item.row = load_id(walk.ids, index, walk.wide);  // prepare() has checked it
  for (int s = 0; s < tower.source_count; ++s) {
    int modality = tower.sources[s].modality;
    if (walk.present == nullptr || walk.present[index * walk.modalities + modality]) item.flags |= 1u << s;
  }
  if (item.flags & ((1u << tower.owners) - 1))
    item.flags |= kExists;
  else
    item.flags = 0;
  return item;
}

// What prepare() writes for the other kernels, and the ids that it checks for them: a function call for the
// sake of a message would cost the hot kernels registers, and serialise their wgmma.
struct Prepare {
  const void* ids;
  int64_t rows, items;
  int wide;
  const void *down_weight[kMaxTowers], *down_bias[kMaxTowers], *up_weight[kMaxTowers], *up_bias[kMaxTowers],
      *gate[kMaxTowers];
  const void* cross_gate[kMaxTowers][kMaxSources - 1];
  int width[kMaxTowers], source_count[kMaxTowers], is_pair[kMaxTowers];
  unsigned char *forward_tiles[kMaxTowers], *backward_tiles[kMaxTowers];  // backward: null in a forward call
  float *down_biases[kMaxTowers], *up_biases[kMaxTowers], *coefficients[kMaxTowers];
  int tower_count, levels, rank, weight_kind, compute_kind, max_width;
  float temperature;
};

// Per tower and split: [levels, 64, width] of W_down and of W_upᵀ, [levels, 64], [levels, width]; then per
// tower, split and chunk the coefficients' [levels, kCoefficients].
struct WeightGradient {
  Walk walk;  // its towers' `weights` are the forward's tiles
  const unsigned char* backward_tiles[kMaxTowers];
  float *partial[kMaxTowers], *coefficient_partial[kMaxTowers];
  int splits;
  bool accumulate;  // onto the partial sums of the items before
};

struct Reduce {
  const float *partial[kMaxTowers], *coefficient_partial[kMaxTowers];
  void *down_weight[kMaxTowers], *down_bias[kMaxTowers], *up_weight[kMaxTowers], *up_bias[kMaxTowers],
      *gate[kMaxTowers];
  void* cross_gate[kMaxTowers][kMaxSources - 1];
  const float* coefficients[kMaxTowers];
  int width[kMaxTowers], source_count[kMaxTowers], is_pair[kMaxTowers];
  int tower_count, levels, rank, weight_kind, splits, max_width;
  float temperature;
};

constexpr int kGradientColumns = 32;  // of a block of the weight gradients' kernel

__host__ __device__ constexpr int64_t partial_floats(int levels, int width) {
  return int64_t(levels) * (2 * kRank * width + kRank + width);
}

__device__ __forceinline__ void add_or_store(float* target, float value, bool add) {
  *target = add ? *target + value : value;
}

struct Four {
  float value[4];
};

__device__ __forceinline__ void add_or_store(float* target, Four sum, bool add) {
  Raw8 raw = add ? load16(target) : Raw8{};
#pragma unroll
  for (int i = 0; i < 4; ++i) raw.words[i] = float_to_bits(bits_to_float(raw.words[i]) + sum.value[i]);
  store16(target, raw);
}

// The launches, one translation unit each; launch.cu puts them in order.
int launch_prepare(const Prepare& prepare, void* stream);
int launch_walk(const Walk& walk, int kind, bool backward, int groups, size_t shared, void* stream);
int launch_walk_hopper(const Walk& walk, int kind, bool backward, int groups, size_t shared, unsigned blocks,
                       void* stream);
int launch_weight_gradient(const WeightGradient& gradient, int kind, void* stream);
int launch_weight_gradient_hopper(const WeightGradient& gradient, int kind, void* stream);
int launch_reduce(const Reduce& reduce, void* stream);
size_t walk_shared(int max_width, int groups);
size_t walk_hopper_shared(int max_width, int groups);
size_t weight_gradient_shared(int levels);
size_t weight_gradient_hopper_shared(int levels);

}  // namespace crossan_fast
