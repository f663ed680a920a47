// A torch without products in bf16, as it is on a CPU that has none.
#pragma once

#include <ATen/core/Tensor.h>

namespace at {

struct BFloat16 {
  uint16_t bits;
};

namespace native::cpublas {

inline bool could_pack(ScalarType) { return false; }
inline void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const BFloat16*, const BFloat16*, float*,
                   bool) {
  throw c10::Error("no brgemm");
}
inline void brgemm_release(bool) {}

}  // namespace native::cpublas
}  // namespace at
