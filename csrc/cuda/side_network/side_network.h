// side_network on the GPU: the shapes, tiles and parameters that its kernels share.
//
// In one form for all towers, with h₋₁ = 0 and per tower and level the coefficients α:
//     x = α₀·h + Σ_s α_{1+s}·c[source s],    z = W_down x + b_down,    h ← x + W_up·act(z) + b_up
// (a modality's tower: α₀ = 1 − μ, its own state first with μ, then the others with tanh ν; a pair's tower:
// α₀ = 1, μ, 1 − μ), and at the end e = W_head h + b_head.
//
// All is folded (docs/mathematics.md, "Heads folded in"): only act is not linear, so h is u, what it is without the
// up-projections (their biases it has), and what they add; with a = act(z) and κ(j, p) the product of α₀ over the
// levels after p up to j,
//     x_j = u_j + Σ_{p<j} κ(j, p)·W_up,p·a_p              z_j = W_down,j·u_j + b_down,j + Σ_{p<j} κ(j, p)·P[j, p]·a_p
//     P[j, p] = W_down,j·W_up,p, of size r × r            da_p = Σ_{j>p} κ(j, p)·P[j, p]ᵀ dz_j,   dz = da ⊙ act′(z)
// and the head is a level like the others, with W_head for a W_down, α₀ = 1, no state of its own, e for a z and the
// gradient of e for a dz. What follows calls the levels, and after them the head's parts of 64 numbers of e, slots.
//   fold:              P of every pair of a slot and a level below it
//   walk, forward:     z of a slot: u, in shared memory, times W_down, and the a's before it times κ·P
//   walk, backward:    dz of a level: the dz's after it times κ·Pᵀ
//   pair sums:         S[j, p] = Σ dz_j ⊗ a_p over the items
//   weight gradients:  Σ dz_j ⊗ u_j and, for the gates, ⟨dx, ·⟩ of the states and of u, dx_j = W_downᵀ,j dz_j +
//                      α₀ dx_{j+1}. These have no product over the width D, so a block owns 32 columns of one tower for
//                      all slots, keeps their sums in registers while it streams items, and goes down the slots with dx
//                      and up with u (one after the other with mma.sync, at once by two warpgroups with wgmma)
//   combine:           ∂W_down,j += Σ_{p<j} κ·S[j, p]·W_upᵀ,p,   ∂W_up,p = Σ_{j>p} κ·W_downᵀ,j·S[j, p],   and to the
//                      gates what the a's add, sums of ⟨P[j, p], S[j, p]⟩ by κ without the gate's own α₀
// No step divides by a gate. No tensor of width D is made but the cached states.
#pragma once

#include "cuda/activation.h"
#include "cuda/tile_product.h"

namespace crossan_fast {

constexpr int kRank = 64;  // smaller ranks are padded with zeros, which changes nothing
constexpr int kTile = 64;  // weights travel as 64 × 64 tiles
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kGroupItems = 32;                 // items of a group of 128 threads
constexpr int kPanelBytes = kGroupItems * 128;  // 32 items × 64 columns
constexpr int kMaxModalities = 8, kMaxTowers = 16, kMaxSources = 4, kMaxLevels = 8;
constexpr int kMaxSlots = kMaxLevels + 1;  // a block of the weight gradients keeps one matrix a slot in registers
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
  const unsigned char* weights;    // tiles in the order of the walk
  const float* down_bias;          // [levels, 64]
  const float* up_bias;            // [levels, width]
  const float* head_bias;          // [parts, 64]
  const float* coefficients;       // [levels, kCoefficients]
  const unsigned char* grad;       // backward: ge, a row of `embedding` every `embedding_stride`
  unsigned char* output;           // forward: e, likewise
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
  int embedding, parts;      // numbers of e; `head_parts` of them
  int64_t embedding_stride;  // from an item's e to the next one's
};

__host__ __device__ constexpr int head_parts(int embedding) { return (embedding + kTile - 1) / kTile; }

// Pairs of a slot and a level below it.
__host__ __device__ constexpr int pair_count(int levels, int parts) {
  return levels * (levels - 1) / 2 + parts * levels;
}
__host__ __device__ constexpr int pair_of(int levels, int slot, int below) {
  return below + (slot < levels ? slot * (slot - 1) / 2 : pair_count(levels, slot - levels));
}
// The pair's place in the backward's walk, which takes `below` downwards and for each the slots above it upwards.
__host__ __device__ constexpr int backward_tile(int levels, int parts, int slot, int below) {
  int before = levels - 1 - below;  // levels, whose pairs number from `parts` on one more each
  return before * parts + before * (before - 1) / 2 + slot - below - 1;
}

// Places among the forward's tiles. In the order of its walk: of every slot W_down, width / 64, and its pairs'; then
// the levels' W_up, which the walk has no use for.
__host__ __device__ constexpr int64_t down_tile(int levels, int slot, int panels, int panel) {
  return int64_t(slot) * panels + pair_of(levels, slot, 0) + panel;
}
__host__ __device__ constexpr int64_t pair_tile(int levels, int slot, int panels, int below) {
  return down_tile(levels, slot, panels, panels) + below;
}
__host__ __device__ constexpr int64_t up_tile(int levels, int parts, int level, int panels, int panel) {
  return int64_t(levels + parts + level) * panels + pair_count(levels, parts) + panel;
}

