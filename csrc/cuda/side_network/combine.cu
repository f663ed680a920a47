// From sums over items to gradients, once per backward. First the pairs: S of all splits in a fixed order, ⟨P, S⟩, and
// κ·S as two 16-bit tiles, the second of what the first rounds away, scaled to where neither over- nor underflows. Then
// a block for each 64 columns of a weight adds the splits and the pairs' products, and one for each tower takes the
// coefficients' gradients back through sigmoid and tanh to θ and ν.
#include "side_network.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = 256, kElements = kRank * kRank / kThreads;

// The block's value of `combine` over all threads' values, in one order.
template <class Operation>
__device__ __forceinline__ float over_block(float value, float* slots, Operation combine) {
  for (int mask = 1; mask < 32; mask *= 2) value = combine(value, shuffle_xor(value, mask));
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  float result = slots[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) result = combine(result, slots[warp]);
  __syncthreads();
  return result;
}

template <class T>
__global__ void __launch_bounds__(kThreads) combine_pairs(const __grid_constant__ Combine p) {
  const int parts = head_parts(p.embedding), pairs = pair_count(p.levels, parts);
  const int index = blockIdx.x % pairs, tower = blockIdx.x / pairs;
  const Pair pair(p.levels, index);
  const int row = threadIdx.x / 4, first = threadIdx.x % 4 * kElements;
  const int64_t place = int64_t(index) * kRank * kRank + row * kRank + first;
  const float kappa = carry(p.coefficients[tower], p.levels, pair.slot, pair.below);
  float values[kElements] = {}, along = 0, largest = 0;
  for (int i = 0; i < kElements; ++i) {
    for (int split = 0; split < p.splits; ++split)
      values[i] += p.pair_partial[tower][int64_t(split) * pairs * kRank * kRank + place + i];
    along += values[i] * p.products[tower][place + i];
    values[i] *= kappa;
    float magnitude = values[i] < 0 ? -values[i] : values[i];
    largest = magnitude > largest ? magnitude : largest;
  }
  auto* slots = reinterpret_cast<float*>(shared_memory());
  along = over_block(along, slots, [](float a, float b) { return a + b; });
  largest = over_block(largest, slots, [](float a, float b) { return a > b ? a : b; });
  // The power of two below the largest, and its inverse; both normal numbers.
  uint32_t exponent = float_to_bits(largest) >> 23 & 0xFF;
  exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  const float scale = bits_to_float((254 - exponent) << 23), inverse = bits_to_float(exponent << 23);
  unsigned char* tiles = p.pair_tiles[tower] + int64_t(index) * 2 * kTileBytes;
  for (int chunk = 0; chunk < kElements / 8; ++chunk) {
    float high[8], low[8];
    for (int i = 0; i < 8; ++i) high[i] = values[chunk * 8 + i] * scale;
    Raw8 rounded = pack8<T>(high);
    unpack8<T>(rounded, low);
    for (int i = 0; i < 8; ++i) low[i] = high[i] - low[i];
    store16(tiles + swizzled(row, first / 8 + chunk), rounded);
    store16(tiles + kTileBytes + swizzled(row, first / 8 + chunk), pack8<T>(low));
  }
  if (threadIdx.x == 0) p.pair_numbers[tower][2 * index] = inverse, p.pair_numbers[tower][2 * index + 1] = along;
}

// A 64 × 64 tile's product with κ·S of a pair, onto acc. Tiles are copied to shared memory first.
template <class T>
struct PairProducts {
  const Combine& p;
  const int tower;
  unsigned char* weights;  // the tile; then S's two
  float acc[16] = {};

  __device__ PairProducts(const Combine& p, int tower) : p(p), tower(tower), weights(shared_memory()) {}

