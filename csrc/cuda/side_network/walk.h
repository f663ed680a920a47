// The walk over the slots, forward or backward, for one tower and the items of a block. Groups of 128 threads own 32
// items each; their u (side_network.h) and every level's act(z), or every slot's dz, stay in shared memory as panels of
// 64 columns. What multiplies the tiles is the Engine: mma.sync (walk.cu) or wgmma (hopper.cu):
//
//   acquire()   makes what the group wrote visible to product(), waits for the next tile of weights
//   product()   acc += items [32, 64] · tile [64, 64]ᵀ, perhaps in the background
//   finish()    waits for the product before, if any; its tile is no longer needed
//   store()     acc + bias → a tile of 32 items × 64
//   sync()      the group's threads meet
#pragma once

#include "side_network.h"

namespace crossan_fast {

struct GroupMemory {
  unsigned char* panels;  // 32 items × 64 each: forward u's [width / 64], the levels' z, then act(z), and e's; backward
                          // the slots' da, then dz
  Item* items;            // [32]
};

__host__ __device__ constexpr size_t group_bytes(int panels) {
  return panels * kPanelBytes + 1024;  // 32 items in the last kilobyte
}

__device__ __forceinline__ GroupMemory group_memory(unsigned char* base, int count, int group) {
  unsigned char* panels = base + group * group_bytes(count);
  return {panels, reinterpret_cast<Item*>(panels + count * kPanelBytes)};
}

__device__ __forceinline__ int walk_panels(const Walk& walk, bool backward) {
  return walk_panels(walk.levels, walk.parts, walk.max_width, backward);
}

// A thread moves 8 columns (chunk) of two items of its group: thread / 8 and thread / 8 + 16.
struct Position {
  int chunk, item;
  __device__ explicit Position(int thread) : chunk(thread % 8), item(thread / 8) {}
  __device__ int row(int half) const { return item + 16 * half; }
  __device__ int offset(int half) const { return swizzled(row(half), chunk); }
};

// The cached states of one panel, on their way from memory.
struct StateLoads {
  Raw8 raw[kMaxSources][2];

  __device__ __forceinline__ void start(const Tower& tower, int levels, const Item (&items)[2], int level, int panel,
                                        int chunk) {
#pragma unroll
    for (int s = 0; s < kMaxSources; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (s >= tower.source_count || !(items[half].flags >> s & 1)) continue;
        const Source& source = tower.sources[s];
        int64_t element = (items[half].row * levels + level) * tower.width + panel * kTile + chunk * 8;
        raw[s][half] = load_state8(source.states + element * element_size(source.kind), source.kind);
      }
    }
  }
};

// What a state is multiplied by: its coefficient, times the scale of a quantized one; 0 where absent.
__device__ __forceinline__ void state_factors(const Tower& tower, int levels, const Item (&items)[2], int level,
                                              float (&factors)[kMaxSources][2]) {
#pragma unroll
  for (int s = 0; s < kMaxSources; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factors[s][half] = 0;
      if (s >= tower.source_count || !(items[half].flags >> s & 1)) continue;
      float scale = tower.sources[s].scales ? tower.sources[s].scales[items[half].row * levels + level] : 1.0f;
      factors[s][half] = tower.coefficients[level * kCoefficients + 1 + s] * scale;
    }
  }
}

// Eight biases onto eight numbers of a row; none where there is no level before.
__device__ __forceinline__ void add_biases(float (&x)[8], const float* biases) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] += biases ? biases[i] : 0.0f;
}

// panel ← α₀·(panel + the level before's b_up) + Σ factors·states
template <class T>
__device__ __forceinline__ void mix(unsigned char* panel, const Position& at, const Tower& tower,
                                    const Item (&items)[2], float keep, const float* biases,
                                    const float (&factors)[kMaxSources][2], const StateLoads& loads) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned char* place = panel + at.offset(half);
    float x[8], c[8];
    unpack8<T>(load16(place), x);
    add_biases(x, biases);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= keep;
