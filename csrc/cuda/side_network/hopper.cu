// The walk for Hopper: persistent clusters of two blocks, which work on neighbouring items of one tower and
// share its weights (each copies half of every tile to both); a warp that does nothing but copy, four stages
// ahead; and wgmma with the weights' rows as M and a group's 32 items as N, so that blocks stay small and the
// multiprocessors busy at small batches.
#include "walk.h"

namespace crossan_fast {
namespace {

constexpr int kStages = 4, kCluster = 2, kWarps = 4;  // warps: of a group

struct Ring {
  unsigned char* tiles;  // [kStages]
  uint64_t* full;        // [kStages]: the tile has come
  uint64_t* empty;       // [kStages]: no group of the cluster needs the tile any more
};

template <class T>
struct WgmmaEngine {
  Ring ring;
  int group, used = 0;
  bool running = false;
  float acc[16] = {};  // [64 rows of the weights, 32 items], see wgmma_64x32x16

  __device__ WgmmaEngine(const Ring& ring, int group) : ring(ring), group(group) {}

  __device__ __forceinline__ void sync() { named_barrier(1 + group, 128); }

  __device__ __forceinline__ const unsigned char* acquire() {
    fence_async_proxy();
    sync();
    int stage = used % kStages;
    mbarrier_wait(ring.full + stage, used / kStages & 1);
    return ring.tiles + stage * kTileBytes;
  }

  __device__ __forceinline__ void finish() {
    wgmma_wait(acc);
    int lane = threadIdx.x % 32;
    if (running && lane < kCluster) mbarrier_arrive_at(ring.empty + (used - 1) % kStages, lane);
    running = false;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& value : acc) value = 0;
  }

  __device__ __forceinline__ void product(const unsigned char* items, const unsigned char* tile) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step)
      wgmma_64x32x16<T>(acc, wgmma_operand(tile, 32 * step), wgmma_operand(items, 32 * step));
    wgmma_commit();
    running = true;
    ++used;
  }

  // The accumulator's 8 × 8 blocks, transposed to items × columns: blocks (row, item) of a quarter `pair`.
  __device__ __forceinline__ unsigned char* place(unsigned char* tile, int pair) const {
    int lane = threadIdx.x % 32, block = lane / 8, warp = threadIdx.x % 128 / 32;
    return tile + swizzled(16 * pair + block / 2 * 8 + lane % 8, 2 * warp + block % 2);
  }
  __device__ __forceinline__ float bias_of(const float* bias, int half) const {
    return bias ? bias[threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half] : 0.0f;
  }

  __device__ __forceinline__ void store(unsigned char* tile, const float* bias) {
    const float biases[2] = {bias_of(bias, 0), bias_of(bias, 1)};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t blocks[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* value = acc + 8 * pair + 2 * i;
        blocks[i] = pack2<T>(value[0] + biases[i % 2], value[1] + biases[i % 2]);
      }
      stmatrix_x4_trans(place(tile, pair), blocks);
    }
  }
};

// One thread copies every tile of every tower that the cluster works on, as fast as stages become empty.
[[maybe_unused]] __device__ __forceinline__ void produce(const Ring& ring, const unsigned char* weights, int tiles,
                                                         unsigned rank, int* fetched) {
  constexpr int kPart = kTileBytes / kCluster;
  for (int tile = 0; tile < tiles; ++tile, ++*fetched) {
    int stage = *fetched % kStages, round = *fetched / kStages;
    if (round > 0) mbarrier_wait(ring.empty + stage, (round - 1) & 1);
    mbarrier_arrive_expect(ring.full + stage, kTileBytes);
    bulk_copy_multicast(ring.tiles + stage * kTileBytes + rank * kPart,
                        weights + int64_t(tile) * kTileBytes + rank * kPart, kPart, ring.full + stage,
                        (1 << kCluster) - 1);
  }
}

template <class T, bool kBackward, int kGroups>
__global__ void __launch_bounds__(128 * kGroups + 32, 1) hopper_kernel(const __grid_constant__ Walk walk) {
  if constexpr (!kHopper) {
    device_fail("side_network: the Hopper path needs a build with sm_90a code, architecture", 90);
  } else {
    unsigned char* shared = shared_memory();
    trap_unless(shared_address(shared) % 1024 == 0);  // the swizzle is one of addresses
    unsigned char* groups = shared + kStages * kTileBytes;
    auto* barriers = reinterpret_cast<uint64_t*>(groups + kGroups * group_bytes(walk_panels(walk, kBackward)));
    const Ring ring = {shared, barriers, barriers + kStages};
    const unsigned rank = cluster_rank();
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        mbarrier_init(ring.full + stage, 1);
        mbarrier_init(ring.empty + stage, kCluster * kGroups * kWarps);
      }
      mbarrier_init_fence();
    }
    cluster_sync();

    constexpr int64_t kClusterItems = kCluster * kGroups * kGroupItems;
    const int64_t works = (walk.items + kClusterItems - 1) / kClusterItems * walk.tower_count;
    const int64_t first_work = blockIdx.x / kCluster, stride = gridDim.x / kCluster;
    const int group = threadIdx.x / 128;
    if (group == kGroups) {
      if (threadIdx.x % 32 == 0) {
        int fetched = 0;
        for (int64_t work = first_work; work < works; work += stride) {
          const Tower& tower = walk.towers[work % walk.tower_count];
          produce(ring, tower.weights, walk_tiles(walk, tower.width, kBackward), rank, &fetched);
        }
      }
    } else {
      WgmmaEngine<T> engine(ring, group);
      GroupMemory memory = group_memory(groups, walk_panels(walk, kBackward), group);
      for (int64_t work = first_work; work < works; work += stride) {
        const Tower& tower = walk.towers[work % walk.tower_count];
        int64_t first = work / walk.tower_count * kClusterItems + (rank * kGroups + group) * kGroupItems;
        walk_tower<T, WgmmaEngine<T>, kBackward>(walk, tower, engine, memory, threadIdx.x % 128, first);
      }
    }
    sync_warp();
    cluster_sync();  // nobody leaves while another block may still write to it
  }
}

template <class T, bool kBackward>
int launch_groups(const Walk& walk, int groups, size_t shared, unsigned blocks, void* stream) {
  int64_t per_cluster = int64_t(kCluster) * groups * kGroupItems;
  int64_t works = (walk.items + per_cluster - 1) / per_cluster * walk.tower_count;
  int64_t clusters = blocks / kCluster < works ? blocks / kCluster : works;
  auto grid = static_cast<unsigned>((clusters > 0 ? clusters : 1) * kCluster);
  unsigned threads = 128 * groups + 32;
  return groups == 2 ? launch(hopper_kernel<T, kBackward, 2>, grid, threads, shared, stream, kCluster, walk)
                     : launch(hopper_kernel<T, kBackward, 1>, grid, threads, shared, stream, kCluster, walk);
}

}  // namespace

size_t walk_hopper_shared(int panels, int groups) {
  return kStages * kTileBytes + groups * group_bytes(panels) + 2 * kStages * sizeof(uint64_t);
}

int launch_walk_hopper(const Walk& walk, int kind, bool backward, int groups, size_t shared, unsigned blocks,
                       void* stream) {
  if (kind == kBFloat16)
    return backward ? launch_groups<bfloat16, true>(walk, groups, shared, blocks, stream)
                    : launch_groups<bfloat16, false>(walk, groups, shared, blocks, stream);
  return backward ? launch_groups<half16, true>(walk, groups, shared, blocks, stream)
                  : launch_groups<half16, false>(walk, groups, shared, blocks, stream);
}

}  // namespace crossan_fast
