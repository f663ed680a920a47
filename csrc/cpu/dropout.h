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
        scale_(1.0 / (1.0 - probability)),
        low_(static_cast<uint32_t>(seed)),
        high_(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {}

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
  void block(uint32_t first, uint32_t site, uint64_t place, uint32_t* __restrict words) const {
    const auto place_low = static_cast<uint32_t>(place), place_high = static_cast<uint32_t>(place >> 32);
    constexpr uint32_t left = 0xD2511F53u, right = 0xCD9E8D57u, step_low = 0x9E3779B9u, step_high = 0xBB67AE85u;
#if defined(__AVX512F__)
    // Half a counter's state in each 64-bit lane: a product then is where it is needed, and nothing is shuffled.
    constexpr int kHalf = kLanes / 2;
    for (int half = 0; half < 2; ++half) {
      const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
      __m512i a = _mm512_add_epi64(lanes, _mm512_set1_epi64(first + half * kHalf));
      __m512i b = _mm512_set1_epi64(place_low), c = _mm512_set1_epi64(site), d = _mm512_set1_epi64(place_high);
      const __m512i by_left = _mm512_set1_epi64(left), by_right = _mm512_set1_epi64(right);
      uint32_t low = low_, high = high_;
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round, low += step_low, high += step_high) {
        // Only the low 32 bits of a lane count; what stands above them is never read.
        const __m512i p = _mm512_mul_epu32(a, by_left), q = _mm512_mul_epu32(c, by_right);
        a = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(q, 32), b), _mm512_set1_epi64(low));
        c = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p, 32), d), _mm512_set1_epi64(high));
        b = q;
        d = p;
      }
      const __m512i state[] = {a, b, c, d};
      for (int word = 0; word < 4; ++word)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + word * kLanes + half * kHalf),
                            _mm512_cvtepi64_epi32(state[word]));
    }
#else
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      uint32_t a = first + lane, b = place_low, c = site, d = place_high, low = low_, high = high_;
      for (int round = 0; round < 10; ++round, low += step_low, high += step_high) {
        const uint64_t p = uint64_t{left} * a, q = uint64_t{right} * c;
        a = static_cast<uint32_t>(q >> 32) ^ b ^ low;
        c = static_cast<uint32_t>(p >> 32) ^ d ^ high;
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
  uint32_t low_ = 0, high_ = 0;
};

}  // namespace crossan_fast
