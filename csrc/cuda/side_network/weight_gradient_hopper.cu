// The weight gradients for Hopper: as weight_gradient.cu, with wgmma, and with the two directions
// in a warpgroup each: while one takes a block of 64 items down the levels with dh, the other takes the block
// before it up again with x. Each keeps one matrix's gradients of all levels, [64, 32], in registers. What the
// way up needs of the way down, dx, is handed over in shared memory, one of two logs, once a block of items.
#include "side_network.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = 256, kGroupThreads = 128, kItems = 64;
constexpr int kSlice = kGradientColumns * 128;  // bytes: 32 rows of W_up, or of W_downᵀ, of one level
constexpr int kItemTile = kItems * 128;         // bytes: 64 items × 64, act(z) or dz
constexpr int kFactorTile = kItems * kGradientColumns * 2;

// Offsets into shared memory; tiles and factors are two stages for each direction.
struct Layout {
  int up, down, tiles, factors, logs, coefficient_sums, up_bias_sums, down_bias_sums, total;
  __host__ __device__ constexpr explicit Layout(int levels)
      : up(0),
        down(up + levels * kSlice),
        tiles(down + levels * kSlice),
        factors(tiles + 8 * kItemTile),
        logs(factors + 4 * kFactorTile),
        coefficient_sums(logs + 2 * levels * kGroupThreads * 32),
        up_bias_sums(coefficient_sums + levels * kCoefficients * 32 * 4),
        down_bias_sums(up_bias_sums + levels * 4 * kGradientColumns * 4),
        total(down_bias_sums + levels * kGroupThreads * 4) {}
};

// A thread holds, of two items (lane / 4 and that + 8 of its warp's 16), 8 neighbouring columns: value[4·j +
// 2·half + e] is column 8·(lane % 4) + 2·j + e. So the matrix unit's n-th column is memory's memory_column(n).
__device__ __forceinline__ int memory_column(int n) { return n % 8 / 2 * 8 + n / 8 * 2 + n % 2; }

template <class T>
struct Direction {
  const WeightGradient& p;
  const Tower& tower;
  unsigned char* shared;
  const Layout at;
  const int group, thread, lane, warp, first_column;  // group 0 goes down, 1 up
  int64_t first_item = 0;
  int used = 0;  // steps so far, whose parity is the stage
  Item items[2];
  float sums[kMaxLevels][16] = {};

  __device__ Direction(const WeightGradient& p, const Tower& tower, unsigned char* shared, int chunk)
      : p(p),
        tower(tower),
        shared(shared),
        at(p.walk.levels),
        group(threadIdx.x / kGroupThreads),
        thread(threadIdx.x % kGroupThreads),
        lane(threadIdx.x % 32),
        warp(thread / 32),
        first_column(chunk * kGradientColumns + lane % 4 * 8) {}

  // act(z) in the first tile of a stage, dz in the second.
  __device__ __forceinline__ unsigned char* tile(int step, int which) {
    return shared + at.tiles + ((group * 2 + step % 2) * 2 + which) * kItemTile;
  }
  __device__ __forceinline__ unsigned char* factor(int step) {
    return shared + at.factors + (group * 2 + step % 2) * kFactorTile;
  }
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

  // act(z) and dz of a level, into the stage of step `step`.
  __device__ __forceinline__ void fetch(int step, int level) {
    for (int i = thread; i < kItems * 8; i += kGroupThreads) {
      int row = i / 8, chunk = i % 8;
      int64_t index = first_item + row;
      bool valid = index < p.walk.items;
      int64_t source = valid ? 2 * ((index * p.walk.levels + level) * kRank + chunk * 8) : 0;
      copy_async_16(tile(step, 0) + swizzled(row, chunk), tower.activated + source, valid);
      copy_async_16(tile(step, 1) + swizzled(row, chunk), tower.bottleneck_grad + source, valid);
    }
    copy_async_commit();
  }

  // value [64 items, 32 columns] as the factor of this step's outer product; the step's tiles have come.
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
    copy_async_wait<0>();
    fence_async_proxy();
    named_barrier(1 + group, kGroupThreads);  // and nobody reads the step before any more
  }

  // sums[level] [64, 32] += outerᵀ · factor,  value [64 items, 32] += inner · slice [32 columns, 64]ᵀ
  __device__ __forceinline__ void products(int level, float (&value)[16], const unsigned char* outer,
                                           const unsigned char* inner, const unsigned char* slice) {
    float sum[16] = {};
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma_64x32x16<T>(value, wgmma_operand(inner, 32 * step), wgmma_operand(slice, 32 * step));
      wgmma_64x32x16<T, true, true>(sum, wgmma_operand(outer, 2048 * step),
                                    wgmma_operand_half(factor(used), 1024 * step));
    }
    wgmma_commit();
    wgmma_wait(value, sum);
    // Registers have no run-time index: one of these is taken.
