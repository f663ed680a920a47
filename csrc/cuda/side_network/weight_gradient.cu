// The weight gradients (side_network.h says why 32 columns of a tower can be computed alone): a block keeps
// ∂W_down and ∂W_upᵀ of all levels, [64, 32] each, in its registers while it streams its share of the items in
// blocks of 64. Per block of items it goes down the levels with dh and up again with x, both in registers as
// the matrix unit holds them; tiles of act(z) and dz come from memory two steps ahead of nothing, one ahead
// of use. No atomics: each split of the items writes its own partial sums.
#include "side_network.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = 256, kItems = 64;
constexpr int kSlice = kGradientColumns * 128;  // bytes: 32 rows of W_up, or of W_downᵀ, of one level
constexpr int kItemTile = kItems * 128;         // bytes: 64 items × 64, act(z) or dz
constexpr int kFactorTile = kItems * kGradientColumns * 2;

// Offsets into shared memory.
struct Layout {
  int up, down, tiles, factors, log, coefficient_sums, up_bias_sums, down_bias_sums, total;
  __host__ __device__ constexpr explicit Layout(int levels)
      : up(0),
        down(up + levels * kSlice),
        tiles(down + levels * kSlice),
        factors(tiles + 4 * kItemTile),
        log(factors + 2 * kFactorTile),
        coefficient_sums(log + levels * kThreads * 16),
        up_bias_sums(coefficient_sums + levels * kCoefficients * 64 * 4),
        down_bias_sums(up_bias_sums + levels * 8 * 16 * 4),
        total(down_bias_sums + levels * kThreads * 4) {}
};

// A warp holds 16 items × 16 columns as two 16 × 8 accumulators: value[4·j + 2·half + e] is item
// lane / 4 + 8·half. The columns of the two are interleaved, so that the four of an item are neighbours in
// memory: column 4·(lane % 4) + 2·j + e. The matrix unit's n-th column is memory's memory_column(n).
__device__ __forceinline__ int memory_column(int n) { return n % 8 / 2 * 4 + n / 8 * 2 + n % 2; }

template <class T>
struct Block {
  const WeightGradient& p;
  const Tower& tower;
  unsigned char* shared;
  const Layout at;
  int lane, warp, item_row, column_half, first_column;
  Item items[2];
  int64_t first_item;
  float sum_up[kMaxLevels][8] = {}, sum_down[kMaxLevels][8] = {};

  __device__ Block(const WeightGradient& p, const Tower& tower, unsigned char* shared, int chunk)
      : p(p),
        tower(tower),
        shared(shared),
        at(p.walk.levels),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        item_row(warp % 4 * 16),
        column_half(warp / 4 * 16),
        first_column(chunk * kGradientColumns + column_half + lane % 4 * 4),
        first_item(0) {}

  __device__ __forceinline__ void load_weights(int tower_index, int chunk) {
    int tiles = tower.width / kTile, levels = p.walk.levels;
    // Second-product tile of these columns, and which half of its rows.
    int tile = tiles + chunk / 2, half = chunk % 2 * kSlice;
    for (int i = threadIdx.x; i < levels * (kSlice / 16); i += kThreads) {
      int level = i / (kSlice / 16), byte = i % (kSlice / 16) * 16;
      int64_t forward = (int64_t(level) * 2 * tiles + tile) * kTileBytes + half + byte;
      int64_t backward = (int64_t(levels - 1 - level) * 2 * tiles + tile) * kTileBytes + half + byte;
      copy_async_16(shared + at.up + level * kSlice + byte, tower.weights + forward);
      copy_async_16(shared + at.down + level * kSlice + byte, p.backward_tiles[tower_index] + backward);
    }
  }

  __device__ __forceinline__ int step_level(int step) const {
    return step < p.walk.levels ? p.walk.levels - 1 - step : step - p.walk.levels;
  }

  // act(z) and dz of the step's level, into the step's half of the tiles.
  __device__ __forceinline__ void fetch(int step) {
    if (step < 2 * p.walk.levels) {
      for (int i = threadIdx.x; i < kItems * 8; i += kThreads) {
        int row = i / 8, chunk = i % 8;
        int64_t index = first_item + row;
        bool valid = index < p.walk.items;
        int64_t source = valid ? 2 * ((index * p.walk.levels + step_level(step)) * kRank + chunk * 8) : 0;
        unsigned char* target = activated(step) + swizzled(row, chunk);
        copy_async_16(target, tower.activated + source, valid);
        copy_async_16(target + kItemTile, tower.bottleneck_grad + source, valid);
      }
    }
    copy_async_commit();
  }
  __device__ __forceinline__ unsigned char* activated(int step) { return shared + at.tiles + step % 2 * 2 * kItemTile; }
  __device__ __forceinline__ unsigned char* bottleneck_grad(int step) { return activated(step) + kItemTile; }
  __device__ __forceinline__ unsigned char* factor(int step) { return shared + at.factors + step % 2 * kFactorTile; }

