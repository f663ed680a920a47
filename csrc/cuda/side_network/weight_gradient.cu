// Σ dz ⊗ x and the gates' ⟨dx, ·⟩ (side_network.h says why 32 columns of a tower can be computed alone): a block keeps
// the sums of all slots, [64, 32] each, in its registers while it streams its share of the items in blocks of 64. Per
// block of items it goes down the slots with dx and up again with x, both in registers as the matrix unit holds them;
// tiles of dz come from memory one step ahead of use. No atomics: each split of the items writes its own partial sums.
#include "weight_gradient.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = kGradientThreads, kItems = kGradientItems;

// Offsets into shared memory.
struct Layout {
  int slices, tiles, factors, log;
  SmallSums<kThreads> small;
  __host__ __device__ constexpr Layout(int levels, int parts)
      : slices(0),
        tiles((levels + parts) * kSlice),
        factors(tiles + 2 * kItemTile),
        log(factors + 2 * kFactorTile),
        small(log + levels * kThreads * 16, levels, parts) {}
};

// A warp holds 16 items × 16 columns as two 16 × 8 accumulators: value[4·j + 2·half + e] is item
// lane / 4 + 8·half. The columns of the two are interleaved, so that the four of an item are neighbours in
// memory: column 4·(lane % 4) + 2·j + e. The matrix unit's n-th column is memory's memory_column(n).
__device__ __forceinline__ int memory_column(int n) { return n % 8 / 2 * 4 + n / 8 * 2 + n % 2; }

// Cached states of a warp's 16 items × 16 columns.
struct Loads {
  uint32_t raw[kMaxSources][2][2];
  float scale[kMaxSources][2];

  __device__ __forceinline__ void start(const Tower& tower, int levels, const Item (&items)[2], int level, int column) {
#pragma unroll
    for (int s = 0; s < kMaxSources; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        raw[s][half][0] = raw[s][half][1] = 0;
        scale[s][half] = 1.0f;
        if (s >= tower.source_count || !(items[half].flags >> s & 1)) continue;
        const Source& source = tower.sources[s];
        int64_t line = items[half].row * levels + level;
        auto* from = reinterpret_cast<const uint32_t*>(source.states +
                                                       (line * tower.width + column) * element_size(source.kind));
        raw[s][half][0] = from[0];
        if (source.kind <= kBFloat16) raw[s][half][1] = from[1];
        if (source.scales) scale[s][half] = source.scales[line];
      }
    }
  }

  __device__ __forceinline__ void unpack(int s, int half, int kind, float (&values)[8]) const {
    Raw8 all = {{raw[s][half][0], raw[s][half][1], 0, 0}};
    unpack8(all, kind, values);  // the first four
  }
};

template <class T>
struct Block : ItemGroup<T, kThreads> {
  using Base = ItemGroup<T, kThreads>;
  using Base::p, Base::tower, Base::shared, Base::lane, Base::warp, Base::first_item;
  const Layout at;
  int item_row, column_half, first_column;
  Item items[2];
  float sums[kMaxSlots][8] = {};

  __device__ Block(const WeightGradient& p, const Tower& tower, unsigned char* shared, const Layout& at, int chunk)
      : Base(p, tower, shared, at.small),
        at(at),
        item_row(warp % 4 * 16),
        column_half(warp / 4 * 16),
        first_column(chunk * kGradientColumns + column_half + lane % 4 * 4) {}

  __device__ __forceinline__ void load_weights(const Share& share) {
    const int panels = tower.width / kTile, slots = p.walk.levels + p.walk.parts;
    // These columns' panel, and which half of its tiles' rows.
    const int panel = share.chunk / 2, half = share.chunk % 2 * kSlice;
    for (int i = threadIdx.x; i < slots * (kSlice / 16); i += kThreads) {
      int slot = i / (kSlice / 16), byte = i % (kSlice / 16) * 16;
      int64_t from = (int64_t(slot) * panels + panel) * kTileBytes + half + byte;
      copy_async_16(shared + at.slices + slot * kSlice + byte, p.transposed_tiles[share.tower] + from);
    }
  }

