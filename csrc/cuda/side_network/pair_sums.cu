// S[j, p] = Σ dz_j ⊗ a_p over the items, for every slot j and the levels p below it. A block takes one j, for which it
// keeps all its sums, [64, 64] each, in registers while it streams its share of the items in blocks of 64.
#include "weight_gradient.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = kGradientThreads;

template <class T>
__global__ void __launch_bounds__(kThreads, 1) pair_sums(const __grid_constant__ WeightGradient p) {
  const Walk& walk = p.walk;
  const int levels = walk.levels, slots = levels + walk.parts;
  const int slot = 1 + blockIdx.x % (slots - 1), rest = blockIdx.x / (slots - 1);
  const int tower_index = rest % walk.tower_count, split = rest / walk.tower_count;
  const Tower& tower = walk.towers[tower_index];
  const int count = slot < levels ? slot : levels;
  unsigned char *grad = shared_memory(), *activated = grad + kItemTile;
  float sums[kMaxLevels][16] = {};
  const int64_t item_blocks = (walk.items + kGradientItems - 1) / kGradientItems;
  for (int64_t block = split; block < item_blocks; block += p.splits) {
    const int64_t first = block * kGradientItems;
    __syncthreads();  // nobody reads the last block's tiles any more
    fetch_grad(walk, tower, first, grad, slot, threadIdx.x, kThreads);
    for (int below = 0; below < count; ++below)
      fetch_activated(walk, tower, first, activated + below * kItemTile, below, threadIdx.x, kThreads);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int below = 0; below < kMaxLevels; ++below)
      if (below < count) warp_product<T, true, true>(sums[below], grad, activated + below * kItemTile);
  }
  float* partial = p.pair_partial[tower_index] +
                   (int64_t(split) * pair_count(levels, walk.parts) + pair_of(levels, slot, 0)) * kRank * kRank;
  const Fragment at;
#pragma unroll
  for (int below = 0; below < kMaxLevels; ++below) {
    if (below >= count) continue;
#pragma unroll
    for (int i = 0; i < 16; ++i)
      add_or_store(partial + (below * kRank + at.row_of(i)) * kRank + at.column_of(i), sums[below][i], p.accumulate);
  }
}

}  // namespace

size_t pair_sums_shared(int levels) { return (1 + levels) * kItemTile; }

int launch_pair_sums(const WeightGradient& p, int kind, void* stream) {
  unsigned blocks = p.splits * p.walk.tower_count * (p.walk.levels + p.walk.parts - 1);
  size_t shared = pair_sums_shared(p.walk.levels);
  return kind == kBFloat16 ? launch(pair_sums<bfloat16>, blocks, kThreads, shared, stream, 1, p)
                           : launch(pair_sums<half16>, blocks, kThreads, shared, stream, 1, p);
}

}  // namespace crossan_fast
