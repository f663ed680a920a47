// Once per call: of every pair of a slot j and a level p below it P = W_down,j·W_up,p, a block each, from the tiles
// that prepare() packed. Times κ it is a tile of the walk, transposed in the backward, which keeps it as it is, too.
#include "side_network.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = 256, kStages = 2, kStageBytes = 2 * kTileBytes;

template <class T>
__global__ void __launch_bounds__(kThreads) fold(const __grid_constant__ Fold p) {
  const int pairs = pair_count(p.levels, p.parts), index = blockIdx.x % pairs, tower = blockIdx.x / pairs;
  const int panels = p.width[tower] / kTile;
  const Pair pair(p.levels, index);
  unsigned char* shared = shared_memory();
  auto fetch = [&](int panel) {
    unsigned char* stage = shared + panel % kStages * kStageBytes;
    const unsigned char* down = p.forward_tiles[tower] + down_tile(p.levels, pair.slot, panels, panel) * kTileBytes;
    const unsigned char* up =
        p.forward_tiles[tower] + up_tile(p.levels, p.parts, pair.below, panels, panel) * kTileBytes;
    for (int byte = threadIdx.x * 16; panel < panels && byte < kTileBytes; byte += kThreads * 16) {
      copy_async_16(stage + byte, down + byte);
      copy_async_16(stage + kTileBytes + byte, up + byte);
    }
    copy_async_commit();
  };
  float acc[16] = {};
  fetch(0);
  for (int panel = 0; panel < panels; ++panel) {
    fetch(panel + 1);
    copy_async_wait<1>();
    __syncthreads();
    const unsigned char* stage = shared + panel % kStages * kStageBytes;
    warp_product<T, false, true>(acc, stage, stage + kTileBytes);
    __syncthreads();  // nobody reads the stage any more
  }
  const Fragment at;
  const float kappa = carry(p.coefficients[tower], p.levels, pair.slot, pair.below);
  float* product = p.products[tower];
  unsigned char* tile =
      product ? p.backward_tiles[tower] + backward_tile(p.levels, p.parts, pair.slot, pair.below) * kTileBytes
              : p.forward_tiles[tower] + pair_tile(p.levels, pair.slot, panels, pair.below) * kTileBytes;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    int row = at.row_of(i), column = at.column_of(i), line = product ? column : row, place = product ? row : column;
    if (product) product[(int64_t(index) * kRank + row) * kRank + column] = acc[i];
    *reinterpret_cast<T*>(tile + swizzled(line, place / 8) + place % 8 * 2) = from_float<T>(kappa * acc[i]);
  }
}

}  // namespace

int launch_fold(const Fold& p, int kind, void* stream) {
  unsigned blocks = p.tower_count * pair_count(p.levels, p.parts);
  constexpr int kBytes = kStages * kStageBytes;
  return kind == kBFloat16 ? launch(fold<bfloat16>, blocks, kThreads, kBytes, stream, 1, p)
                           : launch(fold<half16>, blocks, kThreads, kBytes, stream, 1, p);
}

}  // namespace crossan_fast
