// The conversions of simd.h and the functions of functions.h against plain arithmetic in double.
#include <cmath>

#include "cpu/functions.h"
#include "cpu/pairs.h"
#include "driver.h"

namespace crossan_fast::arm {
namespace {

// A binary format: its digits after the point, the exponent of its smallest normal number, its largest finite number.
struct Format {
  int digits, lowest, bias, exponent_bits;
  double top;
  bool infinite;  // whether exponents of ones are infinities and NaN; else all ones alone is NaN
};
constexpr Format kBf16{7, -126, 127, 8, 0x1.FEp127, true}, kF16{10, -14, 15, 5, 65504, true},
    kF8{3, -6, 7, 4, 448, false};

double decoded(const Format& f, uint32_t bits) {
  const uint32_t mantissa = bits & ((1u << f.digits) - 1), ones = (1u << f.exponent_bits) - 1;
  const uint32_t exponent = bits >> f.digits & ones;
  const double sign = bits >> (f.digits + f.exponent_bits) & 1u ? -1 : 1;
  if (exponent == ones && f.infinite) return mantissa == 0 ? sign * INFINITY : NAN;
  if (exponent == ones && mantissa == (1u << f.digits) - 1) return NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, f.lowest - f.digits);
  return sign * std::ldexp(1.0 + std::ldexp(mantissa, -f.digits), static_cast<int>(exponent) - f.bias);
}

// The bits of the nearest number of a format of 16 bits; of two, the even one. A NaN is the quiet one of its sign.
uint16_t encoded(const Format& f, float value) {
  const uint32_t ones = ((1u << f.exponent_bits) - 1) << f.digits;
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0;
  if (std::isnan(value)) return static_cast<uint16_t>(sign | ones | 1u << (f.digits - 1));
  const double size = std::fabs(static_cast<double>(value));
  const int exponent = size == 0 || std::isinf(size) ? f.lowest : std::max(std::ilogb(size), f.lowest);
  const double steps = std::nearbyint(std::ldexp(size, f.digits - exponent));  // exact until it rounds
  if (std::ldexp(steps, exponent - f.digits) > f.top) return static_cast<uint16_t>(sign | ones);
  const auto whole = static_cast<uint32_t>(steps);  // a first digit carries into the exponent by itself
  const auto above = static_cast<uint32_t>(exponent - f.lowest) << f.digits;
  return static_cast<uint16_t>(sign | (whole + above));
}

uint16_t quiet(const Format& f, uint16_t bits) {
  const uint32_t ones = ((1u << f.exponent_bits) - 1) << f.digits;
  if ((bits & 0x7fffu) <= ones) return bits;
  return static_cast<uint16_t>((bits & 0x8000u) | ones | 1u << (f.digits - 1));
}

// A number and, where it is zero, its sign.
Outputs table(at::ScalarType type, const Format& f, int64_t count, at::ScalarType as) {
  const Tensor bits({count}, type), values({count}, as), signs({count}, as);
  for (int64_t i = 0; i < count; ++i) {
    if (count == 256)
      bits.mutable_data_ptr<uint8_t>()[i] = static_cast<uint8_t>(i);
    else
      bits.mutable_data_ptr<uint16_t>()[i] = static_cast<uint16_t>(i);
  }
  if (as == at::kFloat) {
    convert_from<float>(stored_type(type), bits.data_ptr(), values.mutable_data_ptr<float>(), count, 1);
    for (int64_t i = 0; i < count; ++i) {
      const float value = values.const_data_ptr<float>()[i];
      signs.mutable_data_ptr<float>()[i] = value == 0 ? std::copysign(1.0f, value) : 0;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const double value = decoded(f, static_cast<uint32_t>(i));
      values.mutable_data_ptr<double>()[i] = value;
      signs.mutable_data_ptr<double>()[i] = value == 0 ? std::copysign(1.0, value) : 0;
    }
  }
  return {{"values", values}, {"signs of zeros", signs}};
}

// Floats spread over all bits there are, and about every number between two neighbours of the format.
std::vector<float> floats(const Format& f) {
  constexpr uint32_t step = 2039;  // 2.1 million of them
  std::vector<float> all;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += step)
    all.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const auto here = static_cast<float>(decoded(f, h)), next = static_cast<float>(decoded(f, (h + 1) & 0xffffu));
    const auto middle = std::isfinite(next) ? here / 2 + next / 2 : here + here / (1 << (f.digits + 1));
    for (const float value : {here, middle})
      for (const uint32_t off : {~0u, 0u, 1u})
        all.push_back(std::bit_cast<float>(std::bit_cast<uint32_t>(value) + off));
  }
  return all;
}

