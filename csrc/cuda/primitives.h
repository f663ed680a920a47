// The instructions that CUDA C++ has no name for, one function each: the device's through PTX here, the
// emulator's in host_primitives.h. What each does is PTX ISA 8.0's wording in short.
#pragma once

#include "numeric.h"

#if !defined(__CUDACC__)
#include "cuda/emulation/host_primitives.h"
#else

namespace crossan_fast {

// True where wgmma, bulk copies and clusters exist in this compilation.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Barrier `id` among `threads` threads of the block; id 0 is __syncthreads().
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Ends the launch with an error, without the cost of device_fail's message to a hot kernel.
__device__ __forceinline__ void trap_unless(bool condition) {
  if (!condition) __trap();
}

// Four 8×8 tiles of 16-bit elements; lane 8·i + j gives the address of row j of tile i. A lane receives, of
// each tile, the two elements of row lane / 4 from column 2·(lane % 4) on; with `trans`, of its transpose.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&tiles)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&tiles)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(shared_address(row))
               : "memory");
}

// The inverse of ldmatrix_x4_trans (sm_90).
__device__ __forceinline__ void stmatrix_x4_trans(void* row, const uint32_t (&tiles)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(tiles[0]), "r"(tiles[1]), "r"(tiles[2]), "r"(tiles[3])
               : "memory");
#endif
}

// acc [16, 8] += A [16, 16] · B [16, 8], fp32 accumulation.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_16x8x16<bfloat16>(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<half16>(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from device to shared memory, in the background; zeros where not `valid`.
__device__ __forceinline__ void copy_async_16(void* target, const void* source, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's groups are on their way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Asks for the cache line of an address, for reads to come.
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
}

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// Everything below is Hopper's; on other targets it is never reached (kHopper) and compiles to nothing.

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// All threads of the cluster meet; shared memory written before is seen after, in every block.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the copy engine and to the cluster (before cluster_sync).
__device__ __forceinline__ void mbarrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// One arrival, which also announces `bytes` of copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
// One arrival at the barrier in the same place of another block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}
// Waits for the end of the phase whose parity is given (the first phase has parity 0).
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

// `bytes` (a multiple of 16) to the same place in every block of the cluster whose bit is set in `blocks`;
// completes on the barrier in the same place of each.
__device__ __forceinline__ void bulk_copy_multicast(void* target, const void* source, int bytes, uint64_t* barrier,
                                                    uint16_t blocks) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
#endif
}

// Ordinary writes to shared memory before it are seen by wgmma and the copy engine after it.
__device__ __forceinline__ void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_fence() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kCount>
__device__ __forceinline__ void pin(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}
// Waits for all of the warpgroup's wgmma; the accumulators are operands, so that no use of them moves above.
template <class... Accumulators>
__device__ __forceinline__ void wgmma_wait(Accumulators&... acc) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  (pin(acc), ...);
#endif
}

// acc [64, 32] += A [64, 16] · B [32, 16]ᵀ by a warpgroup. Warp w holds rows 16·w …; of the j-th 8 columns a
// lane holds row lane / 4, columns 2·(lane % 4) + {0, 1} in acc[4·j + {0, 1}], row + 8 in acc[4·j + {2, 3}].
// With `kTransA` (`kTransB`) the operand's rows in memory are K.
#define CROSSAN_WGMMA(type)                                                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                             \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1, "          \
               "%18, %19;"                                                                                             \
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]), "+f"(acc[4]), "+f"(acc[5]), "+f"(acc[6]),     \
                 "+f"(acc[7]), "+f"(acc[8]), "+f"(acc[9]), "+f"(acc[10]), "+f"(acc[11]), "+f"(acc[12]), "+f"(acc[13]), \
                 "+f"(acc[14]), "+f"(acc[15])                                                                          \
               : "l"(a), "l"(b), "n"(kTransA), "n"(kTransB))

template <class T, bool kTransA = false, bool kTransB = false>
__device__ __forceinline__ void wgmma_64x32x16(float (&acc)[16], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kind_of<T> == kBFloat16)
    CROSSAN_WGMMA("bf16");
  else
    CROSSAN_WGMMA("f16");
#endif
}
#undef CROSSAN_WGMMA

}  // namespace crossan_fast

#endif

namespace crossan_fast {

// Byte offset of 16-byte chunk `chunk` of a row of 128 bytes, placed so that eight rows' equal chunks, and
// eight chunks of a row, lie in different banks; wgmma and the copy engine know the layout as 128B swizzle.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// The same for rows of 64 bytes.
__device__ __forceinline__ int swizzled_half(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }

// A swizzled tile of 128-byte rows, 1,024 bytes between groups of 8 rows: layout 128B. Rows are M or N and
// columns K, where `bytes` moves along a row; or, for a transposed operand, rows are K and columns M or N, 64 of
// them, where `bytes` moves by 2,048 to the next 16 rows. Tiles start at multiples of 1,024.
__device__ __forceinline__ uint64_t wgmma_operand(const unsigned char* tile, int bytes) {
  uint64_t address = (shared_address(tile) + bytes) & 0x3FFFF;
  return address >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Likewise for rows of 64 bytes, a transposed operand's 32 columns: layout 64B, 512 bytes between groups of 8.
__device__ __forceinline__ uint64_t wgmma_operand_half(const unsigned char* tile, int bytes) {
  uint64_t address = (shared_address(tile) + bytes) & 0x3FFFF;
  return address >> 4 | uint64_t(1) << 16 | uint64_t(512 >> 4) << 32 | uint64_t(2) << 62;
}

}  // namespace crossan_fast
