// exp, erf and the activations, as straight-line code that the compiler turns into vectors for float.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace crossan_fast {

enum class Activation { gelu, relu };

inline double fast_exp(double x) { return std::exp(x); }

// e^x for x in [−87, 88.7], where it is a normal number; relative error below 2e-7: 2^(x / ln 2) by its nearest
// integer and a minimax polynomial of the rest.
inline float exp_within(float x) {
  constexpr float magic = 0x1.8p23f;  // adding it rounds to the nearest integer and leaves that in the low bits
  const float shifted = x * 1.44269504f + magic;
  const float whole = shifted - magic;
  // ln 2 in two parts, so that the rest keeps all its bits.
  const float rest = (x - whole * 0.693145752f - whole * 1.42860677e-6f) * 1.44269504f;
  float p = 0.0001534580806f;
  p = p * rest + 0.001339993090f;
  p = p * rest + 0.009618489072f;
  p = p * rest + 0.05550328642f;
  p = p * rest + 0.2402264625f;
  p = p * rest + 0.6931471825f;
  p = p * rest + 1.0f;
  // Times 2^whole: added to the exponent of p. The magic's own bits leave at the top.
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
}

inline float fast_exp(float x) {
  // Below −87 the result is less than every normal number: zero. −inf takes this way too.
  const float kept = x < -87.0f ? -87.0f : (x > 88.7f ? 88.7f : x);
  const float result = x < -87.0f ? 0.0f : (x > 88.7f ? INFINITY : exp_within(kept));
  return x != x ? x : result;
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
  inner = inner * u + 0.1283791661f;  // one less than it is: x is added at the end, and bits are not lost
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

template <class T>
inline T gelu_slope(T z) {
  const T density = fast_exp(T(-0.5) * z * z) * T(0.39894228040143267794);
  return T(0.5) * (T(1) + fast_erf(z * T(0.70710678118654752440))) + z * density;
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

// g ← g · act'(z)
template <class T>
void activate_backward(Activation kind, int64_t count, const T* __restrict z, T* __restrict g) {
  if (kind == Activation::gelu)
    for (int64_t i = 0; i < count; ++i) g[i] *= gelu_slope(z[i]);
  else
    for (int64_t i = 0; i < count; ++i) g[i] = z[i] > T(0) ? g[i] : T(0);
}

}  // namespace crossan_fast
