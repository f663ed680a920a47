// Registers every op, says what the library is, and keeps it whole when its process forks.
//
// The one file that parses torch's operators and its registration: 5 s of the build, where a file an op paid them each.
#include "library.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <pthread.h>
#include <torch/library.h>

#include <string>

#include "caches.h"
#include "parallel.h"
#include "products.h"
#include "simd.h"

namespace crossan_fast {

at::Tensor border::empty(at::IntArrayRef shape, at::ScalarType type) {
  return at::empty(shape, at::TensorOptions().dtype(type));
}

at::Tensor border::zeros(at::IntArrayRef shape, at::ScalarType type) {
  return at::zeros(shape, at::TensorOptions().dtype(type));
}

namespace {

const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  if (threads_started.load()) threads_lost.store(true);
});

// An op and not a pybind11 module: the library then needs no Python header, and one build serves every Python.
std::string build_info() {
  return c10::str("vectors of ", kVectorBytes * 8, " bits, compiled by ", __VERSION__, ", fork handler ",
                  fork_handler == 0 ? "set" : "missing", ", blocks fit to ", cache_sizes().l2 >> 10, " kB of L2 (",
                  cache_sizes().source, "), bf16 products of side_network in ", described_bf16());
}

}  // namespace

#define SIDE_NETWORK                                                                                                \
  "Tensor[] states, Tensor[] scales, Tensor? ids, Tensor? present, Tensor[] weights, int[] widths, int[] sources, " \
  "str cross, str activation, float temperature, str cross_projection, ScalarType dtype"
#define FUSION "Tensor embeddings, Tensor[] weights, Tensor? present, int? top_k, Tensor? counts, ScalarType dtype"
#define SEQUENCE_ENCODER \
  "Tensor items, Tensor mask, Tensor[] weights, int heads, float eps, float dropout, Tensor? seed"
#define IN_BATCH "Tensor users, Tensor items, Tensor slots, Tensor counts, Tensor log_popularity"
#define FULL "Tensor users, Tensor items, Tensor targets"

TORCH_LIBRARY(crossan_fast_cpp, ops) {
  ops.def("build_info() -> str", build_info);
  ops.def("has_brgemm() -> bool", has_brgemm);
  ops.def("side_network(" SIDE_NETWORK ") -> Tensor[]");
  ops.def("side_network_backward(Tensor grad_embeddings, Tensor saved, Tensor links, " SIDE_NETWORK ") -> Tensor[]");
  ops.def("fusion(" FUSION ") -> Tensor[]");
  ops.def("fusion_backward(Tensor grad_items, Tensor grad_probability, Tensor logits, " FUSION ") -> Tensor[]");
  ops.def("sequence_encoder(" SEQUENCE_ENCODER ", bool keep, ScalarType dtype) -> (Tensor, Tensor)");
  ops.def("sequence_encoder_backward(Tensor grad_users, Tensor kept, " SEQUENCE_ENCODER
          ", ScalarType dtype) -> Tensor[]");
  ops.def("in_batch_loss(" IN_BATCH ") -> (Tensor, Tensor)");
  ops.def("in_batch_loss_backward(Tensor grad_loss, Tensor lse, " IN_BATCH ") -> (Tensor, Tensor)");
  ops.def("full_loss(" FULL ") -> (Tensor, Tensor)");
  ops.def("full_loss_backward(Tensor grad_loss, Tensor lse, " FULL ") -> (Tensor, Tensor)");
  ops.def("rank_of_target(Tensor users, Tensor items, Tensor targets, Tensor? exclude) -> Tensor");
  ops.def("topk_scores(Tensor users, Tensor items, int k, Tensor? exclude) -> (Tensor, Tensor)");
  ops.def("deduplicate(Tensor item_ids, int? capacity) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(crossan_fast_cpp, CPU, ops) {
  ops.impl("side_network", border::side_network);
  ops.impl("side_network_backward", border::side_network_backward);
  ops.impl("fusion", border::fusion);
  ops.impl("fusion_backward", border::fusion_backward);
  ops.impl("sequence_encoder", border::sequence_encoder);
  ops.impl("sequence_encoder_backward", border::sequence_encoder_backward);
  ops.impl("in_batch_loss", border::in_batch_loss);
  ops.impl("in_batch_loss_backward", border::in_batch_loss_backward);
  ops.impl("full_loss", border::full_loss);
  ops.impl("full_loss_backward", border::full_loss_backward);
  ops.impl("rank_of_target", border::rank_of_target);
  ops.impl("topk_scores", border::topk_scores);
  ops.impl("deduplicate", border::deduplicate);
}

}  // namespace crossan_fast
