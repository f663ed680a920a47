#include "gemm.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

#include <bit>
#include <cmath>
#include <type_traits>

#include "transpose.h"

namespace crossan_fast {
namespace {

// Memory to fetch while a tile is computed, a line at a time: a burst would fill the core's few fill buffers and hold
// the arithmetic up. It may lie beyond the matrix, and is never read.
struct Fetch {
  const char* data;
  int64_t step;  // bytes
};

// sum + left · right, rounded once where the CPU can, in every loop: left to a compiler, lone numbers become products
// and then sums, and so do chains of few vectors where g++ tunes for AMD's Zen; a row's result would then depend on
// how many rows are beside it.
template <class V>
inline __attribute__((always_inline)) V plus_product(V sum, V left, V right) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if constexpr (std::is_floating_point_v<V>) return std::fma(left, right, sum);
#endif
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return std::bit_cast<V>(
        _mm512_fmadd_ps(std::bit_cast<__m512>(left), std::bit_cast<__m512>(right), std::bit_cast<__m512>(sum)));
  if constexpr (std::is_same_v<V, Vec<double>>)
    return std::bit_cast<V>(
        _mm512_fmadd_pd(std::bit_cast<__m512d>(left), std::bit_cast<__m512d>(right), std::bit_cast<__m512d>(sum)));
#elif defined(__FMA__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return std::bit_cast<V>(
        _mm256_fmadd_ps(std::bit_cast<__m256>(left), std::bit_cast<__m256>(right), std::bit_cast<__m256>(sum)));
  if constexpr (std::is_same_v<V, Vec<double>>)
    return std::bit_cast<V>(
        _mm256_fmadd_pd(std::bit_cast<__m256d>(left), std::bit_cast<__m256d>(right), std::bit_cast<__m256d>(sum)));
#endif
  return sum + left * right;
}

// C[rows, vectors·lanes] of one tile. The sum over k starts at zero (or the bias) and meets C only at its end:
// long sums are thus built from short ones, which keeps their rounding small.
template <class T, class V, int rows, int vectors>
inline __attribute__((always_inline)) void tile(int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b,
                                                int64_t b_row, const T* bias, T* c, int64_t c_row, Into into, T keep,
                                                Fetch next, Ahead* ahead = nullptr) {
  constexpr int lanes = kLanes<T, V>;
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const V start = bias ? load<V>(bias + v * lanes) : V{};
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) sum[i][v] = start;
  }
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    __builtin_prefetch(next.data + k * next.step, 0, 2);
    V right[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) right[v] = load<V>(b + k * b_row + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const V left = broadcast<V>(a[i * a_row + k * a_column]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[i][v] = plus_product(sum[i][v], left, right[v]);
    }
  };
  // C first, then what comes after, a line a step. Loops of a fixed length: the core foresees their end.
  int64_t k = 0;
  const bool deep = depth >= rows * vectors;
#pragma GCC unroll 1
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      __builtin_prefetch(c + i * c_row + v * lanes, 1);
      if (deep) step(k++);
    }
  if (ahead) {
    for (int64_t lines = kPanel<T> * 3 / 4; lines > 0 && k + Ahead::kPiece <= depth; lines -= Ahead::kPiece) {
      const char* piece = ahead->piece();
      if (!piece) break;
#pragma GCC unroll 1
      for (int64_t n = 0; n < Ahead::kPiece; ++n) {
        __builtin_prefetch(piece + n * 64, 0, 2);
        step(k++);
      }
    }
  }
  for (; k < depth; ++k) step(k);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      T* to = c + i * c_row + v * lanes;
      store(to, into == Into::add ? keep * load<V>(to) + sum[i][v] : sum[i][v]);
    }
}

template <class T, class V, int vectors>
void column_of_tiles(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b,
                     int64_t b_row, const T* bias, T* c, int64_t c_row, Into into, T keep, const T* next,
                     int64_t next_row, int64_t next_rows, Ahead* ahead) {
  constexpr int lanes = kLanes<T, V>;
  int64_t i = 0;
  const int64_t tiles = rows / kRowsPerTile;
  // Where rows of B touch, the tiles share the next rows evenly; else each takes a line of every row beside these.
  const auto share = [&](int64_t n) -> Fetch {
    if (next_row == kPanel<T>) {
      const int64_t bytes = next_rows * next_row * static_cast<int64_t>(sizeof(T));
      const int64_t step = bytes / std::max<int64_t>(1, tiles * depth) + 1;
      return {reinterpret_cast<const char*>(next) + n * depth * step, step};
    }
    return {reinterpret_cast<const char*>(next + n % vectors * lanes), next_row * static_cast<int64_t>(sizeof(T))};
  };
  for (int n = 0; i + kRowsPerTile <= rows; i += kRowsPerTile, ++n) {
    tile<T, V, kRowsPerTile, vectors>(depth, a + i * a_row, a_row, a_column, b, b_row, bias, c + i * c_row, c_row, into,
                                      keep, share(n), ahead);
  }
  const Fetch fetch{reinterpret_cast<const char*>(b), 0};
  a += i * a_row;
  c += i * c_row;
  switch (rows - i) {
    case 5: return tile<T, V, 5, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into, keep, fetch);
    case 4: return tile<T, V, 4, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into, keep, fetch);
    case 3: return tile<T, V, 3, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into, keep, fetch);
    case 2: return tile<T, V, 2, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into, keep, fetch);
    case 1: return tile<T, V, 1, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into, keep, fetch);
    default: return;
  }
}