#pragma unroll
    for (int s = 0; s < kMaxSources; ++s) {
      if (s >= tower.source_count || !(items[half].flags >> s & 1)) continue;
      unpack8(loads.raw[s][half], tower.sources[s].kind, c);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += factors[s][half] * c[i];
    }
    store16(place, pack8<T>(x));
  }
}

// panel ← panel + the last level's b_up: what the head reads.
template <class T>
__device__ __forceinline__ void finish_panel(unsigned char* panel, const Position& at, const float* biases) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x[8];
    unpack8<T>(load16(panel + at.offset(half)), x);
    add_biases(x, biases);
    store16(panel + at.offset(half), pack8<T>(x));
  }
}

// A level's panel of 64 numbers an item. Forward: z is saved, then activated in place.
// Backward: the panel holds da; z comes back, act(z) and dz go to memory for the weight gradients.
template <class T, bool kBackward>
__device__ __forceinline__ void bottleneck_pass(const Walk& walk, const Tower& tower, unsigned char* tile,
                                                const Position& at, const Item (&items)[2], int64_t first_item,
                                                int level) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int64_t index = first_item + at.row(half);
    bool valid = index < walk.items, in_rank = at.chunk * 8 < walk.rank;
    unsigned char* place = tile + at.offset(half);
    int64_t line = index * walk.levels + level;
    unsigned char* saved = tower.saved + 2 * (line * walk.rank + at.chunk * 8);
    float z[8];
    if constexpr (!kBackward) {
      Raw8 raw = load16(place);
      unpack8<T>(raw, z);
      if (valid && in_rank) store16(saved, items[half].flags & kExists ? raw : Raw8{});
#pragma unroll
      for (int i = 0; i < 8; ++i) z[i] = activate(z[i], walk.activation);
      store16(place, pack8<T>(z));
    } else {
      float grad[8], a[8];
      unpack8<T>(load16(place), grad);
      unpack8<T>(valid && in_rank ? load16(saved) : Raw8{}, z);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a[i] = activate(z[i], walk.activation);
        grad[i] *= activate_grad(z[i], walk.activation);
      }
      Raw8 dz = pack8<T>(grad);
      store16(place, dz);
      if (valid) {
        int64_t scratch = 2 * (line * kRank + at.chunk * 8);
        store16(tower.activated + scratch, pack8<T>(a));
        store16(tower.bottleneck_grad + scratch, dz);
      }
    }
  }
}

// The head's part of the embeddings' gradient, from memory; zeros where there is none.
__device__ __forceinline__ void load_embedding_grad(const Walk& walk, const Tower& tower, unsigned char* tile,
                                                    const Position& at, const Item (&items)[2], int64_t first_item,
                                                    int part) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int column = part * kTile + at.chunk * 8;
    bool there = (items[half].flags & kExists) && column < walk.embedding;
    int64_t element = (first_item + at.row(half)) * walk.embedding_stride + column;
    store16(tile + at.offset(half), there ? load16(tower.grad + 2 * element) : Raw8{});
  }
}

// The head's part of the embeddings, to memory; zeros where the tower does not exist.
__device__ __forceinline__ void store_embedding(const Walk& walk, const Tower& tower, const unsigned char* tile,
                                                const Position& at, const Item (&items)[2], int64_t first_item,
                                                int part) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int64_t index = first_item + at.row(half);
    int column = part * kTile + at.chunk * 8;
    if (index >= walk.items || column >= walk.embedding) continue;
    Raw8 e = items[half].flags & kExists ? load16(tile + at.offset(half)) : Raw8{};
    store16(tower.output + 2 * (index * walk.embedding_stride + column), e);
  }
}

// The tiles that a walk reads for one tower.
__device__ __forceinline__ int walk_tiles(const Walk& walk, int width, bool backward) {
  const int pairs = pair_count(walk.levels, walk.parts);
  return backward ? pairs : pairs + (walk.levels + walk.parts) * (width / kTile);
}