#pragma unroll
    for (int l = 0; l < kMaxLevels; ++l) {
      if (l != level) continue;
#pragma unroll
      for (int i = 0; i < 16; ++i) sums[l][i] += sum[i];
    }
    ++used;
  }

  // Eight neighbouring numbers of each of the thread's two items.
  __device__ __forceinline__ void load_grad(float (&value)[16]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Raw8 raw = {};
      int64_t index = first_item + warp * 16 + lane / 4 + 8 * half;
      if (items[half].flags & kExists) raw = load16(tower.grad + 2 * (index * tower.width + first_column));
      unpack_half(raw, value, half);
    }
  }
  __device__ __forceinline__ void unpack_half(const Raw8& raw, float (&value)[16], int half) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      value[4 * j + 2 * half] = low_half<T>(raw.words[j]);
      value[4 * j + 2 * half + 1] = high_half<T>(raw.words[j]);
    }
  }

  // Σ over items of dh, the gradient of b_up; one slot a warp and column.
  __device__ __forceinline__ void add_up_bias(const float (&dh)[16], int level) {
    auto* slots = reinterpret_cast<float*>(shared + at.up_bias_sums) + (level * 4 + warp) * kGradientColumns;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float sum = dh[i / 2 * 4 + i % 2] + dh[i / 2 * 4 + 2 + i % 2];
      sum += shuffle_xor(sum, 4);
      sum += shuffle_xor(sum, 8);
      sum += shuffle_xor(sum, 16);
      if (lane < 4) slots[lane * 8 + i] += sum;
    }
  }

  // Σ over items of dz, the gradient of b_down: a thread takes 32 items of one column.
  __device__ __forceinline__ void add_down_bias(int level) {
    int column = thread % kRank, first = thread / kRank * 32;
    const unsigned char* dz = tile(used, 1);
    float sum = 0;
    for (int row = first; row < first + 32; ++row)
      sum += to_float(*reinterpret_cast<const T*>(dz + swizzled(row, column / 8) + column % 8 * 2));
    reinterpret_cast<float*>(shared + at.down_bias_sums)[level * kGroupThreads + thread] += sum;
  }

  __device__ __forceinline__ void add_coefficient(float value, int level, int which) {
    value += shuffle_xor(value, 8);
    value += shuffle_xor(value, 16);
    auto* slots = reinterpret_cast<float*>(shared + at.coefficient_sums);
    if (lane < 8) slots[(level * kCoefficients + which) * 32 + warp * 8 + lane] += value;
  }

  __device__ __forceinline__ void go_down(int parity) {
    const int levels = p.walk.levels;
    fetch(used, levels - 1);
    float value[16];
    load_grad(value);
    for (int level = levels - 1; level >= 0; --level) {
      publish(value);
      if (level > 0) fetch(used + 1, level - 1);
      add_up_bias(value, level);
      products(level, value, tile(used, 0), tile(used, 1), shared + at.down + level * kSlice);  // dx
      float keep = tower.coefficients[level * kCoefficients];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Raw8 dx;
#pragma unroll
        for (int j = 0; j < 4; ++j) dx.words[j] = pack2<T>(value[4 * j + 2 * half], value[4 * j + 2 * half + 1]);
        store16(log(parity, level, half), dx);
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
    add_coefficient(along, level, 0);
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
      add_coefficient(along, level, 1 + s);
    }
  }

  __device__ __forceinline__ void go_up(int parity, bool bias) {
    const int levels = p.walk.levels;
    fetch(used, 0);
    prefetch_states(0);
    float value[16] = {};  // h of the level below, then x, then h
    for (int level = 0; level < levels; ++level) {
      mix(value, parity, level);
      publish(value);
      if (level + 1 < levels) {
        fetch(used + 1, level + 1);
        prefetch_states(level + 1);
      }
      if (bias) add_down_bias(level);
      const float* up_bias = tower.up_bias + level * tower.width + first_column;
#pragma unroll
      for (int i = 0; i < 16; ++i) value[i] += up_bias[i / 4 * 2 + i % 2];
      products(level, value, tile(used, 1), tile(used, 0), shared + at.up + level * kSlice);
    }
  }
};