  // Down the slots and up again.
  __device__ __forceinline__ void fetch_step(int step) {
    const int slots = p.walk.levels + p.walk.parts;
    if (step < 2 * slots)
      Base::fetch(tile(step), step < slots ? slots - 1 - step : step - slots);
    else
      copy_async_commit();
  }
  __device__ __forceinline__ unsigned char* tile(int step) { return shared + at.tiles + step % 2 * kItemTile; }
  __device__ __forceinline__ unsigned char* factor(int step) { return shared + at.factors + step % 2 * kFactorTile; }

  // The step's tile, and what was published before, are there, and nobody reads the step before any more.
  __device__ __forceinline__ void advance(int step) {
    copy_async_wait<0>();
    __syncthreads();
    fetch_step(step + 1);
  }

  // value [16 items, 16 columns] as a factor of the weight gradients, for every warp to read.
  __device__ __forceinline__ void publish(const float (&value)[8], int step) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = item_row + lane / 4 + 8 * half, column = column_half + 8 * j + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(factor(step) + swizzled_half(row, column / 8) + column % 8 * 2) =
            pack2<T>(value[4 * j + 2 * half], value[4 * j + 2 * half + 1]);
      }
    }
  }

  // sums[slot] [64, 32] += tile [items, 64]ᵀ · factor [items, 32]; the warp's part: 16 rows, 16 columns.
  __device__ __forceinline__ void outer(int slot, int step) {
    float sum[8] = {};
#pragma unroll
    for (int k = 0; k < kItems; k += 16) {
      uint32_t a[4], b[4];
      ldmatrix_x4_trans(a, tile(step) + swizzled(k + lane / 16 * 8 + lane % 8, item_row / 8 + lane / 8 % 2));
      ldmatrix_x4_trans(b, factor(step) + swizzled_half(k + lane / 8 % 2 * 8 + lane % 8, column_half / 8 + lane / 16));
      mma_16x8x16<T>(sum, a, b[0], b[1]);
      mma_16x8x16<T>(sum + 4, a, b[2], b[3]);
    }
    // Registers have no run-time index: one of these is taken.
#pragma unroll
    for (int l = 0; l < kMaxSlots; ++l) {
      if (l != slot) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[l][i] += sum[i];
    }
  }

  // value += tile [items, 64] · slice [32 columns, 64]ᵀ; the warp's part: its items, its columns.
  __device__ __forceinline__ void inner(float (&value)[8], const unsigned char* tile, const unsigned char* slice) {
#pragma unroll
    for (int k = 0; k < kRank / 16; ++k) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, tile + swizzled(item_row + lane % 16, 2 * k + lane / 16));
      int row = column_half + memory_column(lane % 8 + lane / 16 * 8);
      ldmatrix_x4(b, slice + swizzled(row, 2 * k + lane / 8 % 2));
      mma_16x8x16<T>(value, a, b[0], b[1]);
      mma_16x8x16<T>(value + 4, a, b[2], b[3]);
    }
  }

  __device__ __forceinline__ uint32_t* log(int level) {
    return reinterpret_cast<uint32_t*>(shared + at.log) + level * 4 * kThreads + threadIdx.x;
  }

  // value ← α₀·value + Σ α·states, and ⟨dx, ·⟩ of each term.
  __device__ __forceinline__ void mix(float (&value)[8], const Loads& loads, int level) {
    const float* coefficients = tower.coefficients + level * kCoefficients;
    float dx[8], along = 0;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t logged = log(level)[pair * kThreads];
      dx[2 * pair] = low_half<T>(logged);
      dx[2 * pair + 1] = high_half<T>(logged);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      along += dx[i] * value[i];
      value[i] *= coefficients[0];
    }
    Base::add_coefficient(along, level, 0);
