// Σ dz ⊗ x and the gates' ⟨dx, ·⟩ for Hopper: as weight_gradient.cu, with wgmma, and with the two directions in a
// warpgroup each: while one takes a block of 64 items down the slots with dx, the other takes the block before it up
// again with x, and keeps the sums of all slots, [64, 32] each, in registers. What the way up needs of the way down,
// dx, is handed over in shared memory, one of two logs, once a block of items.
#include "weight_gradient.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = kGradientThreads, kGroupThreads = 128, kItems = kGradientItems;

// Offsets into shared memory; tiles are two stages for each direction, factors two of the way up.
struct Layout {
  int slices, tiles, factors, logs;
  SmallSums<kGroupThreads> small;
  __host__ __device__ constexpr Layout(int levels, int parts)
      : slices(0),
        tiles((levels + parts) * kSlice),
        factors(tiles + 4 * kItemTile),
        logs(factors + 2 * kFactorTile),
        small(logs + 2 * levels * kGroupThreads * 32, levels, parts) {}
};

// A thread holds, of two items (lane / 4 and that + 8 of its warp's 16), 8 neighbouring columns: value[4·j +
// 2·half + e] is column 8·(lane % 4) + 2·j + e. So the matrix unit's n-th column is memory's memory_column(n).
__device__ __forceinline__ int memory_column(int n) { return n % 8 / 2 * 8 + n / 8 * 2 + n % 2; }

template <class T>
struct Direction : ItemGroup<T, kGroupThreads> {
  using Base = ItemGroup<T, kGroupThreads>;
  using Base::p, Base::tower, Base::shared, Base::thread, Base::lane, Base::warp, Base::first_item;
  const Layout at;
  const int group, first_column;  // group 0 goes down, 1 up
  int used = 0;                   // steps so far, whose parity is the stage
  Item items[2];
  float sums[kMaxSlots][16] = {};

  __device__ Direction(const WeightGradient& p, const Tower& tower, unsigned char* shared, const Layout& at, int chunk)
      : Base(p, tower, shared, at.small),
        at(at),
        group(threadIdx.x / kGroupThreads),
        first_column(chunk * kGradientColumns + lane % 4 * 8) {}

  __device__ __forceinline__ unsigned char* tile(int step) {
    return shared + at.tiles + (group * 2 + step % 2) * kItemTile;
  }
  __device__ __forceinline__ unsigned char* factor(int step) { return shared + at.factors + step % 2 * kFactorTile; }
  // Eight of a thread's 16 numbers of dx.
  __device__ __forceinline__ unsigned char* log(int parity, int level, int half) {
    return shared + at.logs + (((parity * p.walk.levels + level) * 2 + half) * kGroupThreads + thread) * 16;
  }

  __device__ __forceinline__ void start_items(int64_t first) {
    first_item = first;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      items[half] = find_item(p.walk, tower, first_item + warp * 16 + lane / 4 + 8 * half);
  }

  // The step's tile, and what was published before, are there, and nobody reads the step before any more.
  __device__ __forceinline__ void advance() {
    copy_async_wait<0>();
    fence_async_proxy();
    named_barrier(1 + group, kGroupThreads);
  }

