// Vectors as wide as the instruction set the file is compiled for, and conversions from the stored types.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace crossan_fast {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kVectorsPerPanel = 4;  // 6 × 4 accumulators, 4 of B and a broadcast: 29 of 32 registers
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kVectorsPerPanel = 2;  // 6 × 2 accumulators, 2 of B and a broadcast: 15 of 16 registers
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorsPerPanel = 2;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

// Lanes of V, where V is a vector or, for the tails, a single number.
template <class T, class V>
inline constexpr int kLanes = sizeof(V) / sizeof(T);

template <class V, class T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V, class T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

template <class V, class T>
inline V broadcast(T value) {
  return value - V{};  // x − 0 is x for every x; x + 0 is not for −0, and costs an addition
}

// Lane i of the result is lane pick(i) of a and b side by side. The compilers' own functions differ: clang takes
// constants alone, g++ 11 a vector alone.
template <auto pick, class V, int... i>
inline V shuffled(V a, V b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, pick(i)...);
#else
  using Index = decltype(a < b);
  return __builtin_shuffle(a, b, Index{pick(i)...});
#endif
}

template <class T, int width>
inline Vec<T> with_halves_added(Vec<T> value) {
  constexpr int lanes = kLanes<T, Vec<T>>;
  if constexpr (width == 0) {
    return value;
  } else {
    constexpr auto other = [](int i) { return i ^ width; };
    value += shuffled<other>(value, value, std::make_integer_sequence<int, lanes>{});
    return with_halves_added<T, width / 2>(value);
  }
}

template <class T>
inline T sum_of_lanes(Vec<T> value) {
  return with_halves_added<T, kLanes<T, Vec<T>> / 2>(value)[0];
}

// The types rows may be stored in; the numbers travel through the C++ boundary only.
enum class Stored { f64, f32, bf16, f16, f8e4m3, i8 };

inline int64_t bytes_of(Stored type) {
  constexpr int64_t bytes[] = {8, 4, 2, 2, 1, 1};
  return bytes[static_cast<int>(type)];
}

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// A number or a vector of them rounded to bf16, in the upper half of its bits: the lower is to be dropped.
template <class V, class Bits>
inline Bits bf16_above(V value) {
  const Bits bits = std::bit_cast<Bits>(value);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc00000u : rounded;
}

inline uint16_t to_bf16(float value) { return static_cast<uint16_t>(bf16_above<float, uint32_t>(value) >> 16); }

inline float from_f16(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
  if (exponent == 0x1fu) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
#endif
}

inline uint16_t to_f16(float value) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Adding 0.5 lines the last bit of a subnormal half up with the last bit of the float, and rounds there.
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(aligned) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
#endif
}

inline float from_f8e4m3(uint8_t bits) {
  const uint32_t exponent = (bits >> 3) & 0xfu, mantissa = bits & 0x7u;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80u) << 24;
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * 0x1p-9f;
    return sign ? -value : value;
  }
  if (exponent == 0xfu && mantissa == 0x7u) return std::bit_cast<float>(sign | 0x7fc00000u);
  return std::bit_cast<float>(sign | ((exponent + 120) << 23) | (mantissa << 20));
}

// to[i] = from[i] · scale for i < count; `from` holds `type`.
template <class T>
inline void convert_from(Stored type, const void* from, T* to, int64_t count, T scale) {
  switch (type) {
    case Stored::f64:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(static_cast<const double*>(from)[i]) * scale;
      break;
    case Stored::f32:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(static_cast<const float*>(from)[i]) * scale;
      break;
    case Stored::bf16:
      for (int64_t i = 0; i < count; ++i)
        to[i] = static_cast<T>(from_bf16(static_cast<const uint16_t*>(from)[i])) * scale;
      break;
    case Stored::f16:
      for (int64_t i = 0; i < count; ++i)
        to[i] = static_cast<T>(from_f16(static_cast<const uint16_t*>(from)[i])) * scale;
      break;
    case Stored::f8e4m3:
      for (int64_t i = 0; i < count; ++i)
        to[i] = static_cast<T>(from_f8e4m3(static_cast<const uint8_t*>(from)[i])) * scale;
      break;
    case Stored::i8:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(static_cast<const int8_t*>(from)[i]) * scale;
      break;
  }
}

// to[i] = from[i] for i < count, rounded to the nearest of `type` (a floating type).
template <class T>
inline void convert_to(Stored type, const T* from, void* to, int64_t count) {
  switch (type) {
    case Stored::f64:
      for (int64_t i = 0; i < count; ++i) static_cast<double*>(to)[i] = static_cast<double>(from[i]);
      break;
    case Stored::bf16:
      for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(to)[i] = to_bf16(static_cast<float>(from[i]));
      break;
    case Stored::f16:
      for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(to)[i] = to_f16(static_cast<float>(from[i]));
      break;
    default:
      for (int64_t i = 0; i < count; ++i) static_cast<float*>(to)[i] = static_cast<float>(from[i]);
  }
}

}  // namespace crossan_fast
