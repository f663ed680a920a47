// Once per call: weights converted, padded to rank 64 and cut into the tiles that the walks stream, in the
// order in which they stream them and already swizzled, so that a tile is one contiguous copy; gates turned
// into the coefficients of side_network.h.
#include "side_network.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = 256, kCheckedItems = 2048;

// Where the elements of a tile are, and where it goes. Of the forward: the slots' W_down [r, D], the head's W_head
// [d, D], then the levels' W_up [D, r]; of the transposed: the slots' alone. Beyond `rows` and `columns` are zeros.
struct Tile {
  const void* weights;
  unsigned char* target;
  int64_t start;
  int row_step, column_step, rows, columns;
  __device__ Tile(const Prepare& p, int tower, int place, bool transposed) {
    const int width = p.width[tower], panels = width / kTile, slot = place / panels, panel = place % panels;
    const int parts = head_parts(p.embedding), level = slot - p.levels - parts;
    if (level >= 0) {
      weights = p.up_weight[tower], start = (int64_t(level) * width + panel * kTile) * p.rank;
      row_step = p.rank, column_step = 1, rows = kTile, columns = p.rank;
      target = p.forward_tiles[tower] + up_tile(p.levels, parts, level, panels, panel) * kTileBytes;
      return;
    }
    const int part = slot - p.levels;
    const int64_t first = part < 0 ? int64_t(slot) * p.rank : int64_t(part) * kTile;
    const int thin = part < 0 ? p.rank : p.embedding - part * kTile;
    weights = part < 0 ? p.down_weight[tower] : p.head_weight[tower], start = first * width + panel * kTile;
    row_step = transposed ? 1 : width, column_step = transposed ? width : 1;
    rows = transposed ? kTile : thin, columns = transposed ? thin : kTile;
    target = transposed ? p.transposed_tiles[tower] + int64_t(place) * kTileBytes
                        : p.forward_tiles[tower] + down_tile(p.levels, slot, panels, panel) * kTileBytes;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4) pack_tiles(const __grid_constant__ Prepare p) {
  int products = 2 * p.levels + head_parts(p.embedding), most = products * (p.max_width / kTile);
  int place = blockIdx.x % most, tower = blockIdx.x / most % p.tower_count;
  bool backward = blockIdx.x / most / p.tower_count;
  if (place >= (products - (backward ? p.levels : 0)) * (p.width[tower] / kTile)) return;
  const Tile tile(p, tower, place, backward);
  for (int vector = threadIdx.x; vector < kTile * 8; vector += kThreads) {
    int row = vector / 8, chunk = vector % 8;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int column = chunk * 8 + i;
      bool there = row < tile.rows && column < tile.columns;
      int64_t index = tile.start + int64_t(row) * tile.row_step + int64_t(column) * tile.column_step;
      values[i] = there ? load_element(tile.weights, index, p.weight_kind) : 0.0f;
    }
    store16(tile.target + swizzled(row, chunk), pack8<T>(values));
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
  for (int i = threadIdx.x; i < head_parts(p.embedding) * kTile; i += kThreads)
    p.head_biases[tower][i] = i < p.embedding ? load_element(p.head_bias[tower], i, p.weight_kind) : 0.0f;
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
  int directions = p.transposed_tiles[0] ? 2 : 1;
  unsigned blocks = directions * p.tower_count * (2 * p.levels + head_parts(p.embedding)) * (p.max_width / kTile);
  return p.compute_kind == kBFloat16 ? launch(pack_tiles<bfloat16>, blocks, kThreads, 0, stream, 1, p)
                                     : launch(pack_tiles<half16>, blocks, kThreads, 0, stream, 1, p);
}

}  // namespace crossan_fast