template <class T, class Engine>
__device__ __forceinline__ void walk_forward(const Walk& walk, const Tower& tower, Engine& engine,
                                             const GroupMemory& memory, const Position& at, const Item (&items)[2],
                                             int64_t first_item) {
  const int panels = tower.width / kTile, levels = walk.levels;
  for (int panel = 0; panel < panels; ++panel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) store16(memory.panels + panel * kPanelBytes + at.offset(half), Raw8{});
  }
  unsigned char* thin = memory.panels + panels * kPanelBytes;  // the levels', and e's
  StateLoads loads;
  loads.start(tower, levels, items, 0, 0, at.chunk);
  for (int slot = 0; slot < levels + walk.parts; ++slot) {
    const bool is_level = slot < levels;
    const float keep = is_level ? tower.coefficients[slot * kCoefficients] : 1.0f;
    const float* biases = slot > 0 ? tower.up_bias + int64_t(slot - 1) * tower.width + at.chunk * 8 : nullptr;
    float factors[kMaxSources][2];
    if (is_level) state_factors(tower, levels, items, slot, factors);
    engine.clear();
    for (int panel = 0; panel < panels; ++panel) {
      unsigned char* own = memory.panels + panel * kPanelBytes;
      const float* own_biases = biases ? biases + panel * kTile : nullptr;
      if (is_level) {
        mix<T>(own, at, tower, items, keep, own_biases, factors, loads);
        bool last = panel + 1 == panels;
        if (!last || slot + 1 < levels) loads.start(tower, levels, items, slot + last, last ? 0 : panel + 1, at.chunk);
      } else if (slot == levels) {
        finish_panel<T>(own, at, own_biases);
      }
      const unsigned char* tile = engine.acquire();
      engine.finish();  // so the product ran while this panel was mixed
      engine.product(own, tile);
    }
    for (int below = 0; below < slot && below < levels; ++below) {
      const unsigned char* tile = engine.acquire();
      engine.finish();
      engine.product(thin + below * kPanelBytes, tile);
    }
    engine.finish();
    unsigned char* own = thin + (is_level ? slot : levels) * kPanelBytes;
    engine.store(own, is_level ? tower.down_bias + slot * kRank : tower.head_bias + (slot - levels) * kTile);
    engine.sync();
    if (is_level)
      bottleneck_pass<T, false>(walk, tower, own, at, items, first_item, slot);
    else
      store_embedding(walk, tower, own, at, items, first_item, slot - levels);
  }
}

template <class T, class Engine>
__device__ __forceinline__ void walk_backward(const Walk& walk, const Tower& tower, Engine& engine,
                                              const GroupMemory& memory, const Position& at, const Item (&items)[2],
                                              int64_t first_item) {
  for (int part = 0; part < walk.parts; ++part) {
    unsigned char* panel = memory.panels + (walk.levels + part) * kPanelBytes;
    load_embedding_grad(walk, tower, panel, at, items, first_item, part);
  }
  for (int level = walk.levels - 1; level >= 0; --level) {
    engine.clear();
    for (int slot = level + 1; slot < walk.levels + walk.parts; ++slot) {
      const unsigned char* tile = engine.acquire();
      engine.finish();
      engine.product(memory.panels + slot * kPanelBytes, tile);
    }
    engine.finish();
    unsigned char* own = memory.panels + level * kPanelBytes;
    engine.store(own, nullptr);
    engine.sync();
    bottleneck_pass<T, true>(walk, tower, own, at, items, first_item, level);
  }
}

template <class T, class Engine, bool kBackward>
__device__ __forceinline__ void walk_tower(const Walk& walk, const Tower& tower, Engine& engine,
                                           const GroupMemory& memory, int thread, int64_t first_item) {
  const Position at(thread);
  if (thread < kGroupItems) memory.items[thread] = find_item(walk, tower, first_item + thread);
  engine.sync();
  const Item items[2] = {memory.items[at.row(0)], memory.items[at.row(1)]};
  if constexpr (kBackward)
    walk_backward<T>(walk, tower, engine, memory, at, items, first_item);
  else
    walk_forward<T>(walk, tower, engine, memory, at, items, first_item);
  engine.sync();
}

}  // namespace crossan_fast