// The 32 columns' rows of W_up and of W_downᵀ, in the order in which the matrix unit holds them.
__device__ __forceinline__ void load_slices(const WeightGradient& p, int tower_index, int chunk, unsigned char* shared,
                                            const Layout& at) {
  const Tower& tower = p.walk.towers[tower_index];
  const int tiles = tower.width / kTile, levels = p.walk.levels;
  for (int i = threadIdx.x; i < levels * kGradientColumns * 8; i += kThreads) {
    int level = i / (kGradientColumns * 8), row = i / 8 % kGradientColumns, part = i % 8;
    // Second-product tile of these columns, and the row of its 64.
    int64_t tile = tiles + chunk / 2;
    int from = swizzled(chunk % 2 * kGradientColumns + memory_column(row), part);
    int to = level * kSlice + swizzled(row, part);
    copy_async_16(shared + at.up + to, tower.weights + (int64_t(level) * 2 * tiles + tile) * kTileBytes + from);
    copy_async_16(shared + at.down + to,
                  p.backward_tiles[tower_index] + (int64_t(levels - 1 - level) * 2 * tiles + tile) * kTileBytes + from);
  }
  copy_async_commit();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) weight_gradient_hopper(const __grid_constant__ WeightGradient p) {
  if constexpr (!kHopper) {
    device_fail("side_network: the Hopper path needs a build with sm_90a code, architecture", 90);
  } else {
    int chunks = p.walk.max_width / kGradientColumns;
    int chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
    int tower_index = rest % p.walk.tower_count, split = rest / p.walk.tower_count;
    const Tower& tower = p.walk.towers[tower_index];
    if (chunk * kGradientColumns >= tower.width) return;
    const int levels = p.walk.levels;
    unsigned char* shared = shared_memory();
    trap_unless(shared_address(shared) % 1024 == 0);  // the swizzle is one of addresses
    Direction<T> own(p, tower, shared, chunk);
    const Layout at = own.at;
    load_slices(p, tower_index, chunk, shared, at);
    for (int i = at.coefficient_sums / 4 + threadIdx.x; i < at.total / 4; i += kThreads)
      reinterpret_cast<float*>(shared)[i] = 0;
    copy_async_wait<0>();
    fence_async_proxy();
    named_barrier(0, kThreads);

    int64_t blocks = (p.walk.items + kItems - 1) / kItems;
    int turn = 0;
    for (int64_t block = split; block < blocks + p.splits; block += p.splits, ++turn) {
      if (own.group == 0) {
        if (block < blocks) {
          own.start_items(block * kItems);
          own.go_down(turn % 2);
        }
      } else if (turn > 0) {
        own.start_items((block - p.splits) * kItems);
        own.go_up((turn - 1) % 2, chunk == 0);
      }
      named_barrier(0, kThreads);  // the log of the way down is there; that of the way up is free
    }

    float* partial = p.partial[tower_index] + split * partial_floats(levels, tower.width);
    const int64_t matrix = int64_t(levels) * kRank * tower.width;
    float* target = partial + (own.group == 0 ? matrix : 0);  // ∂W_upᵀ comes of the way down
#pragma unroll
    for (int level = 0; level < kMaxLevels; ++level) {
      if (level >= levels) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = own.warp * 16 + own.lane / 4 + 8 * half;
        float* place = target + (int64_t(level) * kRank + row) * tower.width + own.first_column;
        const float* sum = own.sums[level] + 2 * half;
        add_or_store(place, Four{{sum[0], sum[1], sum[4], sum[5]}}, p.accumulate);
        add_or_store(place + 4, Four{{sum[8], sum[9], sum[12], sum[13]}}, p.accumulate);
      }
    }
    float *down_bias = partial + 2 * matrix, *up_bias = down_bias + levels * kRank;
    const auto* up_sums = reinterpret_cast<const float*>(shared + at.up_bias_sums);
    for (int i = threadIdx.x; i < levels * kGradientColumns; i += kThreads) {
      int level = i / kGradientColumns, column = i % kGradientColumns;
      float sum = 0;
      for (int w = 0; w < 4; ++w) sum += up_sums[(level * 4 + w) * kGradientColumns + column];
      add_or_store(up_bias + level * tower.width + chunk * kGradientColumns + column, sum, p.accumulate);
    }
    if (chunk == 0) {
      const auto* down_sums = reinterpret_cast<const float*>(shared + at.down_bias_sums);
      for (int i = threadIdx.x; i < levels * kRank; i += kThreads) {
        int place = i / kRank * kGroupThreads + i % kRank;
        add_or_store(down_bias + i, down_sums[place] + down_sums[place + kRank], p.accumulate);
      }
    }
    const auto* sums = reinterpret_cast<const float*>(shared + at.coefficient_sums);
    float* coefficients = p.coefficient_partial[tower_index] +
                          (split * (tower.width / kGradientColumns) + chunk) * levels * kCoefficients;
    for (int i = threadIdx.x; i < levels * kCoefficients; i += kThreads) {
      float sum = 0;
      for (int slot = 0; slot < 32; ++slot) sum += sums[i * 32 + slot];
      add_or_store(coefficients + i, sum, p.accumulate);
    }
  }
}

}  // namespace

size_t weight_gradient_hopper_shared(int levels) { return Layout(levels).total; }

int launch_weight_gradient_hopper(const WeightGradient& p, int kind, void* stream) {
  unsigned blocks = p.splits * p.walk.tower_count * (p.walk.max_width / kGradientColumns);
  size_t shared = weight_gradient_hopper_shared(p.walk.levels);
  return kind == kBFloat16 ? launch(weight_gradient_hopper<bfloat16>, blocks, kThreads, shared, stream, 1, p)
                           : launch(weight_gradient_hopper<half16>, blocks, kThreads, shared, stream, 1, p);
}

}  // namespace crossan_fast
