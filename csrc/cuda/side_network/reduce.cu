// Sums the weight gradients' splits in a fixed order, converts them to the weights' type, and takes the
// coefficients' gradients back through sigmoid and tanh to θ and ν.
#include "side_network.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ void gate_gradients(const Reduce& p, int tower, int level) {
  int chunks = p.width[tower] / kGradientColumns;
  float grad[kCoefficients] = {};
  for (int part = 0; part < p.splits * chunks; ++part)
    for (int i = 0; i < kCoefficients; ++i)
      grad[i] += p.coefficient_partial[tower][(part * p.levels + level) * kCoefficients + i];
  const float* coefficients = p.coefficients[tower] + level * kCoefficients;
  float mu = coefficients[1], slope = mu * (1.0f - mu) / p.temperature;
  float other = p.is_pair[tower] ? grad[2] : grad[0];  // the one that is 1 − μ
  store_element(p.gate[tower], level, p.weight_kind, slope * (grad[1] - other));
  if (p.is_pair[tower]) return;
  for (int s = 1; s < p.source_count[tower]; ++s) {
    float tanh_nu = coefficients[1 + s];
    store_element(p.cross_gate[tower][s - 1], level, p.weight_kind, (1.0f - tanh_nu * tanh_nu) * grad[1 + s]);
  }
}

__global__ void __launch_bounds__(kThreads) reduce(const __grid_constant__ Reduce p) {
  int tower = blockIdx.x % p.tower_count, width = p.width[tower];
  int64_t index = int64_t(blockIdx.x / p.tower_count) * kThreads + threadIdx.x;
  int64_t matrix = int64_t(p.levels) * kRank * width, stride = partial_floats(p.levels, width);
  const float* partial = p.partial[tower];
  auto total = [&](int64_t place) {
    float sum = 0;
    for (int split = 0; split < p.splits; ++split) sum += partial[split * stride + place];
    return sum;
  };
  if (index < p.levels) gate_gradients(p, tower, static_cast<int>(index));
  if (index < p.levels * kRank && index % kRank < p.rank)
    store_element(p.down_bias[tower], index / kRank * p.rank + index % kRank, p.weight_kind, total(2 * matrix + index));
  if (index < p.levels * width)
    store_element(p.up_bias[tower], index, p.weight_kind, total(2 * matrix + p.levels * kRank + index));
  if (index < matrix) {
    int64_t column = index % width, row = index / width % kRank, level = index / width / kRank;
    if (row >= p.rank) return;
    store_element(p.down_weight[tower], (level * p.rank + row) * width + column, p.weight_kind, total(index));
    store_element(p.up_weight[tower], (level * width + column) * p.rank + row, p.weight_kind, total(matrix + index));
  }
}

}  // namespace

int launch_reduce(const Reduce& p, void* stream) {
  int64_t elements = int64_t(p.levels) * kRank * p.max_width;
  auto blocks = static_cast<unsigned>((elements + kThreads - 1) / kThreads * p.tower_count);
  return launch(reduce, blocks, kThreads, 0, stream, 1, p);
}

}  // namespace crossan_fast
