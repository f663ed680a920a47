#include "products.h"

#include <ATen/native/CPUBlas.h>

#include <cstdlib>
#include <string_view>

namespace crossan_fast {
namespace {

struct Choice {
  bool brgemm;
  const char* reason;
};

Choice choose() {
  const char* wish = std::getenv("CROSSAN_FAST_CPU_BF16");
  const std::string_view wanted = wish ? wish : "auto";
  if (wanted == "brgemm") return {true, "CROSSAN_FAST_CPU_BF16=brgemm"};
  if (wanted == "fp32") return {false, "CROSSAN_FAST_CPU_BF16=fp32"};
  // torch packs for brgemm where oneDNN has AMX tiles for the type, and nowhere else.
  if (at::native::cpublas::could_pack(at::kBFloat16)) return {true, "the CPU has AMX"};
  return {false, "the CPU has no AMX, without which brgemm is slower than fp32"};
}

}  // namespace

bool use_brgemm() { return choose().brgemm; }
const char* brgemm_reason() { return choose().reason; }

void brgemm_panel(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, const uint16_t* pairs, float* c,
                  int64_t c_row) {
  at::native::cpublas::brgemm(rows, columns, depth, depth, pair_row(columns), c_row, true,
                              reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(pairs), c, true);
}

void end_brgemm() { at::native::cpublas::brgemm_release(true); }

}  // namespace crossan_fast