// The pair whose `pair_of` is `index`.
struct Pair {
  int slot, below;
  __device__ Pair(int levels, int index) : slot(1), below(index) {
    while (below >= (slot < levels ? slot : levels)) below -= slot < levels ? slot : levels, ++slot;
  }
};

// κ(slot, below).
__device__ __forceinline__ float carry(const float* coefficients, int levels, int slot, int below) {
  float product = 1;
  for (int level = below + 1; level <= slot && level < levels; ++level) product *= coefficients[level * kCoefficients];
  return product;
}

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
      *gate[kMaxTowers], *head_weight[kMaxTowers], *head_bias[kMaxTowers];
  const void* cross_gate[kMaxTowers][kMaxSources - 1];
  int width[kMaxTowers], source_count[kMaxTowers], is_pair[kMaxTowers];
  unsigned char* forward_tiles[kMaxTowers];
  unsigned char* transposed_tiles[kMaxTowers];  // [slots, panels] of W_downᵀ and W_headᵀ; null in a forward call
  float *down_biases[kMaxTowers], *up_biases[kMaxTowers], *head_biases[kMaxTowers], *coefficients[kMaxTowers];
  int tower_count, levels, rank, embedding, weight_kind, compute_kind, max_width;
  float temperature;
};

struct Fold {
  unsigned char* forward_tiles[kMaxTowers];
  const float* coefficients[kMaxTowers];
  // Null in a forward call: [pairs, 64, 64] as they are; and as tiles, transposed, times κ, in the order of the walk.
  float* products[kMaxTowers];
  unsigned char* backward_tiles[kMaxTowers];
  int width[kMaxTowers];
  int tower_count, levels, parts;
};

// Per tower and split: `partial` as `Partial` has it, pairs [pairs, 64, 64]; per tower, split and chunk the
// coefficients' [levels, kCoefficients].
struct WeightGradient {
  Walk walk;
  const unsigned char* transposed_tiles[kMaxTowers];
  float *partial[kMaxTowers], *pair_partial[kMaxTowers], *coefficient_partial[kMaxTowers];
  int splits;
  bool accumulate;  // onto the partial sums of the items before
};

struct Combine {
  const float *partial[kMaxTowers], *pair_partial[kMaxTowers], *coefficient_partial[kMaxTowers];
  const float *products[kMaxTowers], *coefficients[kMaxTowers];
  const unsigned char* forward_tiles[kMaxTowers];
  // κ·S as two 16-bit tiles whose sum it is, [pairs, 2]; what they are to be multiplied by and ⟨P, S⟩, [pairs, 2].
  unsigned char* pair_tiles[kMaxTowers];
  float* pair_numbers[kMaxTowers];
  void *down_weight[kMaxTowers], *down_bias[kMaxTowers], *up_weight[kMaxTowers], *up_bias[kMaxTowers],
      *gate[kMaxTowers], *head_weight[kMaxTowers], *head_bias[kMaxTowers];
  void* cross_gate[kMaxTowers][kMaxSources - 1];
  int width[kMaxTowers], source_count[kMaxTowers], is_pair[kMaxTowers];
  int tower_count, levels, rank, embedding, weight_kind, splits, max_width;
  float temperature;
};

constexpr int kGradientColumns = 32;  // of a block of the weight gradients' kernel

// Partial sums of a split: Σ dz ⊗ x [slots, 64, width], Σ dz [slots, 64].
struct Partial {
  int64_t bias, total;
  __host__ __device__ constexpr Partial(int slots, int width)
      : bias(int64_t(slots) * kRank * width), total(bias + slots * kRank) {}
};

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
int launch_fold(const Fold& fold, int kind, void* stream);
int launch_walk(const Walk& walk, int kind, bool backward, int groups, size_t shared, void* stream);
int launch_walk_hopper(const Walk& walk, int kind, bool backward, int groups, size_t shared, unsigned blocks,
                       void* stream);
int launch_pair_sums(const WeightGradient& gradient, int kind, void* stream);
int launch_weight_gradient(const WeightGradient& gradient, int kind, void* stream);
int launch_weight_gradient_hopper(const WeightGradient& gradient, int kind, void* stream);
int launch_combine(const Combine& combine, int kind, void* stream);
// The panels of 32 items × 64 numbers that a group of a walk keeps (walk.h).
__host__ __device__ constexpr int walk_panels(int levels, int parts, int width, bool backward) {
  return levels + (backward ? parts : width / kTile + 1);
}
size_t walk_shared(int panels, int groups);
size_t walk_hopper_shared(int panels, int groups);
size_t pair_sums_shared(int levels);
size_t weight_gradient_shared(int levels, int parts);
size_t weight_gradient_hopper_shared(int levels, int parts);

}  // namespace crossan_fast