  // value [64 items, 32 columns] as the factor of this step's outer product.
  __device__ __forceinline__ void publish(const float (&value)[16]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = warp * 16 + lane / 4 + 8 * half;
        *reinterpret_cast<uint32_t*>(factor(used) + swizzled_half(row, j) + lane % 4 * 4) =
            pack2<T>(value[4 * j + 2 * half], value[4 * j + 2 * half + 1]);
      }
    }
  }

  // value [64 items, 32] += tile · slice [32 columns, 64]ᵀ
  __device__ __forceinline__ void inner(float (&value)[16], const unsigned char* slice) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      wgmma_64x32x16<T>(value, wgmma_operand(tile(used), 32 * step), wgmma_operand(slice, 32 * step));
    wgmma_commit();
    wgmma_wait(value);
  }

  // sums[slot] [64, 32] += tileᵀ · factor
  __device__ __forceinline__ void outer(int slot) {
    float sum[16] = {};
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      wgmma_64x32x16<T, true, true>(sum, wgmma_operand(tile(used), 2048 * step),
                                    wgmma_operand_half(factor(used), 1024 * step));
    wgmma_commit();
    wgmma_wait(sum);
    // Registers have no run-time index: one of these is taken.
#pragma unroll
    for (int l = 0; l < kMaxSlots; ++l) {
      if (l != slot) continue;
#pragma unroll
      for (int i = 0; i < 16; ++i) sums[l][i] += sum[i];
    }
  }

  // Eight neighbouring numbers of one of the thread's two items.
  __device__ __forceinline__ void unpack_half(const Raw8& raw, float (&value)[16], int half) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      value[4 * j + 2 * half] = low_half<T>(raw.words[j]);
      value[4 * j + 2 * half + 1] = high_half<T>(raw.words[j]);
    }
  }

  __device__ __forceinline__ void go_down(int parity) {
    const int levels = p.walk.levels, slots = levels + p.walk.parts;
    Base::fetch(tile(used), slots - 1);
    float value[16] = {};  // dx, which the head's slots begin
    for (int slot = slots - 1; slot >= 0; --slot, ++used) {
      advance();
      if (slot > 0) Base::fetch(tile(used + 1), slot - 1);
      inner(value, shared + at.slices + slot * kSlice);
      if (slot >= levels) continue;
      float keep = tower.coefficients[slot * kCoefficients];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Raw8 dx;
#pragma unroll
        for (int j = 0; j < 4; ++j) dx.words[j] = pack2<T>(value[4 * j + 2 * half], value[4 * j + 2 * half + 1]);
        store16(log(parity, slot, half), dx);
      }
#pragma unroll
      for (float& v : value) v *= keep;
    }
  }

  __device__ __forceinline__ const unsigned char* state_of(const Source& source, const Item& item, int level) const {
    int64_t element = (item.row * p.walk.levels + level) * tower.width + first_column;
    return source.states + element * element_size(source.kind);
  }

  // The states of the next level, while this one's products run: registers for them would be too many.
  __device__ __forceinline__ void prefetch_states(int level) {
    for (int s = 0; s < tower.source_count; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (items[half].flags >> s & 1) prefetch(state_of(tower.sources[s], items[half], level));
    }
  }

  // value ← α₀·value + Σ α·states, and ⟨dx, ·⟩ of each term.
  __device__ __forceinline__ void mix(float (&value)[16], int parity, int level) {
    const float* coefficients = tower.coefficients + level * kCoefficients;
    float dx[16], along = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) unpack_half(load16(log(parity, level, half)), dx, half);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      along += dx[i] * value[i];
      value[i] *= coefficients[0];
    }
    Base::add_coefficient(along, level, 0);
#pragma unroll
    for (int s = 0; s < kMaxSources; ++s) {
      if (s >= tower.source_count) continue;
      const Source& source = tower.sources[s];
      along = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!(items[half].flags >> s & 1)) continue;
        float scale = source.scales ? source.scales[items[half].row * p.walk.levels + level] : 1.0f, c[8];
        unpack8(load_state8(state_of(source, items[half], level), source.kind), source.kind, c);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          int place = i / 2 * 4 + 2 * half + i % 2;
          float state = c[i] * scale;
          along += dx[place] * state;
          value[place] += coefficients[1 + s] * state;
        }
      }
      Base::add_coefficient(along, level, 1 + s);
    }
  }

  __device__ __forceinline__ void go_up(int parity, bool bias) {
    const int levels = p.walk.levels, slots = levels + p.walk.parts;
    Base::fetch(tile(used), 0);
    prefetch_states(0);
    float value[16] = {};  // what the level below hands on but for its activations, then x likewise
    for (int slot = 0; slot < slots; ++slot, ++used) {
      if (slot < levels) mix(value, parity, slot);
      publish(value);
      advance();
      if (slot + 1 < slots) Base::fetch(tile(used + 1), slot + 1);
      if (slot + 1 < levels) prefetch_states(slot + 1);
      if (bias) Base::add_bias(tile(used), slot);
      outer(slot);
      if (slot >= levels) continue;
      const float* up_bias = tower.up_bias + slot * tower.width + first_column;
#pragma unroll
      for (int i = 0; i < 16; ++i) value[i] += up_bias[i / 4 * 2 + i % 2];
    }
  }
};

