// Dropout whose mask is a function of (seed, site, place, column) alone, so that no mask is stored and none depends
// on threads or on how rows are packed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace crossan_fast {

// Counter-based random numbers, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
// keyed by the seed. A block of 64 columns is 16 counters (column group, low place, site, high place) of 4 words:
// column c has word c % 64 / 16 of counter c / 64 · 16 + c % 16, so that a vector of counters gives vectors of columns.
class Dropout {
 public:
  static constexpr int64_t kLanes = 16, kColumns = 4 * kLanes;

  Dropout() = default;
  Dropout(double probability, int64_t seed)
      : threshold_(static_cast<uint32_t>(std::min(std::round(probability * 0x1p32), 0x1p32 - 1))),
        scale_(1.0 / (1.0 - probability)) {
    auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < kRounds; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
      low_[round] = low;
      high_[round] = high;
    }
  }

  bool on() const { return threshold_ > 0; }

  // factors[c] = 0 where column c is dropped, 1 / (1 − p) where it is kept.
  template <class T>
  void draw(uint32_t site, int64_t place, int64_t columns, T* factors) const {
    uint32_t words[kColumns];
    const T scale = static_cast<T>(scale_);
    for (int64_t c = 0; c < columns; c += kColumns) {
      block(static_cast<uint32_t>(c / kColumns * kLanes), site, static_cast<uint64_t>(place), words);
      const int64_t count = std::min(kColumns, columns - c);
      for (int64_t j = 0; j < count; ++j) factors[c + j] = words[j] < threshold_ ? T(0) : scale;
    }
  }

 private:
  static constexpr int kRounds = 10;

  void block(uint32_t first, uint32_t site, uint64_t place, uint32_t* __restrict words) const {
    const auto place_low = static_cast<uint32_t>(place), place_high = static_cast<uint32_t>(place >> 32);
    constexpr uint32_t left = 0xD2511F53u, right = 0xCD9E8D57u;
#if defined(__AVX512F__)
    // A counter's words in 64-bit lanes: a product then is where it is needed, and nothing is shuffled. Only the low
    // 32 bits of a lane count; what stands above them is never read.
    const __m512i by_left = _mm512_set1_epi64(left), by_right = _mm512_set1_epi64(right);
    const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    __m512i a[2], b[2], c[2], d[2];
    for (int half = 0; half < 2; ++half) {
      a[half] = _mm512_add_epi64(lanes, _mm512_set1_epi64(first + half * kLanes / 2));
      b[half] = _mm512_set1_epi64(place_low);
      c[half] = _mm512_set1_epi64(site);
      d[half] = _mm512_set1_epi64(place_high);
    }
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      const __m512i low = _mm512_set1_epi64(low_[round]), high = _mm512_set1_epi64(high_[round]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i p = _mm512_mul_epu32(a[half], by_left), q = _mm512_mul_epu32(c[half], by_right);
        a[half] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(q, 32), b[half]), low);
        c[half] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p, 32), d[half]), high);
        b[half] = q;
        d[half] = p;
      }
    }
    const auto put = [&](int word, const __m512i* halves) {
      const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi64_epi32(halves[0]));
      _mm512_storeu_si512(words + word * kLanes, _mm512_inserti64x4(low, _mm512_cvtepi64_epi32(halves[1]), 1));
    };
    put(0, a);
    put(1, b);
    put(2, c);
    put(3, d);
#else
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      uint32_t a = first + lane, b = place_low, c = site, d = place_high;
      for (int round = 0; round < kRounds; ++round) {
        const uint64_t p = uint64_t{left} * a, q = uint64_t{right} * c;
        a = static_cast<uint32_t>(q >> 32 ^ b ^ low_[round]);
        c = static_cast<uint32_t>(p >> 32 ^ d ^ high_[round]);
        b = static_cast<uint32_t>(q);
        d = static_cast<uint32_t>(p);
      }
      words[lane] = a;
      words[kLanes + lane] = b;
      words[2 * kLanes + lane] = c;
      words[3 * kLanes + lane] = d;
    }
#endif
  }

  uint32_t threshold_ = 0;
  double scale_ = 1;
  int64_t low_[kRounds] = {}, high_[kRounds] = {};  // keys, as wide as the lanes that they are added to
};

}  // namespace crossan_fast