  __device__ __forceinline__ void load(int pair, int64_t tile) {
    const unsigned char* from = p.forward_tiles[tower] + tile * kTileBytes;
    const unsigned char* sums = p.pair_tiles[tower] + int64_t(pair) * 2 * kTileBytes;
    __syncthreads();  // nobody reads the tiles before any more
    for (int byte = threadIdx.x * 16; byte < kTileBytes; byte += kThreads * 16) {
      copy_async_16(weights + byte, from + byte);
      copy_async_16(weights + kTileBytes + byte, sums + byte);
      copy_async_16(weights + 2 * kTileBytes + byte, sums + kTileBytes + byte);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void add(const float (&product)[16], int pair) {
    const float inverse = p.pair_numbers[tower][2 * pair];
#pragma unroll
    for (int i = 0; i < 16; ++i) acc[i] += inverse * product[i];
  }

  // acc [64, 64 columns of the width] += κ·S · W_upᵀ
  __device__ __forceinline__ void up(int pair, int64_t tile) {
    load(pair, tile);
    float product[16] = {};
    warp_product<T, false, false>(product, weights + kTileBytes, weights);
    warp_product<T, false, false>(product, weights + 2 * kTileBytes, weights);
    add(product, pair);
  }

  // acc [64 of the width, 64] += W_downᵀ · κ·S
  __device__ __forceinline__ void down(int pair, int64_t tile) {
    load(pair, tile);
    float product[16] = {};
    warp_product<T, true, true>(product, weights, weights + kTileBytes);
    warp_product<T, true, true>(product, weights, weights + 2 * kTileBytes);
    add(product, pair);
  }
};

__device__ __forceinline__ float total(const Combine& p, int tower, int64_t place) {
  const Partial at(p.levels + head_parts(p.embedding), p.width[tower]);
  float sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += p.partial[tower][split * at.total + place];
  return sum;
}

// ∂W_down of a level, or a part of ∂W_head.
template <class T>
__device__ __forceinline__ void write_down(const Combine& p, int tower, int slot, int panel) {
  const int width = p.width[tower], panels = width / kTile;
  PairProducts<T> products(p, tower);
  for (int below = 0; below < slot && below < p.levels; ++below)
    products.up(pair_of(p.levels, slot, below), up_tile(p.levels, head_parts(p.embedding), below, panels, panel));
  const Fragment at;
  const bool head = slot >= p.levels;
  const int rows = head ? p.embedding - (slot - p.levels) * kTile : p.rank;
  const int64_t first = head ? int64_t(slot - p.levels) * kTile : int64_t(slot) * p.rank;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    int row = at.row_of(i), column = panel * kTile + at.column_of(i);
    if (row >= rows) continue;
    float sum = products.acc[i] + total(p, tower, (int64_t(slot) * kRank + row) * width + column);
    store_element(head ? p.head_weight[tower] : p.down_weight[tower], (first + row) * width + column, p.weight_kind,
                  sum);
  }
}

// ∂W_up and ∂b_up of a level.
template <class T>
__device__ __forceinline__ void write_up(const Combine& p, int tower, int level, int panel) {
  const int width = p.width[tower], panels = width / kTile, slots = p.levels + head_parts(p.embedding);
  const int64_t biases = Partial(slots, width).bias;
  PairProducts<T> products(p, tower);
  auto* sums = reinterpret_cast<float*>(products.weights + 3 * kTileBytes);  // Σ dz of a slot
  float bias = 0;
  for (int slot = level + 1; slot < slots; ++slot) {
    products.down(pair_of(p.levels, slot, level), down_tile(p.levels, slot, panels, panel));
    if (threadIdx.x < kRank)
      sums[threadIdx.x] =
          carry(p.coefficients[tower], p.levels, slot, level) * total(p, tower, biases + slot * kRank + threadIdx.x);
    __syncthreads();
    if (threadIdx.x >= kTile) continue;
    for (int row = 0; row < kRank; ++row) {
      const unsigned char* line = products.weights + swizzled(row, threadIdx.x / 8);
      bias += to_float(*reinterpret_cast<const T*>(line + threadIdx.x % 8 * 2)) * sums[row];
    }
  }
  const int64_t first = int64_t(level) * width + panel * kTile;
  const Fragment at;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    int row = at.row_of(i), column = at.column_of(i);
    if (column < p.rank)
      store_element(p.up_weight[tower], (first + row) * p.rank + column, p.weight_kind, products.acc[i]);
  }
  if (threadIdx.x < kTile) store_element(p.up_bias[tower], first + threadIdx.x, p.weight_kind, bias);
}

