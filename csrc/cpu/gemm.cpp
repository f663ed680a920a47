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

// sum[v] += left · right[v] for the vectors of a row. A tile of AVX2 takes 15 of the 16 registers: left to themselves,
// compilers keep copies of some and load right sides again, and each load is time where a core's other thread is busy.
template <class T, class V, int vectors>
inline __attribute__((always_inline)) void accumulate(const T* left, const V (&right)[vectors], V (&sum)[vectors]) {
#if defined(__FMA__) && !defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>> && vectors == 2) {
    V everywhere, first = sum[0], second = sum[1];
    asm("vbroadcastss %[left], %[everywhere]\n\t"
        "vfmadd231ps %[right0], %[everywhere], %[first]\n\t"
        "vfmadd231ps %[right1], %[everywhere], %[second]"
        : [first] "+x"(first), [second] "+x"(second), [everywhere] "=&x"(everywhere)
        : [left] "m"(*left), [right0] "x"(right[0]), [right1] "x"(right[1]));
    sum[0] = first;
    sum[1] = second;
    return;
  }
#endif
  const V everywhere = broadcast<V>(*left);
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) sum[v] = plus_product(sum[v], everywhere, right[v]);
}

// A stride that the compiler knows.
template <int64_t value>
using Known = std::integral_constant<int64_t, value>;

inline constexpr int kGroup = 4;  // steps of a tile

// The next step's place. A compiler would keep every step's address of a group by itself, for which there are not
// registers enough; by a known stride they are constants in the instructions.
template <class T>
inline __attribute__((always_inline)) void walk(const T*& at, int64_t stride) {
  at += stride;
  asm("" : "+r"(at));
}
template <class T, int64_t stride>
inline __attribute__((always_inline)) void walk(const T*& at, Known<stride>) {
  at += stride;
}

// C[rows, vectors·lanes] of one tile. The sum over k starts at zero (or the bias) and meets C only at its end:
// long sums are thus built from short ones, which keeps their rounding small.
//
// Its steps come in groups whose addresses differ by constants: beside the 12 FMAs of AVX2's tile and their 8 loads a
// step has hardly an instruction then, which is felt where a core's other thread is busy.
template <class T, class V, int rows, int vectors, class ARow, class AColumn, class BRow>
inline __attribute__((always_inline)) void tile(int64_t depth, const T* a, ARow a_row, AColumn a_column, const T* b,
                                                BRow b_row, const T* bias, T* c, int64_t c_row, Into into, T keep,
                                                Fetch next, Ahead* ahead = nullptr) {
  constexpr int lanes = kLanes<T, V>;
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const V start = bias ? load<V>(bias + v * lanes) : V{};
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) sum[i][v] = start;
  }
  int64_t rest = depth;
  const auto steps = [&]<int64_t count>(Known<count>, const char* piece = nullptr) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int n = 0; n < count; ++n) {
      if (n % kGroup == 0) {
        __builtin_prefetch(next.data, 0, 2);
        next.data += next.step;
      }
      if (piece) __builtin_prefetch(piece + n * 64, 0, 2);
      V right[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) right[v] = load<V>(b + v * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) accumulate(a + i * a_row, right, sum[i]);
      walk(a, a_column);
      walk(b, b_row);
    }
    rest -= count;
  };
  // C first, then what comes after.
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
#pragma GCC unroll 1
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int64_t n = 0; n < vectors * lanes; n += kLine) __builtin_prefetch(c + i * c_row + n, 1);
    if (rest >= kGroup) steps(Known<kGroup>{});
  }
  if (ahead) {
    for (int64_t lines = kPanel<T> * 3 / 4; lines > 0 && rest >= Ahead::kPiece; lines -= Ahead::kPiece) {
      const char* piece = ahead->piece();
      if (!piece) break;
      steps(Known<Ahead::kPiece>{}, piece);
    }
  }
#pragma GCC unroll 1
  while (rest >= kGroup) steps(Known<kGroup>{});
#pragma GCC unroll 1
  while (rest > 0) steps(Known<1>{});
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      T* to = c + i * c_row + v * lanes;
      store(to, into == Into::add ? keep * load<V>(to) + sum[i][v] : sum[i][v]);
    }
}

// Fewer rows than a tile has.
template <class T, class V, int vectors>
void last_rows(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row,
               const T* bias, T* c, int64_t c_row, Into into, T keep) {
  const auto run = [&](auto count) {
    tile<T, V, count, vectors>(depth, a, a_row, a_column, b, b_row, bias, c, c_row, into, keep,
                               Fetch{reinterpret_cast<const char*>(b), 0});
  };
  switch (rows) {
    case 5: return run(Known<5>{});
    case 4: return run(Known<4>{});
    case 3: return run(Known<3>{});
    case 2: return run(Known<2>{});
    case 1: return run(Known<1>{});
    default: return;
  }
}

template <class T, class V, int vectors, class ARow, class AColumn, class BRow>
void column_of_tiles(int64_t rows, int64_t depth, const T* a, ARow a_row, AColumn a_column, const T* b, BRow b_row,
                     const T* bias, T* c, int64_t c_row, Into into, T keep, const T* next, int64_t next_row,
                     int64_t next_rows, Ahead* ahead) {
  int64_t i = 0;
  const int64_t tiles = rows / kRowsPerTile;
  constexpr int64_t kSize = sizeof(T), kLines = std::max<int64_t>(1, kPanel<T> * kSize / 64);
  // Where rows of B touch, the tiles share the next rows evenly; else each takes a line of every fourth.
  const auto share = [&](int64_t n) -> Fetch {
    const char* from = reinterpret_cast<const char*>(next);
    if (next_row == kPanel<T>) {
      const int64_t step = next_rows * next_row * kSize / std::max<int64_t>(1, tiles * depth) + 1;
      return {from + n * depth * step, step * kGroup};
    }
    return {from + n % kLines * 64 + n / kLines % kGroup * next_row * kSize, next_row * kSize * kGroup};
  };
  for (int n = 0; i + kRowsPerTile <= rows; i += kRowsPerTile, ++n) {
    tile<T, V, kRowsPerTile, vectors>(depth, a + i * a_row, a_row, a_column, b, b_row, bias, c + i * c_row, c_row, into,
                                      keep, share(n), ahead);
  }
  last_rows<T, V, vectors>(rows - i, depth, a + i * a_row, a_row, a_column, b, b_row, bias, c + i * c_row, c_row, into,
                           keep);
}

// The same of whole panels, in float by strides that the compiler knows where they are those of most products.
template <class T, class... Rest>
void column_of_panels(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b,
                      int64_t b_row, Rest... rest) {
  const auto by = [&](auto row, auto column, auto b_stride) {
    column_of_tiles<T, Vec<T>, kVectorsPerPanel>(rows, depth, a, row, column, b, b_stride, rest...);
  };
  const auto by_panel = [&](auto row, auto column) {
    return b_row == kPanel<T> ? by(row, column, Known<kPanel<T>>{}) : by(row, column, b_row);
  };
  if constexpr (std::is_same_v<T, float>) {
    if (a_column == 1) return by_panel(a_row, Known<1>{});
    if (a_row == 1) return by_panel(Known<1>{}, a_column);
  }
  by(a_row, a_column, b_row);
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
        column_of_panels<T>(rows, deep, from, a_row, a_column, copies ? copy : panel, copies ? kPanel<T> : b.row, start,
                            c + j, c_row, now, kept, next, next_row, deep, ahead);
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
