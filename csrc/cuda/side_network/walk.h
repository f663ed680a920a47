// The walk over the levels, forward or backward, for one tower and the items of a block. Groups of 128
// threads own 32 items each; their h (or its gradient) stays in shared memory as panels of 64 columns. What
// multiplies the tiles is the Engine: mma.sync (walk.cu) or wgmma (hopper.cu):
//
//   acquire()   makes what the group wrote visible to product(), waits for the next tile of weights
//   product()   acc += items [32, 64] · tile [64, 64]ᵀ, perhaps in the background
//   finish()    waits for the product before, if any; its tile is no longer needed
//   store()     acc + bias → a tile of 32 items × 64
//   add()       panel ← (panel + acc + bias) · scale
//   sync()      the group's threads meet
#pragma once

#include "side_network.h"

namespace crossan_fast {

struct GroupMemory {
  unsigned char* bottleneck;  // 32 items × 64: z, then act(z); or da, then dz
  unsigned char* panels;      // [width / 64] of 32 items × 64 columns
  Item* items;                // [32]
};

__host__ __device__ constexpr size_t group_bytes(int max_width) {
  return (1 + max_width / kTile) * kPanelBytes + 1024;  // 32 items in the last kilobyte
}

__device__ __forceinline__ GroupMemory group_memory(unsigned char* base, int max_width, int group) {
  unsigned char* own = base + group * group_bytes(max_width);
  unsigned char* panels = own + kPanelBytes;
  return {own, panels, reinterpret_cast<Item*>(panels + max_width / kTile * kPanelBytes)};
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

// panel ← α₀·panel + Σ factors·states
template <class T>
__device__ __forceinline__ void mix(unsigned char* panel, const Position& at, const Tower& tower,
                                    const Item (&items)[2], float keep, const float (&factors)[kMaxSources][2],
                                    const StateLoads& loads) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned char* place = panel + at.offset(half);
    float x[8], c[8];
    unpack8<T>(load16(place), x);
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

// The bottleneck tile, between the two products of a level. Forward: z is saved, then activated in place.
// Backward: the tile holds da; z comes back, act(z) and dz go to memory for the weight gradients.
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

// The tiles that a walk reads for one tower.
__device__ __forceinline__ int walk_tiles(int levels, int width, bool backward) {
  return (2 * levels - (backward ? 1 : 0)) * (width / kTile);  // the backward leaves out level 0's second product
}

template <class T, class Engine, bool kBackward>
__device__ __forceinline__ void walk_tower(const Walk& walk, const Tower& tower, Engine& engine,
                                           const GroupMemory& memory, int thread, int64_t first_item) {
  const Position at(thread);
  const int panels = tower.width / kTile, levels = walk.levels;
  if (thread < kGroupItems) memory.items[thread] = find_item(walk, tower, first_item + thread);
  engine.sync();
  const Item items[2] = {memory.items[at.row(0)], memory.items[at.row(1)]};

  for (int panel = 0; panel < panels; ++panel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Raw8 start = {};
      if (kBackward && (items[half].flags & kExists)) {
        int64_t element = (first_item + at.row(half)) * tower.width + panel * kTile + at.chunk * 8;
        start = load16(tower.grad + 2 * element);
      }
      store16(memory.panels + panel * kPanelBytes + at.offset(half), start);
    }
  }

  StateLoads loads;
  if constexpr (!kBackward) loads.start(tower, levels, items, 0, 0, at.chunk);
  for (int step = 0; step < levels; ++step) {
    const int level = kBackward ? levels - 1 - step : step;
    const float* coefficients = tower.coefficients + level * kCoefficients;
    float factors[kMaxSources][2];
    if constexpr (!kBackward) state_factors(tower, levels, items, level, factors);

    engine.clear();
    for (int panel = 0; panel < panels; ++panel) {
      unsigned char* own = memory.panels + panel * kPanelBytes;
      if constexpr (!kBackward) {
        mix<T>(own, at, tower, items, coefficients[0], factors, loads);
        bool last = panel + 1 == panels;
        if (!last || level + 1 < levels)
          loads.start(tower, levels, items, level + last, last ? 0 : panel + 1, at.chunk);
      }
      const unsigned char* tile = engine.acquire();
      engine.finish();  // so the product ran while this panel was mixed
      engine.product(own, tile);
    }
    engine.finish();
    engine.store(memory.bottleneck, kBackward ? nullptr : tower.down_bias + level * kRank);
    engine.sync();
    bottleneck_pass<T, kBackward>(walk, tower, memory.bottleneck, at, items, first_item, level);
    if (kBackward && level == 0) break;
    for (int panel = 0; panel < panels; ++panel) {
      const unsigned char* tile = engine.acquire();
      engine.clear();
      engine.product(memory.bottleneck, tile);
      engine.finish();
      engine.add(memory.panels + panel * kPanelBytes,
                 kBackward ? nullptr : tower.up_bias + int64_t(level) * tower.width + panel * kTile,
                 kBackward ? coefficients[0] : 1.0f);
    }
    engine.sync();
  }

  if constexpr (!kBackward) {
    for (int panel = 0; panel < panels; ++panel) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int64_t index = first_item + at.row(half);
        if (index >= walk.items) continue;
        Raw8 h = load16(memory.panels + panel * kPanelBytes + at.offset(half));
        store16(tower.output + 2 * (index * tower.width + panel * kTile + at.chunk * 8),
                items[half].flags & kExists ? h : Raw8{});
      }
    }
  }
  engine.sync();
}

}  // namespace crossan_fast