// Digests of parts of the list, which tell a difference and about where it is.
Tensor digests(const std::vector<uint16_t>& bits) {
  constexpr size_t parts = 64;
  const Tensor out({int64_t{parts}}, at::kLong);
  const size_t each = (bits.size() + parts - 1) / parts;
  for (size_t part = 0; part < parts; ++part) {
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
    for (size_t i = part * each; i < std::min(bits.size(), (part + 1) * each); ++i)
      hash = (hash ^ bits[i]) * 0x100000001b3u;
    out.mutable_data_ptr<int64_t>()[part] = static_cast<int64_t>(hash >> 12);
  }
  return out;
}

Outputs rounded(at::ScalarType type, const Format& f, at::ScalarType as) {
  const std::vector<float> from = floats(f);
  std::vector<uint16_t> bits(from.size()), rows(from.size() + 1);
  const auto count = static_cast<int64_t>(from.size());
  if (as == at::kDouble) {
    for (size_t i = 0; i < from.size(); ++i) bits[i] = encoded(f, from[i]);
    rows = bits;
  } else {
    convert_to(stored_type(type), from.data(), bits.data(), count);
    rows = bits;
    if (type == at::kBFloat16) {
      rows.resize(from.size() + 1);
      round_row(from.data(), count, rows.data());
      rows.resize(from.size());
    }
  }
  for (auto* list : {&bits, &rows})
    for (size_t i = 0; i < list->size(); ++i) {
      // No kernel tells NaNs by their sign, which bf16's drops.
      (*list)[i] = quiet(f, (*list)[i]);
      if (from[i] != from[i]) (*list)[i] &= 0x7fffu;
    }
  return {{"numbers", digests(bits)}, {"rows", digests(rows)}};
}

template <class F>
Tensor over(double low, double high, at::ScalarType as, const F& value) {
  constexpr int64_t count = 20'000;
  const Tensor out({count}, as);
  for (int64_t i = 0; i < count; ++i) {
    const auto x = static_cast<float>(low + (high - low) * static_cast<double>(i) / count);
    if (as == at::kFloat)
      out.mutable_data_ptr<float>()[i] = static_cast<float>(value(x));
    else
      out.mutable_data_ptr<double>()[i] = value(static_cast<double>(x));
  }
  return out;
}

// The quotient by the exponential in double: its relative error is what is promised.
template <class T>
double quotient(T x, T value) {
  return static_cast<double>(value) / std::exp(static_cast<double>(x));
}

template <class T>
T in_lanes(T x) {
  Vec<T> values[3] = {Vec<T>{} + T(1), Vec<T>{} + x, Vec<T>{}};
  exp_of_lanes(values);
  return values[1][kLanes<T, Vec<T>> - 1];
}

Outputs specials(at::ScalarType as) {
  const double points[] = {INFINITY, -INFINITY, NAN, 0.0, -1000.0, 1000.0};
  const Tensor out({int64_t{6}, int64_t{3}}, as);
  for (int64_t i = 0; i < 6; ++i) {
    const double x = points[i];
    const auto f = static_cast<float>(x);
    const double wide[] = {std::exp(x), std::exp(x), std::erf(x)};
    const float narrow[] = {fast_exp(f), in_lanes(f), fast_erf(f)};
    for (int64_t j = 0; j < 3; ++j) {
      if (as == at::kFloat)
        out.mutable_data_ptr<float>()[3 * i + j] = narrow[j];
      else
        out.mutable_data_ptr<double>()[3 * i + j] = wide[j];
    }
  }
  return {{"at infinity, NaN and far off", out}};
}

}  // namespace

void judge_conversions() {
  judge("from bf16, all bits", 0, [](auto as) { return table(at::kBFloat16, kBf16, 65536, as); });
  judge("from f16, all bits", 0, [](auto as) { return table(at::kHalf, kF16, 65536, as); });
  judge("from f8e4m3, all bits", 0, [](auto as) { return table(at::kFloat8_e4m3fn, kF8, 256, as); });
  judge("to bf16, 2.5 million floats", 0, [](auto as) { return rounded(at::kBFloat16, kBf16, as); });
  judge("to f16, 2.5 million floats", 0, [](auto as) { return rounded(at::kHalf, kF16, as); });
}

void judge_functions() {
  judge("exp, erf and gelu", 1, [](at::ScalarType as) -> Outputs {
    return {
        {"fast_exp by exp", over(-86.9, 88.6, as, [](auto x) { return quotient(x, fast_exp(x)); })},
        {"exp_of_lanes by exp", over(-86.9, 88.2, as, [](auto x) { return quotient(x, in_lanes(x)); })},
        {"fast_erf", over(-5, 5, as, [](auto x) { return fast_erf(x); })},
        {"gelu", over(-10, 10, as, [](auto x) { return gelu(x); })},
    };
  });
  judge("exp and erf", 0, specials);
}

}  // namespace crossan_fast::arm
