// exp, erf and the activations, as straight-line code that the compiler turns into vectors for float.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace crossan_fast {

enum class Activation { gelu, relu };

inline double fast_exp(double x) { return std::exp(x); }

// e^x for |x| ≤ ½ ln 2: the coefficients of a minimax polynomial, the highest first.
inline constexpr float kExp[] = {
    0.001383684244f, 0.008374815605f, 0.04166822607f, 0.1666641976f, 0.4999999075f, 1.000000003f, 1.0f};
// ln 2 in two parts, the first of so few bits that its products with integers are exact.
inline constexpr float kLn2[] = {0.693145752f, 1.42860677e-6f};

// e^x for x in [−87, 88.7], where it is a normal number; relative error below 2e-7: 2^(x / ln 2) by its nearest
// integer, times e to the rest.
inline float exp_within(float x) {
  constexpr float magic = 0x1.8p23f;  // adding it rounds to the nearest integer and leaves that in the low bits
  const float shifted = x * 1.44269504f + magic;
  const float whole = shifted - magic;
  const float rest = x - whole * kLn2[0] - whole * kLn2[1];
  float p = kExp[0];
#pragma GCC unroll 8
  for (int k = 1; k < 7; ++k) p = p * rest + kExp[k];
  // Times 2^whole: added to the exponent of p. The magic's own bits leave at the top.
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
}

inline float fast_exp(float x) {
  // Below −87 the result is less than every normal number: zero. −inf takes this way too.
  const float kept = x < -87.0f ? -87.0f : (x > 88.7f ? 88.7f : x);
  const float result = x < -87.0f ? 0.0f : (x > 88.7f ? INFINITY : exp_within(kept));
  return x != x ? x : result;
}

// x where it lies in [low, high], else the nearer of the two; NaN stays.
inline Vec<float> clamped(Vec<float> x, float low, float high) {
#if defined(__AVX512F__)
  return _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x));
#else
  x = x < low ? Vec<float>{} + low : x;
  return x > high ? Vec<float>{} + high : x;
#endif
}

// e^x of `count` vectors, in place: 0 below −87.7, infinity above 88.4, NaN of NaN. Step by step through all of them,
// since one alone is a chain of operations that leaves the core waiting.
template <int count>
inline void exp_of_lanes(Vec<float> (&x)[count]) {
  constexpr float magic = 0x1.8p23f + 127.0f;  // with the exponent's bias: the low bits are those of 2^whole
  Vec<float> shifted[count], result[count];
#pragma GCC unroll 8
  for (int v = 0; v < count; ++v) x[v] = clamped(x[v], -88.0f, 88.7f);
#pragma GCC unroll 8
  for (int v = 0; v < count; ++v) shifted[v] = x[v] * 1.44269504f + magic;
#pragma GCC unroll 8
  for (int v = 0; v < count; ++v) x[v] -= (shifted[v] - magic) * kLn2[0];
#pragma GCC unroll 8
  for (int v = 0; v < count; ++v) x[v] -= (shifted[v] - magic) * kLn2[1];
#pragma GCC unroll 8
  for (int v = 0; v < count; ++v) result[v] = x[v] * kExp[0] + kExp[1];
#pragma GCC unroll 8
  for (int k = 2; k < 7; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < count; ++v) result[v] = result[v] * x[v] + kExp[k];
#pragma GCC unroll 8
  for (int v = 0; v < count; ++v)
    x[v] = result[v] * std::bit_cast<Vec<float>>(std::bit_cast<Vec<int32_t>>(shifted[v]) << 23);
}

template <int count>
inline void exp_of_lanes(Vec<double> (&x)[count]) {
  for (Vec<double>& vector : x)
    for (int lane = 0; lane < kLanes<double, Vec<double>>; ++lane) vector[lane] = fast_exp(vector[lane]);
}

inline double fast_erf(double x) { return std::erf(x); }

// Always inline: a call would keep the loops around it from becoming vectors.
inline __attribute__((always_inline)) float fast_erf(float x) {
  const float size = std::fabs(x), u = x * x;
  float inner = 7.853857824e-05f;
  inner = inner * u - 0.0008010192541f;
  inner = inner * u + 0.005188327748f;
  inner = inner * u - 0.02685381100f;
  inner = inner * u + 0.1128358543f;
  inner = inner * u - 0.3761262596f;
  inner = inner * u + 0.1283791661f;          // one less than it is: x is added at the end, and bits are not lost
  const float t = size > 4.0f ? 4.0f : size;  // erf(4) is 1 in float
  float outer = 2.169770050e-05f;
  outer = outer * t - 0.0004414736759f;
  outer = outer * t + 0.004205289762f;
  outer = outer * t - 0.02521035261f;
  outer = outer * t + 0.1084221229f;
  outer = outer * t + 0.6332163811f;
  outer = outer * t + 1.129580379f;
  outer = outer * t - 0.0001884697413f;
  const float far = std::copysign(1.0f - exp_within(-outer), x);
  return size >= 1.0f ? far : inner * x + x;  // NaN goes with the near ones
}

template <class T>
inline T gelu(T z) {
  return z * T(0.5) * (T(1) + fast_erf(z * T(0.70710678118654752440)));
}

// a = act(z)
template <class T>
void activate(Activation kind, int64_t count, const T* __restrict z, T* __restrict a) {
  if (kind == Activation::gelu)
    for (int64_t i = 0; i < count; ++i) a[i] = gelu(z[i]);
  else
    for (int64_t i = 0; i < count; ++i) a[i] = z[i] > T(0) ? z[i] : (z[i] != z[i] ? z[i] : T(0));
}

// a = act(z) and slope = act'(z), which share the costly part.
template <class T>
void activate_both(Activation kind, int64_t count, const T* __restrict z, T* __restrict a, T* __restrict slope) {
  if (kind == Activation::gelu)
    for (int64_t i = 0; i < count; ++i) {
      const T below = T(0.5) * (T(1) + fast_erf(z[i] * T(0.70710678118654752440)));
      const T density = fast_exp(T(-0.5) * z[i] * z[i]) * T(0.39894228040143267794);
      a[i] = z[i] * below;
      slope[i] = below + z[i] * density;
    }
  else
    for (int64_t i = 0; i < count; ++i) {
      a[i] = z[i] > T(0) ? z[i] : (z[i] != z[i] ? z[i] : T(0));
      slope[i] = z[i] > T(0) ? T(1) : T(0);
    }
}

}  // namespace crossan_fast