  // value [16 items, 16 columns] as a factor of the weight gradients, for every warp to read.
  __device__ __forceinline__ void publish(const float (&value)[8], int step) {
    copy_async_wait<0>();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = item_row + lane / 4 + 8 * half, column = column_half + 8 * j + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(factor(step) + swizzled_half(row, column / 8) + column % 8 * 2) =
            pack2<T>(value[4 * j + 2 * half], value[4 * j + 2 * half + 1]);
      }
    }
    __syncthreads();  // the factor and the step's tiles are there, and nobody reads the step before any more
    fetch(step + 1);
  }

  // sums[level] [64, 32] += tile [items, 64]ᵀ · factor [items, 32]; the warp's part: 16 rows, 16 columns.
  __device__ __forceinline__ void outer(float (&sums)[kMaxLevels][8], int level, const unsigned char* tile, int step) {
    float sum[8] = {};
#pragma unroll
    for (int k = 0; k < kItems; k += 16) {
      uint32_t a[4], b[4];
      ldmatrix_x4_trans(a, tile + swizzled(k + lane / 16 * 8 + lane % 8, item_row / 8 + lane / 8 % 2));
      ldmatrix_x4_trans(b, factor(step) + swizzled_half(k + lane / 8 % 2 * 8 + lane % 8, column_half / 8 + lane / 16));
      mma_16x8x16<T>(sum, a, b[0], b[1]);
      mma_16x8x16<T>(sum + 4, a, b[2], b[3]);
    }
    // Registers have no run-time index: one of these is taken.
#pragma unroll
    for (int l = 0; l < kMaxLevels; ++l) {
      if (l != level) continue;
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

  // Four neighbouring 16-bit columns of an item, as the accumulators hold them.
  __device__ __forceinline__ void load_grad(float (&value)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t pairs[2] = {0, 0};
      if (items[half].flags & kExists) {
        int64_t index = first_item + item_row + lane / 4 + 8 * half;
        auto* source = reinterpret_cast<const uint32_t*>(tower.grad + 2 * (index * tower.width + first_column));
        pairs[0] = source[0], pairs[1] = source[1];
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        value[4 * j + 2 * half] = low_half<T>(pairs[j]);
        value[4 * j + 2 * half + 1] = high_half<T>(pairs[j]);
      }
    }
  }

  __device__ __forceinline__ uint32_t* log(int level) {
    return reinterpret_cast<uint32_t*>(shared + at.log) + level * 4 * kThreads + threadIdx.x;
  }

  // Σ over items of dh, the gradient of b_up; one slot a warp and column.
  __device__ __forceinline__ void add_up_bias(const float (&dh)[8], int level) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = dh[4 * j + e] + dh[4 * j + 2 + e];
        sum += shuffle_xor(sum, 4);
        sum += shuffle_xor(sum, 8);
        sum += shuffle_xor(sum, 16);
        if (lane < 4) {
          auto* slots = reinterpret_cast<float*>(shared + at.up_bias_sums) + (level * 8 + warp) * 16;
          slots[lane * 4 + 2 * j + e] += sum;
        }
      }
    }
  }

  // Σ over items of dz, the gradient of b_down: a thread takes 16 items of one column.
  __device__ __forceinline__ void add_down_bias(const unsigned char* tile, int level) {
    int column = threadIdx.x % kRank, first = threadIdx.x / kRank * 16;
    float sum = 0;
    for (int row = first; row < first + 16; ++row)
      sum += to_float(*reinterpret_cast<const T*>(tile + swizzled(row, column / 8) + column % 8 * 2));
    reinterpret_cast<float*>(shared + at.down_bias_sums)[level * kThreads + threadIdx.x] += sum;
  }

  __device__ __forceinline__ void add_coefficient(float value, int level, int which) {
    value += shuffle_xor(value, 8);
    value += shuffle_xor(value, 16);
    auto* sums = reinterpret_cast<float*>(shared + at.coefficient_sums);
    if (lane < 8) sums[(level * kCoefficients + which) * 64 + warp * 8 + lane] += value;
  }

  __device__ __forceinline__ void zero_sums() {
    for (int i = at.coefficient_sums / 4 + threadIdx.x; i < at.total / 4; i += kThreads)
      reinterpret_cast<float*>(shared)[i] = 0;
  }
};

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
__global__ void __launch_bounds__(kThreads, 1) weight_gradient(const __grid_constant__ WeightGradient p) {
  int chunks = p.walk.max_width / kGradientColumns;
  int chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
  int tower_index = rest % p.walk.tower_count, split = rest / p.walk.tower_count;
  const Tower& tower = p.walk.towers[tower_index];
  if (chunk * kGradientColumns >= tower.width) return;
  const int levels = p.walk.levels;
  Block<T> block(p, tower, shared_memory(), chunk);
  block.load_weights(tower_index, chunk);
  block.zero_sums();
  unsigned char* shared = block.shared;
  const Layout at = block.at;

  int64_t item_blocks = (p.walk.items + kItems - 1) / kItems;
  for (int64_t item_block = split; item_block < item_blocks; item_block += p.splits) {
    block.first_item = item_block * kItems;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      block.items[half] = find_item(p.walk, tower, block.first_item + block.item_row + block.lane / 4 + 8 * half);
    __syncthreads();  // nobody reads the last block's tiles any more
    block.fetch(0);
    float value[8];
    block.load_grad(value);
    int step = 0;

    // Down the levels with value = dh.
    for (int level = levels - 1; level >= 0; --level) {
      block.publish(value, step);
      block.outer(block.sum_up, level, block.activated(step), step);
      block.add_up_bias(value, level);
      block.inner(value, block.bottleneck_grad(step), shared + at.down + level * kSlice);  // dx
      float keep = tower.coefficients[level * kCoefficients];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        block.log(level)[pair * kThreads] = pack2<T>(value[2 * pair], value[2 * pair + 1]);
        value[2 * pair] *= keep;
        value[2 * pair + 1] *= keep;
      }
      ++step;
    }

    // Up again with value = h of the level below, then x, then h.
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = 0;
    Loads loads;
    loads.start(tower, levels, block.items, 0, block.first_column);
    for (int level = 0; level < levels; ++level) {
      const float* coefficients = tower.coefficients + level * kCoefficients;
      float dx[8], along = 0;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t logged = block.log(level)[pair * kThreads];
        dx[2 * pair] = low_half<T>(logged);
        dx[2 * pair + 1] = high_half<T>(logged);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        along += dx[i] * value[i];
        value[i] *= coefficients[0];
      }
      block.add_coefficient(along, level, 0);
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
        block.add_coefficient(along, level, 1 + s);
      }
      if (level + 1 < levels) loads.start(tower, levels, block.items, level + 1, block.first_column);
      block.publish(value, step);
      block.outer(block.sum_down, level, block.bottleneck_grad(step), step);
      if (chunk == 0) block.add_down_bias(block.bottleneck_grad(step), level);
      block.inner(value, block.activated(step), shared + at.up + level * kSlice);
      const float* bias = tower.up_bias + level * tower.width + block.first_column;
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] += bias[i / 4 * 2 + i % 2];
      ++step;
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  float* partial = p.partial[tower_index] + split * partial_floats(levels, tower.width);
  float* up = partial + int64_t(levels) * kRank * tower.width;
  float* down_bias = up + int64_t(levels) * kRank * tower.width;
  float* up_bias = down_bias + levels * kRank;
