// Thin matrix products of one block of items, small enough to stay in the core's own caches.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace crossan_fast {

inline constexpr int kRowsPerTile = 6;

template <class T>
inline constexpr int64_t kPanel = kVectorsPerPanel * kLanes<T, Vec<T>>;  // columns of B walked at a time

// B of a product, [K, N]. `panel` is the distance from one panel of kPanel columns to the next: kPanel where B is
// plain row-major with `row` its row stride, K·kPanel where it was packed by `pack`.
template <class T>
struct RightSide {
  const T* data;
  int64_t row;
  int64_t panel;
};

template <class T>
RightSide<T> plain(const T* data, int64_t row) {
  return {data, row, kPanel<T>};
}

template <class T>
RightSide<T> packed(const T* data, int64_t depth) {
  return {data, kPanel<T>, depth * kPanel<T>};
}

template <class T>
int64_t packed_size(int64_t depth, int64_t columns) {
  return depth * ((columns + kPanel<T> - 1) / kPanel<T>)*kPanel<T>;
}

// One panel of B [K, N] given by two strides: panel[k, j] = B[k, first + j], zeros beyond N.
template <class T>
void pack_panel(const T* b, int64_t row, int64_t column, int64_t depth, int64_t first, int64_t columns, T* panel) {
  const int64_t count = std::min(kPanel<T>, columns - first);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = 0; j < kPanel<T>; ++j)
      panel[k * kPanel<T> + j] = j < count ? b[k * row + (first + j) * column] : T(0);
}

enum class Into { overwrite, add };

namespace detail {

// C[rows, vectors·lanes] of one tile. The sum over k starts at zero (or the bias) and meets C only at its end:
// long sums are thus built from short ones, which keeps their rounding small.
template <class T, class V, int rows, int vectors>
inline __attribute__((always_inline)) void tile(int64_t depth, const T* a, int64_t a_row, int64_t a_column,
                                                const T* b, int64_t b_row, const T* bias, T* c, int64_t c_row,
                                                Into into) {
  constexpr int lanes = kLanes<T, V>;
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(c + i * c_row + v * lanes, 1);
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const V start = bias ? load<V>(bias + v * lanes) : V{};
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) sum[i][v] = start;
  }
  for (int64_t k = 0; k < depth; ++k) {
    V right[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) right[v] = load<V>(b + k * b_row + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const V left = broadcast<V>(a[i * a_row + k * a_column]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      T* to = c + i * c_row + v * lanes;
      store(to, into == Into::add ? load<V>(to) + sum[i][v] : sum[i][v]);
    }
}

template <class T, class V, int vectors>
void column_of_tiles(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b,
                     int64_t b_row, const T* bias, T* c, int64_t c_row, Into into, const T* next = nullptr) {
  int64_t i = 0;
  // Rows of B's next panel, or next rows of this one, are fetched while this one is in use.
  int64_t ahead = 0;
  const int64_t stride = next ? (depth * kRowsPerTile + rows - 1) / rows : 0;
  for (; i + kRowsPerTile <= rows; i += kRowsPerTile) {
    for (const int64_t end = std::min(depth, ahead + stride); ahead < end; ++ahead)
      for (int v = 0; v < vectors; ++v) __builtin_prefetch(next + ahead * b_row + v * kLanes<T, V>, 0, 2);
    tile<T, V, kRowsPerTile, vectors>(depth, a + i * a_row, a_row, a_column, b, b_row, bias, c + i * c_row, c_row,
                                      into);
  }
  a += i * a_row;
  c += i * c_row;
  switch (rows - i) {
    case 5: return tile<T, V, 5, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into);
    case 4: return tile<T, V, 4, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into);
    case 3: return tile<T, V, 3, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into);
    case 2: return tile<T, V, 2, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into);
    case 1: return tile<T, V, 1, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into);
    default: return;
  }
}

}  // namespace detail

// C[M, N] = (C +) bias[N] + A[M, K] · B[K, N]; A by two strides, C row-major with `c_row`. The order of every sum
// depends on K alone, so results repeat bit for bit however the rows are cut.
template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_column,
              RightSide<T> b, T* c, int64_t c_row, Into into, const T* bias = nullptr) {
  constexpr int64_t kDepth = 128;  // 128 rows of a panel are 32 kB: B stays in L1 while the rows of A pass
  constexpr int lanes = kLanes<T, Vec<T>>;
  if (rows == 0) return;
  for (int64_t j = 0; j < columns; j += kPanel<T>) {
    const int64_t width = std::min(kPanel<T>, columns - j);
    int64_t k = 0;
    do {
      const int64_t deep = std::min(kDepth, depth - k);
      const Into now = k == 0 ? into : Into::add;
      const T* from = a + k * a_column;
      const T* panel = b.data + (j / kPanel<T>)*b.panel + k * b.row;
      const T* start = k == 0 && bias ? bias + j : nullptr;
      if (width == kPanel<T>) {
        const T* next = k + deep < depth       ? panel + deep * b.row
                        : j + kPanel<T> < columns ? b.data + (j / kPanel<T> + 1) * b.panel
                                                  : nullptr;
        detail::column_of_tiles<T, Vec<T>, kVectorsPerPanel>(rows, deep, from, a_row, a_column, panel, b.row, start,
                                                             c + j, c_row, now, next);
      } else {
        int64_t v = 0;
        for (; v + lanes <= width; v += lanes)
          detail::column_of_tiles<T, Vec<T>, 1>(rows, deep, from, a_row, a_column, panel + v, b.row,
                                                start ? start + v : nullptr, c + j + v, c_row, now);
        for (; v < width; ++v)
          detail::column_of_tiles<T, T, 1>(rows, deep, from, a_row, a_column, panel + v, b.row,
                                           start ? start + v : nullptr, c + j + v, c_row, now);
      }
      k += deep;
    } while (k < depth);
  }
}

}  // namespace crossan_fast