// What the activations add to ⟨dx, h⟩ before a level: of every pair around it, κ without the level's own α₀.
__device__ __forceinline__ float activations_along(const Combine& p, int tower, int level) {
  const int slots = p.levels + head_parts(p.embedding);
  const float* coefficients = p.coefficients[tower];
  float sum = 0;
  for (int below = 0; below < level; ++below)
    for (int slot = level; slot < slots; ++slot)
      sum += carry(coefficients, p.levels, level - 1, below) * carry(coefficients, p.levels, slot, level) *
             p.pair_numbers[tower][2 * pair_of(p.levels, slot, below) + 1];
  return sum;
}

__device__ __forceinline__ void write_gates(const Combine& p, int tower, int level) {
  int chunks = p.width[tower] / kGradientColumns;
  float grad[kCoefficients] = {};
  for (int part = 0; part < p.splits * chunks; ++part)
    for (int i = 0; i < kCoefficients; ++i)
      grad[i] += p.coefficient_partial[tower][(part * p.levels + level) * kCoefficients + i];
  grad[0] += activations_along(p, tower, level);
  const float* coefficients = p.coefficients[tower] + level * kCoefficients;
  float mu = coefficients[1], slope = mu * (1.0f - mu) / p.temperature;
  float other = p.is_pair[tower] ? grad[2] : grad[0];  // the one that is 1 − μ
  store_element(p.gate[tower], level, p.weight_kind, slope * (grad[1] - other));
  if (p.is_pair[tower]) return;
  for (int s = 1; s < p.source_count[tower]; ++s) {
    float tanh_nu = coefficients[1 + s];
    store_element(p.cross_gate[tower][s - 1], level, p.weight_kind, (1.0f - tanh_nu * tanh_nu) * grad[1 + s]);
  }
}

__device__ __forceinline__ void write_small(const Combine& p, int tower) {
  const int64_t biases = Partial(p.levels + head_parts(p.embedding), p.width[tower]).bias;
  for (int i = threadIdx.x; i < p.levels * p.rank; i += kThreads)
    store_element(p.down_bias[tower], i, p.weight_kind, total(p, tower, biases + i / p.rank * kRank + i % p.rank));
  for (int i = threadIdx.x; i < p.embedding; i += kThreads)
    store_element(p.head_bias[tower], i, p.weight_kind, total(p, tower, biases + p.levels * kRank + i));
  if (static_cast<int>(threadIdx.x) < p.levels) write_gates(p, tower, threadIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Combine p) {
  const int slots = p.levels + head_parts(p.embedding);
  const int tower = blockIdx.x % p.tower_count, rest = blockIdx.x / p.tower_count;
  if (rest == 0) return write_small(p, tower);
  const int slot = (rest - 1) % (slots + p.levels), panel = (rest - 1) / (slots + p.levels);
  if (panel * kTile >= p.width[tower]) return;
  if (slot < slots)
    write_down<T>(p, tower, slot, panel);
  else
    write_up<T>(p, tower, slot - slots, panel);
}

template <class T>
int launch_both(const Combine& p, void* stream) {
  const int parts = head_parts(p.embedding);
  unsigned pairs = p.tower_count * pair_count(p.levels, parts);
  unsigned blocks = p.tower_count * (1 + (2 * p.levels + parts) * (p.max_width / kTile));
  constexpr size_t kSlots = kThreads / 32 * sizeof(float), kBytes = 3 * kTileBytes + kRank * sizeof(float);
  if (int error = launch(combine_pairs<T>, pairs, kThreads, kSlots, stream, 1, p)) return error;
  return launch(combine<T>, blocks, kThreads, kBytes, stream, 1, p);
}

}  // namespace

int launch_combine(const Combine& p, int kind, void* stream) {
  return kind == kBFloat16 ? launch_both<bfloat16>(p, stream) : launch_both<half16>(p, stream);
}

}  // namespace crossan_fast
