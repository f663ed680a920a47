// Passes over rows of items: weighted sums, their gradients, sums of columns. Memory of a thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "simd.h"

namespace crossan_fast {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

// Uninitialised memory on a cache line. Taken before threads start, so that a failure is an exception of the caller.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) {
    if (count == 0) return;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!memory_) throw std::bad_alloc();
  }
  T* data() const { return memory_.get(); }

 private:
  std::unique_ptr<T[], FreeMemory> memory_;
};

// A row stride that does not put a column's elements into few sets of the L1 cache.
template <class T>
int64_t padded(int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  return (width + line - 1) / line * line + line;
}

// `mix` for a number of sources known to the compiler, which then keeps weights and sums in registers.
template <class T, int count>
void mix_some(int64_t width, const T* h, T beta, const T* const* source, const T* weight, T* out) {
  constexpr int lanes = kLanes<T, Vec<T>>;
  int64_t d = 0;
  for (; d + 2 * lanes <= width; d += 2 * lanes) {
    Vec<T> sum[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[v] = h ? beta * load<Vec<T>>(h + d + v * lanes) : Vec<T>{};
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[v] += weight[j] * load<Vec<T>>(source[j] + d + v * lanes);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(out + d + v * lanes, sum[v]);
  }
  for (; d < width; ++d) {
    T sum = h ? beta * h[d] : T(0);
    for (int j = 0; j < count; ++j) sum += weight[j] * source[j][d];
    out[d] = sum;
  }
}

// out = beta · h + Σ_j weight[j] · source[j]; h null stands for zeros. `out` may be h.
template <class T>
void mix(int64_t width, const T* h, T beta, int count, const T* const* source, const T* weight, T* out) {
  switch (count) {
    case 1: return mix_some<T, 1>(width, h, beta, source, weight, out);
    case 2: return mix_some<T, 2>(width, h, beta, source, weight, out);
    case 3: return mix_some<T, 3>(width, h, beta, source, weight, out);
    case 4: return mix_some<T, 4>(width, h, beta, source, weight, out);
    default: break;
  }
  constexpr int lanes = kLanes<T, Vec<T>>;
  int64_t d = 0;
  for (; d + 4 * lanes <= width; d += 4 * lanes) {
    Vec<T> sum[4];
    for (int v = 0; v < 4; ++v) sum[v] = h ? beta * load<Vec<T>>(h + d + v * lanes) : Vec<T>{};
    for (int j = 0; j < count; ++j)
      for (int v = 0; v < 4; ++v) sum[v] += weight[j] * load<Vec<T>>(source[j] + d + v * lanes);
    for (int v = 0; v < 4; ++v) store(out + d + v * lanes, sum[v]);
  }
  for (; d < width; ++d) {
    T sum = h ? beta * h[d] : T(0);
    for (int j = 0; j < count; ++j) sum += weight[j] * source[j][d];
    out[d] = sum;
  }
}

// ⟨x, y⟩
template <class T>
T dot(int64_t width, const T* x, const T* y) {
  constexpr int lanes = kLanes<T, Vec<T>>;
  Vec<T> sum[2] = {};
  int64_t d = 0;
  for (; d + 2 * lanes <= width; d += 2 * lanes) {
    sum[0] += load<Vec<T>>(x + d) * load<Vec<T>>(y + d);
    sum[1] += load<Vec<T>>(x + d + lanes) * load<Vec<T>>(y + d + lanes);
  }
  T rest = 0;
  for (; d < width; ++d) rest += x[d] * y[d];
  return sum_of_lanes<T>(sum[0] + sum[1]) + rest;
}

// Together what a backward needs of one row of `mix`: out as there, dots[j] += ⟨dx, source[j]⟩ for j < count and
// dots[count] += ⟨dx, h⟩.
template <class T>
void mix_backward(int64_t width, const T* dx, const T* h, T beta, int count, const T* const* source, const T* weight,
                  T* out, double* dots) {
  constexpr int lanes = kLanes<T, Vec<T>>;
  constexpr int kFused = 8;
  if (count > kFused) {  // more modalities than anyone has: the same sums, a source at a time
    mix(width, h, beta, count, source, weight, out);
    for (int j = 0; j < count; ++j) dots[j] += static_cast<double>(dot(width, dx, source[j]));
    if (h) dots[count] += static_cast<double>(dot(width, dx, h));
    return;
  }
  Vec<T> sum[kFused + 1] = {};
  T rest[kFused + 1] = {};
  int64_t d = 0;
  for (; d + 4 * lanes <= width; d += 4 * lanes) {
    Vec<T> g[4], x[4];
    for (int v = 0; v < 4; ++v) {
      g[v] = load<Vec<T>>(dx + d + v * lanes);
      x[v] = Vec<T>{};
    }
    if (h) {
      Vec<T> part{};
      for (int v = 0; v < 4; ++v) {
        const Vec<T> value = load<Vec<T>>(h + d + v * lanes);
        x[v] = beta * value;
        part += g[v] * value;
      }
      sum[count] += part;
    }
    for (int j = 0; j < count; ++j) {
      Vec<T> part{};
      for (int v = 0; v < 4; ++v) {
        const Vec<T> value = load<Vec<T>>(source[j] + d + v * lanes);
        x[v] += weight[j] * value;
        part += g[v] * value;
      }
      sum[j] += part;
    }
    for (int v = 0; v < 4; ++v) store(out + d + v * lanes, x[v]);
  }
  for (; d < width; ++d) {
    const T g = dx[d];
    T x = 0;
    if (h) {
      x = beta * h[d];
      rest[count] += g * h[d];
    }
    for (int j = 0; j < count; ++j) {
      x += weight[j] * source[j][d];
      rest[j] += g * source[j][d];
    }
    out[d] = x;
  }
  for (int j = 0; j < count + (h ? 1 : 0); ++j)
    dots[j] += static_cast<double>(sum_of_lanes<T>(sum[j])) + static_cast<double>(rest[j]);
}

// sums = (sums +) Σ_i x[i, :], four rows at a time in double: such sums cancel more than products do.
template <class T>
void sum_rows(int64_t rows, int64_t width, const T* x, int64_t row, bool add, T* sums) {
  constexpr int64_t kColumns = 64;
  for (int64_t d = 0; d < width; d += kColumns) {
    const int64_t count = std::min(kColumns, width - d);
    double sum[kColumns] = {};
    const T* from = x + d;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4, from += 4 * row)
      for (int64_t j = 0; j < count; ++j)
        sum[j] += static_cast<double>((from[j] + from[row + j]) + (from[2 * row + j] + from[3 * row + j]));
    for (; i < rows; ++i, from += row)
      for (int64_t j = 0; j < count; ++j) sum[j] += static_cast<double>(from[j]);
    for (int64_t j = 0; j < count; ++j)
      sums[d + j] = static_cast<T>(add ? static_cast<double>(sums[d + j]) + sum[j] : sum[j]);
  }
}

}  // namespace crossan_fast
