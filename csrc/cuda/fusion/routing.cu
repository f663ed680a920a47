// routing: MOMEF's router after its logits: softmax over present experts, the top k (ties to the expert that
// comes first), their renormalised shares, and the sums behind the load-balance loss.
// An expert that was not chosen has a share of exactly 0, and then does not run (forward.cu).
#include "cuda/interface.h"
#include "cuda/numeric.h"

#if !defined(__CUDACC__)
using std::exp;
#endif

namespace crossan_fast {
namespace {

constexpr int kThreads = 256;
constexpr float kTiny = 1.17549435e-38f;  // the reference's guard: the smallest normal number

__device__ __forceinline__ bool has(const uint8_t* present, int64_t item, int experts, int expert) {
  return present == nullptr || present[item * experts + expert] != 0;
}

// The experts that the k largest values pick, as bits; absent ones are never picked.
__device__ __forceinline__ uint32_t top_experts(const float* value, uint32_t exists, int experts, int k) {
  uint32_t chosen = 0;
  for (int pick = 0; pick < k; ++pick) {
    int best = -1;
    for (int e = 0; e < experts; ++e)
      if (((exists & ~chosen) >> e & 1) && (best < 0 || value[e] > value[best])) best = e;
    if (best < 0) break;
    chosen |= 1u << best;
  }
  return chosen;
}

__device__ void softmax_over(const float* logits, uint32_t keep, int experts, float* result) {
  float top = -INFINITY, sum = 0;
  for (int e = 0; e < experts; ++e)
    if (keep >> e & 1) top = logits[e] > top ? logits[e] : top;
  for (int e = 0; e < experts; ++e) {
    result[e] = keep >> e & 1 ? exp(logits[e] - top) : 0.0f;
    sum += result[e];
  }
  for (int e = 0; e < experts; ++e) result[e] = keep ? result[e] / sum : 0.0f;
}

__device__ uint32_t existing(const uint8_t* present, int64_t item, int experts) {
  uint32_t exists = 0;
  for (int e = 0; e < experts; ++e) exists |= static_cast<uint32_t>(has(present, item, experts, e)) << e;
  return exists;
}

__global__ void __launch_bounds__(kThreads) route(const float* logits, const uint8_t* present, int64_t count,
                                                  int experts, int top_k, float* probability, float* share) {
  int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= count) return;
  const float* own = logits + item * experts;
  uint32_t exists = existing(present, item, experts);
  softmax_over(own, exists, experts, probability + item * experts);
  uint32_t chosen = top_k ? top_experts(probability + item * experts, exists, experts, top_k) : exists;
  softmax_over(own, chosen, experts, share + item * experts);
}

// One block, so that the sums have one order: `assigned`, `mean` and `total`.
__global__ void __launch_bounds__(kThreads)
    balance(const float* probability, const uint8_t* present, const float* weights, int64_t count, int experts, int k,
            float* assigned, float* mean, float* total) {
  auto* sums = reinterpret_cast<float*>(shared_memory());  // [2 · experts + 1][kThreads]
  int rows = 2 * experts + 1;
  for (int row = 0; row < rows; ++row) sums[row * kThreads + threadIdx.x] = 0;
  for (int64_t item = threadIdx.x; item < count; item += kThreads) {
    uint32_t exists = existing(present, item, experts);
    if (!exists) continue;
    float weight = weights ? weights[item] : 1.0f;
    const float* own = probability + item * experts;
    uint32_t chosen = top_experts(own, exists, experts, k);
    for (int e = 0; e < experts; ++e) {
      if (chosen >> e & 1) sums[e * kThreads + threadIdx.x] += weight;
      sums[(experts + e) * kThreads + threadIdx.x] += weight * own[e];
    }
    sums[2 * experts * kThreads + threadIdx.x] += weight;
  }
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half)
      for (int row = 0; row < rows; ++row)
        sums[row * kThreads + threadIdx.x] += sums[row * kThreads + threadIdx.x + half];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float weight = sums[2 * experts * kThreads], assignments = 0;
    for (int e = 0; e < experts; ++e) assignments += sums[e * kThreads];
    for (int e = 0; e < experts; ++e) {
      assigned[e] = sums[e * kThreads] / (assignments > kTiny ? assignments : kTiny);
      mean[e] = sums[(experts + e) * kThreads] / (weight > kTiny ? weight : kTiny);
    }
    *total = weight;
  }
}

__global__ void __launch_bounds__(kThreads)
    route_backward(const float* grad_share, const float* grad_mean, const float* probability, const float* share,
                   const float* weights, const float* total, int64_t count, int experts, float* grad_logits) {
  int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= count) return;
  float weight = (weights ? weights[item] : 1.0f) / (*total > kTiny ? *total : kTiny);
  const float *p = probability + item * experts, *s = share + item * experts;
  const float* grad = grad_share + item * experts;
  float along_share = 0, along_mean = 0;
  for (int e = 0; e < experts; ++e) {
    // A share of exactly zero stands for an expert that did not run; its gradient may be anything.
    along_share += s[e] != 0 ? s[e] * grad[e] : 0.0f;
    along_mean += p[e] * grad_mean[e];
  }
  for (int e = 0; e < experts; ++e)
    grad_logits[item * experts + e] =
        (s[e] != 0 ? s[e] * (grad[e] - along_share) : 0.0f) + weight * p[e] * (grad_mean[e] - along_mean);
}

unsigned blocks_for(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

}  // namespace
}  // namespace crossan_fast

using namespace crossan_fast;

extern "C" int crossan_routing_forward(const float* logits, const uint8_t* present, const float* weights, int64_t count,
                                       int experts, int top_k, float* probability, float* share, float* assigned,
                                       float* mean, float* total, void* stream) {
  if (count < 0 || experts < 1 || experts > kCrossanMaxExperts || top_k < 0 || top_k > experts) return kCrossanBadSize;
  if (int error = launch(route, blocks_for(count), kThreads, 0, stream, 1, logits, present, count, experts, top_k,
                         probability, share))
    return error;
  return launch(balance, 1, kThreads, (2 * experts + 1) * kThreads * sizeof(float), stream, 1, probability, present,
                weights, count, experts, top_k ? top_k : 1, assigned, mean, total);
}

extern "C" int crossan_routing_backward(const float* grad_share, const float* grad_mean, const float* probability,
                                        const float* share, const float* weights, const float* total, int64_t count,
                                        int experts, float* grad_logits, void* stream) {
  if (count < 0 || experts < 1 || experts > kCrossanMaxExperts) return kCrossanBadSize;
  return launch(route_backward, blocks_for(count), kThreads, 0, stream, 1, grad_share, grad_mean, probability, share,
                weights, total, count, experts, grad_logits);
}
