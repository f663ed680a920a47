// MOMEF's experts (fusion.h), backward, with g the gradient of the output:
//
//     u = W2ᵀ g,   ∂share = ⟨g, e + b2⟩ + ⟨u, gelu(pre)⟩,   δ = share · u ⊙ gelu′(pre),   ∂e = share · g + W1ᵀ δ
//     ∂W1 = Σ δ ⊗ e,   ∂b1 = Σ δ,   ∂W2 = Σ share · g ⊗ gelu(pre),   ∂b2 = Σ share · g
//
// in two kernels, both from a list's tiles of 64 items: one walks the hidden slices for a tile (∂e, ∂share),
// the other walks a split of the tiles for a slice, whose weights' gradients it keeps in registers.
#include "fusion.h"

namespace crossan_fast {
namespace {

constexpr int kReduceThreads = 256;

template <class T, int kPanels>
struct BackwardBlock : ExpertBlock<T, kPanels> {
  using Base = ExpertBlock<T, kPanels>;
  unsigned char *grads, *delta, *inner;  // g [64, width]; δ and share · gelu(pre) [64, 64]

  static constexpr int kBytes = (kPanels + 2) * kExpertTileBytes + Base::kBytes;

  __device__ BackwardBlock(const Experts& p, int expert, unsigned char* memory)
      : Base(p, expert, memory + (kPanels + 2) * kExpertTileBytes),
        grads(memory),
        delta(memory + kPanels * kExpertTileBytes),
        inner(delta + kExpertTileBytes) {}

  __device__ __forceinline__ void load_tile(int64_t first) {
    this->load_items(first);
    this->load_states();
    this->load_rows(grads, this->p.grad, this->p.width, 0);
  }

  // W1 e + b1 and u of the slice.
  __device__ __forceinline__ void products(int slice, float (&pre)[16], float (&u)[16]) {
    this->pre_activation(pre, slice);
#pragma unroll
    for (float& value : u) value = 0;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      warp_product<T, false, true>(u, grads + panel * kExpertTileBytes, this->w2 + panel * kExpertTileBytes);
  }

  // δ of a pair of units into its tile.
  __device__ __forceinline__ void store_delta(int offset, float share, const float* pre, const float* u) {
    *reinterpret_cast<uint32_t*>(delta + offset) =
        pack2<T>(share * u[0] * gelu_grad(pre[0]), share * u[1] * gelu_grad(pre[1]));
  }
};

template <class T, int kPanels>
__global__ void __launch_bounds__(kExpertThreads, 1) item_gradients(const __grid_constant__ Experts p) {
  const int expert = blockIdx.x % p.experts;
  const int64_t first = int64_t(blockIdx.x / p.experts) * kExpertRows;
  if (first >= p.counts[expert]) return;
  BackwardBlock<T, kPanels> block(p, expert, shared_memory());
  block.load_tile(first);
  const Fragment at;
  const float shares[2] = {block.shares[at.row], block.shares[at.row + 8]};
  float grad[kPanels][16] = {}, along[2] = {};
  for (int slice = 0; slice * 64 < p.hidden; ++slice) {
    __syncthreads();  // nobody reads the last slice any more
    block.load_slice(slice);
    __syncthreads();
    float pre[16], u[16];
    block.products(slice, pre, u);
    for_pairs([&](int offset, int index, int half) {
      along[half] += u[index] * gelu(pre[index]) + u[index + 1] * gelu(pre[index + 1]);
      block.store_delta(offset, shares[half], pre + index, u + index);
    });
    __syncthreads();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      warp_product<T, false, true>(grad[panel], block.delta, block.w1 + panel * kExpertTileBytes);
  }
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
    for (int index = 0; index < 16; ++index) {
      int half = index / 2 % 2, row = at.row_of(index), column = panel * 64 + at.column_of(index);
      if (block.items[row] < 0 || column >= p.width) continue;
      float g = tile_element_at<T>(block.grads, row, column);
      along[half] += g * (tile_element_at<T>(block.states, row, column) + block.bias2(column));
      int64_t line = int64_t(block.items[row]) * p.experts + expert;
      p.grad_joined[line * p.width + column] = shares[half] * g + grad[panel][index];
    }
  }
  __syncthreads();  // nobody reads δ any more: its tile takes the rows' sums, [2 halves of the columns, 64]
  auto* sums = reinterpret_cast<float*>(block.delta);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = along[half];  // the four lanes of a row
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (threadIdx.x % 4 == 0) sums[threadIdx.x / 128 * 64 + at.row + half * 8] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kExpertRows && block.items[threadIdx.x] >= 0)
    p.grad_share[int64_t(block.items[threadIdx.x]) * p.experts + expert] = sums[threadIdx.x] + sums[64 + threadIdx.x];
}