// Whether rows so far apart meet in so few sets of L1 (64 of 64 bytes) that a panel of them would not stay there: a
// plain W of D = 768 does, and of any power of two.
template <class T>
bool share_sets(int64_t row) {
  return row * static_cast<int64_t>(sizeof(T)) % 1024 == 0;
}

}  // namespace

template <class T>
void pack_panel(const T* b, int64_t row, int64_t column, int64_t depth, int64_t first, int64_t columns, T* panel) {
  constexpr int64_t lanes = kLanes<T, Vec<T>>;
  const int64_t count = std::min(kPanel<T>, columns - first);
  int64_t k = 0;
  if (row == 1 && count == kPanel<T>)  // a transposed weight
    for (; k + lanes <= depth; k += lanes)
      for (int64_t j = 0; j < kPanel<T>; j += lanes)
        transpose_square(b + k + (first + j) * column, column, panel + k * kPanel<T> + j, kPanel<T>);
  for (; k < depth; ++k)
    for (int64_t j = 0; j < kPanel<T>; ++j)
      panel[k * kPanel<T> + j] = j < count ? b[k * row + (first + j) * column] : T(0);
}

template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_column, RightSide<T> b,
              T* c, int64_t c_row, Into into, const T* bias, T keep, Ahead* ahead, RightSide<T> then) {
  constexpr int64_t kDepth = 128;  // 128 rows of a panel are 32 kB: B stays in L1 while the rows of A pass
  constexpr int lanes = kLanes<T, Vec<T>>;
  if (rows == 0) return;
  for (int64_t j = 0; j < columns; j += kPanel<T>) {
    const int64_t width = std::min(kPanel<T>, columns - j);
    int64_t k = 0;
    do {
      const int64_t deep = std::min(kDepth, depth - k);
      const Into now = k == 0 ? into : Into::add;
      const T kept = k == 0 ? keep : T(1);
      const T* from = a + k * a_column;
      const T* panel = b.data + (j / kPanel<T>)*b.panel + k * b.row;
      const T* start = k == 0 && bias ? bias + j : nullptr;
      const bool beside = b.row != kPanel<T> && k + deep == depth;
      const T* next = beside ? b.data + (j / kPanel<T> + 1) * b.panel : panel + deep * b.row;
      int64_t next_row = b.row;
      if (then.data && k + deep == depth && j + kPanel<T> >= columns) {
        next = then.data;
        next_row = then.row;
      }
      if (width == kPanel<T>) {
        alignas(64) T copy[kDepth * kPanel<T>];
        const bool copies = share_sets<T>(b.row) && rows >= 4 * kRowsPerTile;
        if (copies)
          for (int64_t n = 0; n < deep; ++n)
            for (int64_t v = 0; v < kPanel<T>; v += lanes)
              store(copy + n * kPanel<T> + v, load<Vec<T>>(panel + n * b.row + v));
        column_of_tiles<T, Vec<T>, kVectorsPerPanel>(rows, deep, from, a_row, a_column, copies ? copy : panel,
                                                     copies ? kPanel<T> : b.row, start, c + j, c_row, now, kept, next,
                                                     next_row, deep, ahead);
      } else {
        int64_t v = 0;
        for (; v + lanes <= width; v += lanes)
          column_of_tiles<T, Vec<T>, 1>(rows, deep, from, a_row, a_column, panel + v, b.row,
                                        start ? start + v : nullptr, c + j + v, c_row, now, kept, next, next_row, deep,
                                        ahead);
        for (; v < width; ++v)
          column_of_tiles<T, T, 1>(rows, deep, from, a_row, a_column, panel + v, b.row, start ? start + v : nullptr,
                                   c + j + v, c_row, now, kept, next, next_row, deep, ahead);
      }
      k += deep;
    } while (k < depth);
  }
}

#define INSTANTIATE(T)                                                                                           \
  template void pack_panel(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, T*);                           \
  template void multiply(int64_t, int64_t, int64_t, const T*, int64_t, int64_t, RightSide<T>, T*, int64_t, Into, \
                         const T*, T, Ahead*, RightSide<T>);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace crossan_fast