// The 32 columns' rows of W_downᵀ and W_headᵀ, in the order in which the matrix unit holds them.
__device__ __forceinline__ void load_slices(const WeightGradient& p, const Share& share, unsigned char* shared,
                                            const Layout& at) {
  const int panels = p.walk.towers[share.tower].width / kTile, slots = p.walk.levels + p.walk.parts;
  for (int i = threadIdx.x; i < slots * kGradientColumns * 8; i += kThreads) {
    int slot = i / (kGradientColumns * 8), row = i / 8 % kGradientColumns, part = i % 8;
    // These columns' panel, and the row of its tiles' 64.
    const int panel = share.chunk / 2, from = swizzled(share.chunk % 2 * kGradientColumns + memory_column(row), part);
    copy_async_16(shared + at.slices + slot * kSlice + swizzled(row, part),
                  p.transposed_tiles[share.tower] + (int64_t(slot) * panels + panel) * kTileBytes + from);
  }
  copy_async_commit();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) weight_gradient_hopper(const __grid_constant__ WeightGradient p) {
  if constexpr (!kHopper) {
    device_fail("side_network: the Hopper path needs a build with sm_90a code, architecture", 90);
  } else {
    const Share share(p);
    const Tower& tower = p.walk.towers[share.tower];
    if (share.chunk * kGradientColumns >= tower.width) return;
    const int levels = p.walk.levels, slots = levels + p.walk.parts;
    unsigned char* shared = shared_memory();
    trap_unless(shared_address(shared) % 1024 == 0);  // the swizzle is one of addresses
    const Layout at(levels, p.walk.parts);
    Direction<T> own(p, tower, shared, at, share.chunk);
    load_slices(p, share, shared, at);
    own.zero_sums();
    copy_async_wait<0>();
    fence_async_proxy();
    named_barrier(0, kThreads);

    int64_t blocks = (p.walk.items + kItems - 1) / kItems;
    int turn = 0;
    for (int64_t block = share.split; block < blocks + p.splits; block += p.splits, ++turn) {
      if (own.group == 0) {
        if (block < blocks) {
          own.start_items(block * kItems);
          own.go_down(turn % 2);
        }
      } else if (turn > 0) {
        own.start_items((block - p.splits) * kItems);
        own.go_up((turn - 1) % 2, share.chunk == 0);
      }
      named_barrier(0, kThreads);  // the log of the way down is there; that of the way up is free
    }

    float* partial = p.partial[share.tower] + share.split * Partial(slots, tower.width).total;
#pragma unroll
    for (int slot = 0; slot < kMaxSlots; ++slot) {
      if (own.group == 0 || slot >= slots) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = own.warp * 16 + own.lane / 4 + 8 * half;
        float* place = partial + (int64_t(slot) * kRank + row) * tower.width + own.first_column;
        const float* sum = own.sums[slot] + 2 * half;
        add_or_store(place, Four{{sum[0], sum[1], sum[4], sum[5]}}, p.accumulate);
        add_or_store(place + 4, Four{{sum[8], sum[9], sum[12], sum[13]}}, p.accumulate);
      }
    }
    own.write_sums(share);
  }
}

}  // namespace

size_t weight_gradient_hopper_shared(int levels, int parts) { return Layout(levels, parts).small.total; }

int launch_weight_gradient_hopper(const WeightGradient& p, int kind, void* stream) {
  size_t shared = weight_gradient_hopper_shared(p.walk.levels, p.walk.parts);
  return kind == kBFloat16
             ? launch(weight_gradient_hopper<bfloat16>, gradient_blocks(p), kThreads, shared, stream, 1, p)
             : launch(weight_gradient_hopper<half16>, gradient_blocks(p), kThreads, shared, stream, 1, p);
}

}  // namespace crossan_fast
