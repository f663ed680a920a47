// Once per call: weights converted, padded to rank 64 and cut into the tiles that the walks stream, in the
// order in which they stream them and already swizzled, so that a tile is one contiguous copy; gates turned
// into the coefficients of side_network.h.
#include "side_network.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = 256, kCheckedItems = 2048;

// Tile `tile` of a level, element [row, column]. First product of the forward: W_down [r, D]; second:
// W_up [D, r]; of the backward: W_upᵀ and W_downᵀ.
__device__ __forceinline__ float tile_element(const Prepare& p, int tower, int level, int tile, bool backward, int row,
                                              int column) {
  int width = p.width[tower], tiles = width / kTile;
  bool second = tile >= tiles;
  int wide = tile % tiles * kTile + (second ? row : column), rank = second ? column : row;
  if (rank >= p.rank) return 0;
  bool down = second == backward;
  int64_t index =
      down ? (int64_t(level) * p.rank + rank) * width + wide : (int64_t(level) * width + wide) * p.rank + rank;
  return load_element(down ? p.down_weight[tower] : p.up_weight[tower], index, p.weight_kind);
}

template <class T>
__global__ void __launch_bounds__(kThreads) pack_tiles(const __grid_constant__ Prepare p) {
  int per_level = 2 * (p.max_width / kTile);
  int tile = blockIdx.x % per_level, rest = blockIdx.x / per_level;
  int place = rest % p.levels, tower = rest / p.levels % p.tower_count;
  bool backward = rest / p.levels / p.tower_count;
  int tiles = 2 * (p.width[tower] / kTile);
  if (tile >= tiles) return;
  int level = backward ? p.levels - 1 - place : place;
  unsigned char* target = backward ? p.backward_tiles[tower] : p.forward_tiles[tower];
  target += (int64_t(place) * tiles + tile) * kTileBytes;
  for (int vector = threadIdx.x; vector < kTile * 8; vector += kThreads) {
    int row = vector / 8, chunk = vector % 8;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = tile_element(p, tower, level, tile, backward, row, chunk * 8 + i);
    store16(target + swizzled(row, chunk), pack8<T>(values));
  }
}

__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

// A block a tower, and one for each `kCheckedItems` ids to check.
__global__ void __launch_bounds__(kThreads) pack_scalars(const __grid_constant__ Prepare p) {
  int tower = blockIdx.x;
  if (tower >= p.tower_count) {
    int64_t first = int64_t(tower - p.tower_count) * kCheckedItems, last = first + kCheckedItems;
    for (int64_t item = first + threadIdx.x; item < last && item < p.items; item += kThreads)
      checked_row(p.ids, item, p.wide, p.rows);
    return;
  }
  int width = p.width[tower];
  for (int i = threadIdx.x; i < p.levels * kRank; i += kThreads) {
    int level = i / kRank, r = i % kRank;
    p.down_biases[tower][i] = r < p.rank ? load_element(p.down_bias[tower], level * p.rank + r, p.weight_kind) : 0.0f;
  }
  for (int i = threadIdx.x; i < p.levels * width; i += kThreads)
    p.up_biases[tower][i] = load_element(p.up_bias[tower], i, p.weight_kind);
  int level = threadIdx.x;
  if (level >= p.levels) return;
  float* coefficients = p.coefficients[tower] + level * kCoefficients;
  float mu = sigmoid(load_element(p.gate[tower], level, p.weight_kind) / p.temperature);
  coefficients[0] = p.is_pair[tower] ? 1.0f : 1.0f - mu;
  coefficients[1] = mu;
  for (int s = 1; s < kMaxSources; ++s) {
    float value = 0;
    if (p.is_pair[tower])
      value = s == 1 ? 1.0f - mu : 0.0f;
    else if (s < p.source_count[tower])
      value = tanhf(load_element(p.cross_gate[tower][s - 1], level, p.weight_kind));
    coefficients[1 + s] = value;
  }
}

}  // namespace

int launch_prepare(const Prepare& p, void* stream) {
  auto checks = static_cast<unsigned>((p.items + kCheckedItems - 1) / kCheckedItems);
  if (int error = launch(pack_scalars, p.tower_count + checks, kThreads, 0, stream, 1, p)) return error;
  int directions = p.backward_tiles[0] ? 2 : 1;
  unsigned blocks = directions * p.tower_count * p.levels * 2 * (p.max_width / kTile);
  return p.compute_kind == kBFloat16 ? launch(pack_tiles<bfloat16>, blocks, kThreads, 0, stream, 1, p)
                                     : launch(pack_tiles<half16>, blocks, kThreads, 0, stream, 1, p);
}

}  // namespace crossan_fast
