// MOMEF's experts (fusion.h), forward: the lists of who runs where, the experts on their lists, and the sum.
#include "fusion.h"

#include "cuda/interface.h"

namespace crossan_fast {
namespace {

constexpr int kListThreads = 1024, kSumThreads = 256;

// A block an expert: the items with a share of it, in order. Threads count spans of items, then write them.
__global__ void __launch_bounds__(kListThreads) list_items(const __grid_constant__ Experts p) {
  auto* sums = reinterpret_cast<int32_t*>(shared_memory());  // [kListThreads]
  const int expert = blockIdx.x;
  const int64_t span = (p.items + kListThreads - 1) / kListThreads;
  const int64_t first = threadIdx.x * span, last = first + span < p.items ? first + span : p.items;
  int32_t found = 0;
  for (int64_t item = first; item < last; ++item) found += p.share[item * p.experts + expert] != 0;
  sums[threadIdx.x] = found;
  for (int reach = 1; reach < kListThreads; reach *= 2) {
    __syncthreads();
    int32_t before = static_cast<int>(threadIdx.x) >= reach ? sums[threadIdx.x - reach] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
  }
  int32_t* target = p.rows + expert * p.items + sums[threadIdx.x] - found;
  for (int64_t item = first; item < last; ++item)
    if (p.share[item * p.experts + expert] != 0) *target++ = static_cast<int32_t>(item);
  if (threadIdx.x == kListThreads - 1) p.counts[expert] = sums[threadIdx.x];
}

template <class T, int kPanels>
constexpr int kForwardBytes = ExpertBlock<T, kPanels>::kBytes + kExpertTileBytes;

template <class T, int kPanels>
__global__ void __launch_bounds__(kExpertThreads) run_experts(const __grid_constant__ Experts p) {
  const int expert = blockIdx.x % p.experts;
  const int64_t first = int64_t(blockIdx.x / p.experts) * kExpertRows;
  if (first >= p.counts[expert]) return;
  unsigned char* inner = shared_memory();
  ExpertBlock<T, kPanels> block(p, expert, inner + kExpertTileBytes);
  block.load_items(first);
  block.load_states();
  float out[kPanels][16] = {};
  for (int slice = 0; slice * 64 < p.hidden; ++slice) {
    __syncthreads();  // nobody reads the last slice any more
    block.load_slice(slice);
    __syncthreads();
    float pre[16];
    block.pre_activation(pre, slice);
    for_pairs([&](int offset, int index, int) {
      *reinterpret_cast<uint32_t*>(inner + offset) = pack2<T>(gelu(pre[index]), gelu(pre[index + 1]));
    });
    __syncthreads();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      warp_product<T, false, false>(out[panel], inner, block.w2 + panel * kExpertTileBytes);
  }
  const Fragment at;
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
    for (int index = 0; index < 16; ++index) {
      int row = at.row_of(index), column = panel * 64 + at.column_of(index);
      if (block.items[row] < 0 || column >= p.width) continue;
      float value = out[panel][index] + tile_element_at<T>(block.states, row, column) + block.bias2(column);
      p.parts[(int64_t(block.items[row]) * p.experts + expert) * p.width + column] = block.shares[row] * value;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_experts(const __grid_constant__ Experts p) {
  int64_t index = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (index >= p.items * p.width) return;
  int64_t item = index / p.width, column = index % p.width;
  float sum = 0;
  for (int e = 0; e < p.experts; ++e)
    if (p.share[item * p.experts + e] != 0) sum += p.parts[(item * p.experts + e) * p.width + column];
  reinterpret_cast<T*>(p.output)[index] = from_float<T>(sum);
}

template <class T>
int launch_forward(const Experts& p, void* stream) {
  auto tiles = static_cast<unsigned>((p.items + kExpertRows - 1) / kExpertRows * p.experts);
  int error = p.width <= 64 ? launch(run_experts<T, 1>, tiles, kExpertThreads, kForwardBytes<T, 1>, stream, 1, p)
                            : launch(run_experts<T, 2>, tiles, kExpertThreads, kForwardBytes<T, 2>, stream, 1, p);
  if (error) return error;
  auto blocks = static_cast<unsigned>((p.items * p.width + kSumThreads - 1) / kSumThreads);
  return launch(sum_experts<T>, blocks, kSumThreads, 0, stream, 1, p);
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// The scratch, in order: lists, counts, then the forward's parts or the backward's partial sums.
Experts make_experts(const CrossanExperts& n, bool backward, void* workspace, size_t* bytes) {
  Experts p = {};
  p.joined = static_cast<const unsigned char*>(n.joined), p.share = n.share;
  p.w1 = n.w1, p.b1 = n.b1, p.w2 = n.w2, p.b2 = n.b2;
  p.items = n.items, p.experts = n.experts, p.width = n.width, p.hidden = n.hidden;
  p.weight_kind = n.weight_kind;
  int64_t tiles = (n.items + kExpertRows - 1) / kExpertRows;
  // Enough blocks for every multiprocessor, while each has more than a list's tile or two to stream.
  int blocks = n.experts * ((n.hidden + 63) / 64), processors = device_limits().multiprocessors;
  int64_t splits = (processors + blocks - 1) / blocks;
  p.splits = static_cast<int>(tiles < 1 ? 1 : splits < tiles ? splits : tiles);
  auto* memory = static_cast<unsigned char*>(workspace);
  size_t counts = aligned(n.items * n.experts * sizeof(int32_t)), sums = counts + aligned(4 * n.experts);
  p.rows = reinterpret_cast<int32_t*>(memory), p.counts = reinterpret_cast<int32_t*>(memory + counts);
  p.parts = p.partial = reinterpret_cast<float*>(memory + sums);
  size_t floats = backward ? p.splits * p.experts * p.partial_floats() : n.items * n.experts * n.width;
  *bytes = sums + floats * sizeof(float);
  p.output = static_cast<unsigned char*>(n.output), p.grad = static_cast<const unsigned char*>(n.grad_output);
  p.grad_joined = n.grad_joined, p.grad_share = n.grad_share;
  p.grad_w1 = n.grad_w1, p.grad_b1 = n.grad_b1, p.grad_w2 = n.grad_w2, p.grad_b2 = n.grad_b2;
  return p;
}

int check(const CrossanExperts& n) {
  if (n.experts < 1 || n.experts > kCrossanMaxExperts || n.items < 0 || n.hidden < 8 || n.hidden % 8)
    return kCrossanBadSize;
  if (n.width < 8 || n.width % 8 || n.width > kCrossanMaxExpertWidth) return kCrossanBadSize;
  if (n.items > int64_t(1) << 25) return kCrossanTooLarge;  // item numbers and blocks stay below 2^31
  if (n.compute_kind != kFloat16 && n.compute_kind != kBFloat16) return kCrossanBadKind;
  return n.weight_kind < kFloat32 || n.weight_kind > kBFloat16 ? kCrossanBadKind : 0;
}

}  // namespace

int launch_expert_lists(const Experts& p, void* stream) {
  return launch(list_items, p.experts, kListThreads, kListThreads * sizeof(int32_t), stream, 1, p);
}

int launch_experts(const Experts& p, int kind, void* stream) {
  return kind == kBFloat16 ? launch_forward<bfloat16>(p, stream) : launch_forward<half16>(p, stream);
}

}  // namespace crossan_fast

using namespace crossan_fast;

extern "C" size_t crossan_experts_workspace(const CrossanExperts* experts, int backward) {
  size_t bytes = 0;
  if (!check(*experts)) make_experts(*experts, backward, nullptr, &bytes);
  return bytes;
}

extern "C" int crossan_experts_forward(const CrossanExperts* experts, void* workspace, void* stream) {
  if (int error = check(*experts)) return error;
  size_t bytes;
  Experts p = make_experts(*experts, false, workspace, &bytes);
  if (int error = launch_expert_lists(p, stream)) return error;
  return launch_experts(p, experts->compute_kind, stream);
}

extern "C" int crossan_experts_backward(const CrossanExperts* experts, void* workspace, void* stream) {
  if (int error = check(*experts)) return error;
  size_t bytes;
  Experts p = make_experts(*experts, true, workspace, &bytes);
  if (int error = launch_expert_lists(p, stream)) return error;
  return launch_experts_backward(p, experts->compute_kind, stream);
}
