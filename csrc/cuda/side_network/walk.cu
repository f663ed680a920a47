// The walk with mma.sync, for sm_80 and everything after it: weights through a ring of cp.async stages that
// all threads of the block fill and read in step.
#include "walk.h"

namespace crossan_fast {
namespace {

constexpr int kStages = 4;

template <class T>
struct MmaEngine {
  unsigned char* ring;           // [kStages] tiles
  const unsigned char* weights;  // the next tile to fetch
  int fetched = 0, tiles, used = 0;
  int rows, columns;   // of the 32 × 64 product: the warp's 16 items and 32 columns
  float acc[16] = {};  // of the j-th 8 columns: row lane / 4 in acc[4·j + {0, 1}], row + 8 in {2, 3}

  __device__ MmaEngine(unsigned char* ring, const Tower& tower, int tiles)
      : ring(ring), weights(tower.weights), tiles(tiles) {
    int warp = threadIdx.x % 128 / 32;
    rows = warp % 2 * 16;
    columns = warp / 2 * 32;
    for (int stage = 0; stage < kStages - 1; ++stage) fetch();
  }

  __device__ __forceinline__ void fetch() {
    if (fetched < tiles) {
      unsigned char* stage = ring + fetched % kStages * kTileBytes;
      for (int byte = threadIdx.x * 16; byte < kTileBytes; byte += blockDim.x * 16)
        copy_async_16(stage + byte, weights + byte);
      weights += kTileBytes;
    }
    ++fetched;
    copy_async_commit();  // an empty group too, so that the count of groups stays the count of tiles
  }

  __device__ __forceinline__ const unsigned char* acquire() {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // everyone's part of the tile has come, and everyone is done with the one before it
    fetch();
    return ring + used++ % kStages * kTileBytes;
  }
  __device__ __forceinline__ void finish() {}
  __device__ __forceinline__ void sync() { __syncthreads(); }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& value : acc) value = 0;
  }

  __device__ __forceinline__ void product(const unsigned char* items, const unsigned char* tile) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      uint32_t a[4];
      ldmatrix_x4(a, items + swizzled(rows + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t b[4];
        int row = columns + 16 * pair + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(b, tile + swizzled(row, 2 * step + lane / 8 % 2));
        mma_16x8x16<T>(acc + 8 * pair, a, b[0], b[1]);
        mma_16x8x16<T>(acc + 8 * pair + 4, a, b[2], b[3]);
      }
    }
  }

  // Calls `visit(place, column, acc)` for the pairs of neighbouring columns that the thread holds.
  template <class Visit>
  __device__ __forceinline__ void for_pairs(unsigned char* tile, Visit visit) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = rows + lane / 4 + 8 * half, column = columns + 8 * j + lane % 4 * 2;
        auto* place = reinterpret_cast<uint32_t*>(tile + swizzled(row, column / 8) + column % 8 * 2);
        visit(place, column, acc + 4 * j + 2 * half);
      }
    }
  }

  __device__ __forceinline__ void store(unsigned char* tile, const float* bias) {
    for_pairs(tile, [&](uint32_t* place, int column, const float* value) {
      *place = pack2<T>(value[0] + (bias ? bias[column] : 0.0f), value[1] + (bias ? bias[column + 1] : 0.0f));
    });
  }
};

template <class T, bool kBackward, int kGroups>
__global__ void __launch_bounds__(128 * kGroups, 1) walk_kernel(const __grid_constant__ Walk walk) {
  unsigned char* shared = shared_memory();
  const Tower& tower = walk.towers[blockIdx.x % walk.tower_count];
  int64_t first = int64_t(blockIdx.x / walk.tower_count) * (kGroups * kGroupItems);
  int group = threadIdx.x / 128;
  MmaEngine<T> engine(shared, tower, walk_tiles(walk, tower.width, kBackward));
  GroupMemory memory = group_memory(shared + kStages * kTileBytes, walk_panels(walk, kBackward), group);
  walk_tower<T, MmaEngine<T>, kBackward>(walk, tower, engine, memory, threadIdx.x % 128, first + group * kGroupItems);
}

template <class T, bool kBackward>
int launch_groups(const Walk& walk, int groups, size_t shared, void* stream) {
  int64_t per_block = groups * kGroupItems, blocks = (walk.items + per_block - 1) / per_block;
  auto grid = static_cast<unsigned>(blocks * walk.tower_count);
  return groups == 2 ? launch(walk_kernel<T, kBackward, 2>, grid, 256, shared, stream, 1, walk)
                     : launch(walk_kernel<T, kBackward, 1>, grid, 128, shared, stream, 1, walk);
}

}  // namespace

size_t walk_shared(int panels, int groups) { return kStages * kTileBytes + groups * group_bytes(panels); }

int launch_walk(const Walk& walk, int kind, bool backward, int groups, size_t shared, void* stream) {
  if (kind == kBFloat16)
    return backward ? launch_groups<bfloat16, true>(walk, groups, shared, stream)
                    : launch_groups<bfloat16, false>(walk, groups, shared, stream);
  return backward ? launch_groups<half16, true>(walk, groups, shared, stream)
                  : launch_groups<half16, false>(walk, groups, shared, stream);
}

}  // namespace crossan_fast