#pragma unroll
  for (int level = 0; level < kMaxLevels; ++level) {
    if (level >= levels) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = block.item_row + block.lane / 4 + 8 * half;
      int64_t place = (int64_t(level) * kRank + row) * tower.width + block.first_column;
      const float *d = block.sum_down[level] + 2 * half, *u = block.sum_up[level] + 2 * half;
      add_or_store(partial + place, Four{{d[0], d[1], d[4], d[5]}}, p.accumulate);
      add_or_store(up + place, Four{{u[0], u[1], u[4], u[5]}}, p.accumulate);
    }
  }
  const auto* up_sums = reinterpret_cast<const float*>(shared + at.up_bias_sums);
  for (int i = threadIdx.x; i < levels * kGradientColumns; i += kThreads) {
    int level = i / kGradientColumns, column = i % kGradientColumns;
    float sum = 0;
    for (int w = 0; w < 4; ++w) sum += up_sums[(level * 8 + column / 16 * 4 + w) * 16 + column % 16];
    add_or_store(up_bias + level * tower.width + chunk * kGradientColumns + column, sum, p.accumulate);
  }
  if (chunk == 0) {
    const auto* down_sums = reinterpret_cast<const float*>(shared + at.down_bias_sums);
    for (int i = threadIdx.x; i < levels * kRank; i += kThreads) {
      float sum = 0;
      for (int part = 0; part < 4; ++part) sum += down_sums[i / kRank * kThreads + part * kRank + i % kRank];
      add_or_store(down_bias + i, sum, p.accumulate);
    }
  }
  const auto* sums = reinterpret_cast<const float*>(shared + at.coefficient_sums);
  float* target =
      p.coefficient_partial[tower_index] + (split * (tower.width / kGradientColumns) + chunk) * levels * kCoefficients;
  for (int i = threadIdx.x; i < levels * kCoefficients; i += kThreads) {
    float sum = 0;
    for (int slot = 0; slot < 64; ++slot) sum += sums[i * 64 + slot];
    add_or_store(target + i, sum, p.accumulate);
  }
}

}  // namespace

size_t weight_gradient_shared(int levels) { return Layout(levels).total; }

int launch_weight_gradient(const WeightGradient& p, int kind, void* stream) {
  unsigned blocks = p.splits * p.walk.tower_count * (p.walk.max_width / kGradientColumns);
  size_t shared = weight_gradient_shared(p.walk.levels);
  return kind == kBFloat16 ? launch(weight_gradient<bfloat16>, blocks, kThreads, shared, stream, 1, p)
                           : launch(weight_gradient<half16>, blocks, kThreads, shared, stream, 1, p);
}

}  // namespace crossan_fast