#pragma unroll
    for (int s = 0; s < kMaxSources; ++s) {
      if (s >= tower.source_count) continue;
      along = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float c[8];
        loads.unpack(s, half, tower.sources[s].kind, c);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int place = i / 2 * 4 + 2 * half + i % 2;
          float state = c[i] * loads.scale[s][half];
          along += dx[place] * state;
          value[place] += coefficients[1 + s] * state;
        }
      }
      Base::add_coefficient(along, level, 1 + s);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) weight_gradient(const __grid_constant__ WeightGradient p) {
  const Share share(p);
  const Tower& tower = p.walk.towers[share.tower];
  if (share.chunk * kGradientColumns >= tower.width) return;
  const int levels = p.walk.levels, slots = levels + p.walk.parts;
  unsigned char* shared = shared_memory();
  const Layout at(levels, p.walk.parts);
  Block<T> block(p, tower, shared, at, share.chunk);
  block.load_weights(share);
  block.zero_sums();

  int64_t item_blocks = (p.walk.items + kItems - 1) / kItems;
  for (int64_t item_block = share.split; item_block < item_blocks; item_block += p.splits) {
    block.first_item = item_block * kItems;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      block.items[half] = find_item(p.walk, tower, block.first_item + block.item_row + block.lane / 4 + 8 * half);
    __syncthreads();  // nobody reads the last block's tiles any more
    block.fetch_step(0);
    float value[8] = {};
    int step = 0;

    // Down the slots with value = dx, which the head's begin.
    for (int slot = slots - 1; slot >= 0; --slot) {
      block.advance(step);
      block.inner(value, block.tile(step), shared + at.slices + slot * kSlice);
      if (slot < levels) {
        float keep = tower.coefficients[slot * kCoefficients];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          block.log(slot)[pair * kThreads] = pack2<T>(value[2 * pair], value[2 * pair + 1]);
          value[2 * pair] *= keep;
          value[2 * pair + 1] *= keep;
        }
      }
      ++step;
    }

    // Up again with value = what the level below hands on but for its activations, then x likewise.
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = 0;
    Loads loads;
    loads.start(tower, levels, block.items, 0, block.first_column);
    for (int slot = 0; slot < slots; ++slot) {
      if (slot < levels) {
        block.mix(value, loads, slot);
        if (slot + 1 < levels) loads.start(tower, levels, block.items, slot + 1, block.first_column);
      }
      block.publish(value, step);
      block.advance(step);
      block.outer(slot, step);
      if (share.chunk == 0) block.add_bias(block.tile(step), slot);
      if (slot < levels) {
        const float* bias = tower.up_bias + slot * tower.width + block.first_column;
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] += bias[i / 4 * 2 + i % 2];
      }
      ++step;
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  float* partial = p.partial[share.tower] + share.split * Partial(slots, tower.width).total;
#pragma unroll
  for (int slot = 0; slot < kMaxSlots; ++slot) {
    if (slot >= slots) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = block.item_row + block.lane / 4 + 8 * half;
      int64_t place = (int64_t(slot) * kRank + row) * tower.width + block.first_column;
      const float* sum = block.sums[slot] + 2 * half;
      add_or_store(partial + place, Four{{sum[0], sum[1], sum[4], sum[5]}}, p.accumulate);
    }
  }
  block.write_sums(share);
}

}  // namespace

size_t weight_gradient_shared(int levels, int parts) { return Layout(levels, parts).small.total; }

int launch_weight_gradient(const WeightGradient& p, int kind, void* stream) {
  size_t shared = weight_gradient_shared(p.walk.levels, p.walk.parts);
  return kind == kBFloat16 ? launch(weight_gradient<bfloat16>, gradient_blocks(p), kThreads, shared, stream, 1, p)
                           : launch(weight_gradient<half16>, gradient_blocks(p), kThreads, shared, stream, 1, p);
}

}  // namespace crossan_fast