template <class T, int kPanels>
__global__ void __launch_bounds__(kExpertThreads, 1) weight_gradients(const __grid_constant__ Experts p) {
  const int slices = (p.hidden + 63) / 64;
  const int expert = blockIdx.x % p.experts, slice = blockIdx.x / p.experts % slices;
  const int split = blockIdx.x / p.experts / slices;
  BackwardBlock<T, kPanels> block(p, expert, shared_memory());
  block.load_slice(slice);
  const int column = threadIdx.x % 64, role = threadIdx.x / 64;
  float w1[kPanels][16] = {}, w2[kPanels][16] = {}, bias = 0;  // units × the width
  for (int64_t first = int64_t(split) * kExpertRows; first < p.counts[expert]; first += p.splits * kExpertRows) {
    __syncthreads();  // nobody reads the last tile any more
    block.load_tile(first);
    __syncthreads();
    const Fragment at;
    const float shares[2] = {block.shares[at.row], block.shares[at.row + 8]};
    float pre[16], u[16];
    block.products(slice, pre, u);
    for_pairs([&](int offset, int index, int half) {
      *reinterpret_cast<uint32_t*>(block.inner + offset) =
          pack2<T>(shares[half] * gelu(pre[index]), shares[half] * gelu(pre[index + 1]));
      block.store_delta(offset, shares[half], pre + index, u + index);
    });
    __syncthreads();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      warp_product<T, true, true>(w1[panel], block.delta, block.states + panel * kExpertTileBytes);
      warp_product<T, true, true>(w2[panel], block.inner, block.grads + panel * kExpertTileBytes);
    }
    // Of each 64 threads one sums a column: the first of δ, those after it, for one slice, of share · g.
    if (role == 0) {
      for (int row = 0; row < kExpertRows; ++row) bias += tile_element_at<T>(block.delta, row, column);
    } else if (role <= kPanels && slice == 0) {
      for (int row = 0; row < kExpertRows; ++row)
        bias += block.shares[row] * tile_element_at<T>(block.grads, row, (role - 1) * 64 + column);
    }
  }

  float* partial = p.partial + (int64_t(split) * p.experts + expert) * p.partial_floats();
  const int64_t matrix = int64_t(p.hidden) * p.width;
  const Fragment at;
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
    for (int index = 0; index < 16; ++index) {
      int unit = slice * 64 + at.row_of(index), place = panel * 64 + at.column_of(index);
      if (unit >= p.hidden || place >= p.width) continue;
      partial[int64_t(unit) * p.width + place] = w1[panel][index];
      partial[matrix + int64_t(unit) * p.width + place] = w2[panel][index];
    }
  }
  if (role == 0) {
    if (slice * 64 + column < p.hidden) partial[2 * matrix + slice * 64 + column] = bias;
  } else if (role <= kPanels && slice == 0) {
    int place = (role - 1) * 64 + column;
    if (place < p.width) partial[2 * matrix + p.hidden + place] = bias;
  }
}

__global__ void __launch_bounds__(kReduceThreads) sum_splits(const __grid_constant__ Experts p) {
  const int64_t each = p.partial_floats(), matrix = int64_t(p.hidden) * p.width;
  int64_t index = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (index >= each * p.experts) return;
  int64_t expert = index / each, place = index % each;
  float sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += p.partial[split * each * p.experts + index];
  if (place < matrix) {
    store_element(p.grad_w1, expert * matrix + place, p.weight_kind, sum);
  } else if (place < 2 * matrix) {
    int64_t unit = (place - matrix) / p.width, column = place % p.width;
    store_element(p.grad_w2, expert * matrix + column * p.hidden + unit, p.weight_kind, sum);
  } else if (place < 2 * matrix + p.hidden) {
    store_element(p.grad_b1, expert * p.hidden + place - 2 * matrix, p.weight_kind, sum);
  } else {
    store_element(p.grad_b2, expert * p.width + place - 2 * matrix - p.hidden, p.weight_kind, sum);
  }
}

template <class T, int kPanels>
int launch_backward(const Experts& p, void* stream) {
  constexpr int kBytes = BackwardBlock<T, kPanels>::kBytes;
  auto tiles = static_cast<unsigned>((p.items + kExpertRows - 1) / kExpertRows * p.experts);
  unsigned blocks = p.experts * ((p.hidden + 63) / 64) * p.splits;
  if (int error = launch(item_gradients<T, kPanels>, tiles, kExpertThreads, kBytes, stream, 1, p)) return error;
  if (int error = launch(weight_gradients<T, kPanels>, blocks, kExpertThreads, kBytes, stream, 1, p)) return error;
  auto sums = static_cast<unsigned>((p.partial_floats() * p.experts + kReduceThreads - 1) / kReduceThreads);
  return launch(sum_splits, sums, kReduceThreads, 0, stream, 1, p);
}

}  // namespace

int launch_experts_backward(const Experts& p, int kind, void* stream) {
  if (kind == kBFloat16)
    return p.width <= 64 ? launch_backward<bfloat16, 1>(p, stream) : launch_backward<bfloat16, 2>(p, stream);
  return p.width <= 64 ? launch_backward<half16, 1>(p, stream) : launch_backward<half16, 2>(p, stream);
}

}  // namespace crossan_fast
