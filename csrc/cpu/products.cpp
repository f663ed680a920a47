#include "products.h"

#include <ATen/native/CPUBlas.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <string_view>

namespace crossan_fast {
namespace {

// torch's brgemm refuses by an error alone, its own or oneDNN's (where AVX-512 has no bf16): the smallest product
// tells.
bool tried_brgemm() {
  const uint16_t ones[2] = {0x3f80, 0x3f80};
  uint16_t pairs[32];
  std::fill_n(pairs, 32, uint16_t{0x3f80});
  float sums[16] = {};
  try {
    brgemm_panel(1, 16, 2, ones, 2, pairs, sums, 16, Into::add);
    end_brgemm();
  } catch (const std::exception&) {
    return false;
  }
  return std::all_of(sums, sums + 16, [](float sum) { return sum == 2; });
}

// Whether AVX-512 multiplies bf16 at twice the pace of fp32, as AMD's does from Zen 4 on; Intel's Cooper Lake, at the
// same pace, was not measured.
bool multiplies_pairs() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

struct Choice {
  bool brgemm;
  const char* reason;
};

Choice choose() {
  const char* wish = std::getenv("CROSSAN_FAST_CPU_BF16");
  const std::string_view wanted = wish ? wish : "auto";
  TORCH_CHECK_VALUE(wanted == "auto" || wanted == "brgemm" || wanted == "fp32",
                    "CROSSAN_FAST_CPU_BF16: expected 'auto', 'brgemm' or 'fp32', got '", std::string(wanted), "'");
  if (wanted == "fp32") return {false, "CROSSAN_FAST_CPU_BF16=fp32"};
  if (wanted == "brgemm") {
    TORCH_CHECK(has_brgemm(),
                "CROSSAN_FAST_CPU_BF16: 'brgemm' was asked for, but torch has it only where oneDNN may "
                "use the bf16 of AVX-512 or AMX; expected 'auto' or 'fp32' on this CPU");
    return {true, "CROSSAN_FAST_CPU_BF16=brgemm"};
  }
  if (!has_brgemm()) return {false, "torch has no bf16 brgemm on this CPU"};
  // torch packs for brgemm where oneDNN has AMX tiles for the type, and nowhere else.
  if (at::native::cpublas::could_pack(at::kBFloat16)) return {true, "the CPU has AMX"};
  if (multiplies_pairs()) return {true, "the CPU multiplies bf16 by AVX-512"};
  return {false, "the CPU has neither AMX nor AMD's bf16, without which brgemm is not faster than fp32"};
}

}  // namespace

bool has_brgemm() {
  static const bool has = tried_brgemm();
  return has;
}

bool use_brgemm() { return choose().brgemm; }

std::string described_bf16() {
  try {
    const Choice choice = choose();
    return c10::str(choice.brgemm ? "brgemm" : "fp32", " (", choice.reason, ")");
  } catch (const c10::Error& error) {
    return c10::str("nothing (", error.what_without_backtrace(), ")");
  }
}

void brgemm_panel(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t a_row, const uint16_t* pairs,
                  float* c, int64_t c_row, Into into) {
  at::native::cpublas::brgemm(rows, columns, depth, a_row, pair_row(columns), c_row, into == Into::add,
                              reinterpret_cast<const at::BFloat16*>(a), reinterpret_cast<const at::BFloat16*>(pairs), c,
                              true);
}

void end_brgemm() { at::native::cpublas::brgemm_release(true); }

}  // namespace crossan_fast
