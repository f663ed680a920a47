// Products of 64 × 64 tiles in shared memory by 256 threads, with mma.sync.
#pragma once

#include "primitives.h"

namespace crossan_fast {

// A warp's part of a 64 × 64 product: 16 rows, 32 columns. Of its j-th 8 columns a lane holds row lane / 4 in
// acc[4·j + {0, 1}] and row + 8 in acc[4·j + {2, 3}].
struct Fragment {
  int first_row, first_column, row, column;  // of the warp; of acc[0]
  __device__ Fragment()
      : first_row(threadIdx.x / 32 % 4 * 16),
        first_column(threadIdx.x / 128 * 32),
        row(first_row + threadIdx.x % 32 / 4),
        column(first_column + threadIdx.x % 4 * 2) {}
  __device__ int row_of(int index) const { return row + index / 2 % 2 * 8; }
  __device__ int column_of(int index) const { return column + index / 4 * 8 + index % 2; }
};

// acc += A [64, 64] · B [64, 64]ᵀ, tiles in shared memory; with `kTransA` (`kTransB`) a tile holds the transpose:
// its rows are K.
template <class T, bool kTransA, bool kTransB>
__device__ __forceinline__ void warp_product(float (&acc)[16], const unsigned char* a_tile,
                                             const unsigned char* b_tile) {
  const Fragment at;
  const int lane = threadIdx.x % 32, row = at.first_row, column = at.first_column;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t a[4];
    if constexpr (kTransA)
      ldmatrix_x4_trans(a, a_tile + swizzled(16 * step + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
    else
      ldmatrix_x4(a, a_tile + swizzled(row + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[4];
      int n = column + 16 * pair;
      if constexpr (kTransB)
        ldmatrix_x4_trans(b, b_tile + swizzled(16 * step + lane / 8 % 2 * 8 + lane % 8, n / 8 + lane / 16));
      else
        ldmatrix_x4(b, b_tile + swizzled(n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      mma_16x8x16<T>(acc + 8 * pair, a, b[0], b[1]);
      mma_16x8x16<T>(acc + 8 * pair + 4, a, b[2], b[3]);
    }
  }
}

// Calls `visit(offset, index, half)` for the pairs of neighbours acc[index], acc[index + 1] that a lane holds;
// `offset`: of the pair in a tile of 16-bit numbers.
template <class Visit>
__device__ __forceinline__ void for_pairs(Visit visit) {
  const Fragment at;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      visit(swizzled(at.row + 8 * half, at.first_column / 8 + j) + at.column % 8 * 2, 4 * j + 2 * half, half);
  }
}

}  // namespace crossan_fast
