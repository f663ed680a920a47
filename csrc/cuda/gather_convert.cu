// gather_convert: rows of cached states by id, converted to a dense tile. The source may be device memory or
// pinned host memory, which the device reads over the bus as it does its own.
#include "interface.h"
#include "numeric.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = 256;

struct Gather {
  const unsigned char* states;
  const float* scales;
  const void* ids;
  unsigned char* output;
  int64_t rows, count, groups, width;
  int wide, kind, output_kind;
};

// kVector elements a thread: 8 where rows allow 16-byte accesses, else 1.
template <int kVector>
__global__ void __launch_bounds__(kThreads) gather_rows(const __grid_constant__ Gather g) {
  int64_t vectors = g.width / kVector, total = g.count * g.groups * vectors;
  int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x; index < total; index += stride) {
    int64_t line = index / vectors, column = index % vectors * kVector;
    int64_t row = checked_row(g.ids, line / g.groups, g.wide, g.rows);
    int64_t source = row * g.groups + line % g.groups, from = source * g.width + column;
    float scale = g.scales ? g.scales[source] : 1.0f;
    int64_t to = line * g.width + column;
    if constexpr (kVector == 1) {
      store_element(g.output, to, g.output_kind, load_element(g.states, from, g.kind) * scale);
    } else {
      float values[8];
      if (g.kind == kFloat32) {
        Raw8 low = load16(g.states + 4 * from), high = load16(g.states + 4 * from + 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          values[i] = bits_to_float(low.words[i]);
          values[i + 4] = bits_to_float(high.words[i]);
        }
      } else {
        unpack8(load_state8(g.states + from * element_size(g.kind), g.kind), g.kind, values);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= scale;
      if (g.output_kind == kFloat32) {
        Raw8 low, high;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          low.words[i] = float_to_bits(values[i]);
          high.words[i] = float_to_bits(values[i + 4]);
        }
        store16(g.output + 4 * to, low);
        store16(g.output + 4 * to + 16, high);
      } else {
        store16(g.output + 2 * to, g.output_kind == kFloat16 ? pack8<half16>(values) : pack8<bfloat16>(values));
      }
    }
  }
}

}  // namespace
}  // namespace crossan_fast

using namespace crossan_fast;

extern "C" int crossan_gather_convert(const void* states, const float* scales, const void* ids, int wide, int64_t rows,
                                      int64_t count, int64_t groups, int64_t width, int kind, void* output,
                                      int output_kind, void* stream) {
  if (rows < 0 || count < 0 || groups < 0 || width < 0 || (ids == nullptr && count > rows)) return kCrossanBadSize;
  if (kind < kFloat32 || kind > kInt8 || output_kind < kFloat32 || output_kind > kBFloat16) return kCrossanBadKind;
  Gather gather = {static_cast<const unsigned char*>(states),
                   scales,
                   ids,
                   static_cast<unsigned char*>(output),
                   rows,
                   count,
                   groups,
                   width,
                   wide,
                   kind,
                   output_kind};
  auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  bool vector = width % 8 == 0 && aligned(states) && aligned(output);
  int64_t work = count * groups * (vector ? width / 8 : width);
  if (work == 0) return 0;
  int64_t needed = (work + kThreads - 1) / kThreads, enough = 16 * device_limits().multiprocessors;
  auto blocks = static_cast<unsigned>(needed < enough ? needed : enough);
  return vector ? launch(gather_rows<8>, blocks, kThreads, 0, stream, 1, gather)
                : launch(gather_rows<1>, blocks, kThreads, 0, stream, 1, gather);
}
