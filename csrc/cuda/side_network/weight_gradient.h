// What the two kernels of the weight gradients share: which part is a block's, the tiles of items that they read,
// and the sums over items that are too small for the matrix unit.
#pragma once

#include "side_network.h"

namespace crossan_fast {

constexpr int kGradientThreads = 256, kGradientItems = 64;
constexpr int kSlice = kGradientColumns * 128;   // bytes: 32 rows of a slot's W_downᵀ or W_headᵀ
constexpr int kItemTile = kGradientItems * 128;  // bytes: 64 items × 64, dz or act(z)
constexpr int kFactorTile = kItemTile / 2;       // bytes: 64 items × 32 columns

// A block's tower, columns and split of the items.
struct Share {
  int chunks, chunk, tower, split;
  __device__ explicit Share(const WeightGradient& p) : chunks(p.walk.max_width / kGradientColumns) {
    int rest = blockIdx.x / chunks;
    chunk = blockIdx.x % chunks, tower = rest % p.walk.tower_count, split = rest / p.walk.tower_count;
  }
};

inline unsigned gradient_blocks(const WeightGradient& p) {
  return p.splits * p.walk.tower_count * (p.walk.max_width / kGradientColumns);
}

// Offsets, in bytes, of sums that the threads add to in shared memory, each to places of its own. `kThreads` of them
// work on the same items.
template <int kThreads>
struct SmallSums {
  static constexpr int kWays = kThreads / 4, kRows = kThreads / kRank;
  int coefficients;  // [levels, kCoefficients, kWays]
  int bias;          // [slots, kRows, 64]
  int total;
  __host__ __device__ constexpr SmallSums(int start, int levels, int parts)
      : coefficients(start),
        bias(coefficients + levels * kCoefficients * kWays * 4),
        total(bias + (levels + parts) * kRows * kRank * 4) {}
};

// act(z) of a level, or dz of a slot, of 64 items into a tile, by `threads` threads; zeros past the end, and in place
// of e's gradient where the tower does not exist.
__device__ __forceinline__ void fetch_activated(const Walk& walk, const Tower& tower, int64_t first_item,
                                                unsigned char* tile, int level, int thread, int threads) {
  for (int i = thread; i < kGradientItems * 8; i += threads) {
    int64_t index = first_item + i / 8;
    bool valid = index < walk.items;
    int64_t source = valid ? 2 * ((index * walk.levels + level) * kRank + i % 8 * 8) : 0;
    copy_async_16(tile + swizzled(i / 8, i % 8), tower.activated + source, valid);
  }
}
__device__ __forceinline__ void fetch_grad(const Walk& walk, const Tower& tower, int64_t first_item,
                                           unsigned char* tile, int slot, int thread, int threads) {
  for (int i = thread; i < kGradientItems * 8; i += threads) {
    int64_t index = first_item + i / 8;
    int chunk = i % 8, column = (slot - walk.levels) * kTile + chunk * 8;
    unsigned char* target = tile + swizzled(i / 8, chunk);
    if (slot < walk.levels) {
      bool valid = index < walk.items;
      int64_t source = valid ? 2 * ((index * walk.levels + slot) * kRank + chunk * 8) : 0;
      copy_async_16(target, tower.bottleneck_grad + source, valid);
    } else {
      bool there = column < walk.embedding && (find_item(walk, tower, index).flags & kExists);
      int64_t source = there ? 2 * (index * walk.embedding_stride + column) : 0;
      copy_async_16(target, tower.grad + source, there);
    }
  }
}

// The threads that work on the same 64 items, and what each does alike in both kernels.
template <class T, int kThreads>
struct ItemGroup {
  const WeightGradient& p;
  const Tower& tower;
  unsigned char* shared;
  const SmallSums<kThreads> small;
  const int thread, lane, warp;
  int64_t first_item = 0;

  __device__ ItemGroup(const WeightGradient& p, const Tower& tower, unsigned char* shared,
                       const SmallSums<kThreads>& small)
      : p(p),
        tower(tower),
        shared(shared),
        small(small),
        thread(threadIdx.x % kThreads),
        lane(threadIdx.x % 32),
        warp(thread / 32) {}

  __device__ __forceinline__ void fetch(unsigned char* tile, int slot) {
    fetch_grad(p.walk, tower, first_item, tile, slot, thread, kThreads);
    copy_async_commit();
  }

  __device__ __forceinline__ float* sums(int offset) const { return reinterpret_cast<float*>(shared + offset); }

  __device__ __forceinline__ void zero_sums() {
    for (int i = small.coefficients / 4 + threadIdx.x; i < small.total / 4; i += kGradientThreads) sums(0)[i] = 0;
  }

  // Σ over items of dz, the gradient of b_down (or of e, of b_head): a thread takes some rows of one column.
  __device__ __forceinline__ void add_bias(const unsigned char* dz, int slot) {
    constexpr int kEach = kGradientItems / SmallSums<kThreads>::kRows;
    int column = thread % kRank, first = thread / kRank * kEach;
    float sum = 0;
    for (int row = first; row < first + kEach; ++row)
      sum += to_float(*reinterpret_cast<const T*>(dz + swizzled(row, column / 8) + column % 8 * 2));
    sums(small.bias)[slot * kThreads + thread] += sum;
  }

  __device__ __forceinline__ void add_coefficient(float value, int level, int which) {
    value += shuffle_xor(value, 8);
    value += shuffle_xor(value, 16);
    if (lane < 8)
      sums(small.coefficients)[(level * kCoefficients + which) * SmallSums<kThreads>::kWays + warp * 8 + lane] += value;
  }

  // To memory, by all threads of the block, each sum in one order.
  __device__ __forceinline__ void write_sums(const Share& share) {
    const int levels = p.walk.levels, slots = levels + p.walk.parts, chunks = tower.width / kGradientColumns;
    const Partial at(slots, tower.width);
    float* partial = p.partial[share.tower] + share.split * at.total;
    for (int i = threadIdx.x; share.chunk == 0 && i < slots * kRank; i += kGradientThreads) {
      float sum = 0;
      for (int row = 0; row < SmallSums<kThreads>::kRows; ++row)
        sum += sums(small.bias)[i / kRank * kThreads + row * kRank + i % kRank];
      add_or_store(partial + at.bias + i, sum, p.accumulate);
    }
    float* coefficients =
        p.coefficient_partial[share.tower] + (share.split * chunks + share.chunk) * levels * kCoefficients;
    for (int i = threadIdx.x; i < levels * kCoefficients; i += kGradientThreads) {
      float sum = 0;
      for (int way = 0; way < SmallSums<kThreads>::kWays; ++way)
        sum += sums(small.coefficients)[i * SmallSums<kThreads>::kWays + way];
      add_or_store(coefficients + i, sum, p.accumulate);
    }
  }
};

}  // namespace crossan_fast
