// Storage types and their conversions, the same on the device and on the emulator.
#pragma once

#include "platform.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#else
#include <cmath>
#endif

namespace crossan_fast {

// How a tensor's elements are stored; the numbers are part of the C interface.
enum Kind : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat8 = 3, kInt8 = 4 };

__host__ __device__ constexpr int element_size(int kind) { return kind == kFloat32 ? 4 : kind <= kBFloat16 ? 2 : 1; }

struct half16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <class T>
constexpr int kind_of = 0;
template <>
inline constexpr int kind_of<half16> = kFloat16;
template <>
inline constexpr int kind_of<bfloat16> = kBFloat16;

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

__device__ __forceinline__ uint32_t float_to_bits(float value) {
#if defined(__CUDACC__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(int8_t value) { return static_cast<float>(value); }
__device__ __forceinline__ float to_float(bfloat16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(half16 value) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(value.bits));
#else
  int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                    : exponent == 0 ? std::ldexp(float(fraction), -24)
                                    : std::ldexp(float(fraction + 1024), exponent - 25);
  return value.bits & 0x8000 ? -magnitude : magnitude;
#endif
}

// float8_e4m3fn: no infinities, one NaN.
__device__ __forceinline__ float float8_to_float(uint8_t bits) {
#if defined(__CUDACC__)
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3)));
#else
  int exponent = bits >> 3 & 15, fraction = bits & 7;
  float magnitude = (bits & 127) == 127 ? NAN
                    : exponent == 0     ? std::ldexp(float(fraction), -9)
                                        : std::ldexp(float(fraction + 8), exponent - 10);
  return bits & 0x80 ? -magnitude : magnitude;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) {
#if defined(__CUDACC__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  uint32_t bits = float_to_bits(value);
  if (value != value) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
#endif
}
template <>
__device__ __forceinline__ half16 from_float<half16>(float value) {
#if defined(__CUDACC__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  uint16_t sign = float_to_bits(value) >> 16 & 0x8000;
  float magnitude = std::fabs(value);
  if (value != value) return {0x7FFF};
  if (magnitude == 0) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  int exponent;
  std::frexp(magnitude, &exponent);
  exponent = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last place
  float units = std::nearbyint(std::ldexp(magnitude, -exponent));
  // `units` carries the implicit bit, which adds one to the biased exponent by itself.
  uint32_t bits = static_cast<uint32_t>(units) + (static_cast<uint32_t>(exponent + 24) << 10);
  return {static_cast<uint16_t>(sign | bits)};
#endif
}

template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <class T>
__device__ __forceinline__ float low_half(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
__device__ __forceinline__ float high_half(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// Eight stored elements of at most 16 bits: what one thread moves at a time.
struct alignas(16) Raw8 {
  uint32_t words[4];
};

#if !defined(__CUDACC__)
// A GPU ends the launch at such an access; the host's processor would not notice.
inline void expect_aligned(const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) device_fail("misaligned address, bytes at a time", bytes);
}
#endif

__device__ __forceinline__ Raw8 load16(const void* source) {
#if defined(__CUDACC__)
  uint4 value = *static_cast<const uint4*>(source);
  return {{value.x, value.y, value.z, value.w}};
#else
  expect_aligned(source, 16);
  Raw8 value;
  std::memcpy(&value, source, 16);
  return value;
#endif
}

__device__ __forceinline__ void store16(void* target, const Raw8& value) {
#if defined(__CUDACC__)
  *static_cast<uint4*>(target) = make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]);
#else
  expect_aligned(target, 16);
  std::memcpy(target, &value, 16);
#endif
}

// Loads eight elements of a cached state through the read-only path: 16 bytes, or 8 of a one-byte type.
__device__ __forceinline__ Raw8 load_state8(const unsigned char* source, int kind) {
#if defined(__CUDACC__)
  if (kind <= kBFloat16) {
    uint4 value = __ldg(reinterpret_cast<const uint4*>(source));
    return {{value.x, value.y, value.z, value.w}};
  }
  uint2 value = __ldg(reinterpret_cast<const uint2*>(source));
  return {{value.x, value.y, 0, 0}};
#else
  expect_aligned(source, kind <= kBFloat16 ? 16 : 8);
  Raw8 value = {};
  std::memcpy(&value, source, kind <= kBFloat16 ? 16 : 8);
  return value;
#endif
}

template <class T>
__device__ __forceinline__ void unpack8(const Raw8& raw, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = low_half<T>(raw.words[i]);
    values[2 * i + 1] = high_half<T>(raw.words[i]);
  }
}

__device__ __forceinline__ void unpack8(const Raw8& raw, int kind, float (&values)[8]) {
  if (kind == kBFloat16) {
    unpack8<bfloat16>(raw, values);
  } else if (kind == kFloat16) {
    unpack8<half16>(raw, values);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint8_t byte = raw.words[i / 4] >> (8 * (i % 4));
      values[i] = kind == kFloat8 ? float8_to_float(byte) : to_float(static_cast<int8_t>(byte));
    }
  }
}

template <class T>
__device__ __forceinline__ Raw8 pack8(const float (&values)[8]) {
  Raw8 raw;
#pragma unroll
  for (int i = 0; i < 4; ++i) raw.words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
  return raw;
}

// One stored element of any kind.
__device__ __forceinline__ float load_element(const void* source, int64_t index, int kind) {
  switch (kind) {
    case kFloat32: return static_cast<const float*>(source)[index];
    case kFloat16: return to_float(static_cast<const half16*>(source)[index]);
    case kBFloat16: return to_float(static_cast<const bfloat16*>(source)[index]);
    case kFloat8: return float8_to_float(static_cast<const uint8_t*>(source)[index]);
    default: return to_float(static_cast<const int8_t*>(source)[index]);
  }
}

__device__ __forceinline__ void store_element(void* target, int64_t index, int kind, float value) {
  switch (kind) {
    case kFloat32: static_cast<float*>(target)[index] = value; break;
    case kFloat16: static_cast<half16*>(target)[index] = from_float<half16>(value); break;
    default: static_cast<bfloat16*>(target)[index] = from_float<bfloat16>(value); break;
  }
}

// Ids are int64 or int32; `wide` says which. Null ids: the row itself.
__device__ __forceinline__ int64_t load_id(const void* ids, int64_t index, bool wide) {
  if (ids == nullptr) return index;
  return wide ? static_cast<const int64_t*>(ids)[index] : static_cast<const int32_t*>(ids)[index];
}

// The row to read for item `index`, known to exist.
__device__ __forceinline__ int64_t checked_row(const void* ids, int64_t index, bool wide, int64_t rows) {
  int64_t row = load_id(ids, index, wide);
  if (row < 0 || row >= rows) {
    device_fail("ids: an id is outside of the states' rows", row);
    return 0;
  }
  return row;
}

}  // namespace crossan_fast
