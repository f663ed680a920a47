// Registers MOMEF's experts with torch.
#include "cuda/border.h"

namespace crossan_fast::border {
namespace {

void check_routing(const Tensor& logits, const OptionalTensor& present, const OptionalTensor& counts) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= 16,
                    "logits: expected shape [items, experts] with 1 to 16 experts, got ", logits.sizes());
  check_tensor("logits", logits, {-1, -1}, at::kFloat, logits.device());
  if (present) check_tensor("present", *present, logits.sizes(), at::kBool, logits.device());
  if (counts) check_tensor("counts", *counts, {logits.size(0)}, at::kFloat, logits.device());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routing_forward(const Tensor& logits, const OptionalTensor& present,
                                                                   const OptionalTensor& counts, int64_t top_k) {
  check_routing(logits, present, counts);
  TORCH_CHECK_VALUE(top_k >= 0 && top_k <= logits.size(1), "top_k: expected 0 (all) to ", logits.size(1), ", got ",
                    top_k);
  DeviceGuard guard(logits.device());
  Tensor input = logits.contiguous();
  OptionalTensor exists = contiguous(present), weights = contiguous(counts);
  int64_t count = input.size(0), experts = input.size(1);
  Tensor probability = at::empty_like(input), share = at::empty_like(input);
  Tensor assigned = at::empty({experts}, input.options()), mean = at::empty_like(assigned);
  Tensor total = at::empty({1}, input.options());
  check_code(crossan_routing_forward(
                 input.const_data_ptr<float>(), pointer<const uint8_t>(exists), pointer<const float>(weights), count,
                 static_cast<int>(experts), static_cast<int>(top_k), probability.mutable_data_ptr<float>(),
                 share.mutable_data_ptr<float>(), assigned.mutable_data_ptr<float>(), mean.mutable_data_ptr<float>(),
                 total.mutable_data_ptr<float>(), current_stream(input)),
             "routing");
  return {probability, share, assigned, mean, total};
}

Tensor routing_backward(const Tensor& grad_share, const Tensor& grad_mean, const Tensor& probability,
                        const Tensor& share, const OptionalTensor& counts, const Tensor& total) {
  check_routing(probability, std::nullopt, counts);
  at::Device device = probability.device();
  check_tensor("share", share, probability.sizes(), at::kFloat, device);
  check_tensor("grad_share", grad_share, probability.sizes(), at::kFloat, device);
  check_tensor("grad_mean", grad_mean, {probability.size(1)}, at::kFloat, device);
  check_tensor("total", total, {1}, at::kFloat, device);
  DeviceGuard guard(device);
  Tensor p = probability.contiguous(), s = share.contiguous();
  Tensor gs = grad_share.contiguous(), gm = grad_mean.contiguous();
  OptionalTensor weights = contiguous(counts);
  Tensor grad = at::empty_like(p);
  check_code(crossan_routing_backward(gs.const_data_ptr<float>(), gm.const_data_ptr<float>(), p.const_data_ptr<float>(),
                                      s.const_data_ptr<float>(), pointer<const float>(weights),
                                      total.const_data_ptr<float>(), p.size(0), static_cast<int>(p.size(1)),
                                      grad.mutable_data_ptr<float>(), current_stream(p)),
             "routing_backward");
  return grad;
}

// A call after its checks: the C interface's struct, and the tensors that its pointers point into.
struct Call {
  CrossanExperts experts = {};
  std::vector<Tensor> kept;
  at::TensorOptions options;

  const void* keep(const Tensor& tensor) {
    kept.push_back(dense_and_aligned(tensor));
    return kept.back().const_data_ptr();
  }
};

Call prepare(const Tensor& joined, const Tensor& share, const Tensor& w1, const Tensor& b1, const Tensor& w2,
             const Tensor& b2) {
  TORCH_CHECK_VALUE(w1.dim() == 3, "w1: expected shape [experts, hidden, width], got ", w1.sizes());
  int64_t experts = w1.size(0), hidden = w1.size(1), width = w1.size(2);
  TORCH_CHECK_VALUE(experts >= 1 && experts <= kCrossanMaxExperts, "w1: expected 1 to ", int(kCrossanMaxExperts),
                    " experts, got ", experts);
  TORCH_CHECK_VALUE(width >= 8 && width % 8 == 0 && width <= kCrossanMaxExpertWidth,
                    "w1: expected a width that is a multiple of 8 up to ", int(kCrossanMaxExpertWidth), ", got ",
                    width);
  TORCH_CHECK_VALUE(hidden >= 8 && hidden % 8 == 0 && hidden <= 1 << 16,
                    "w1: expected hidden units that are a multiple of 8, got ", hidden);
  int kind = kind_of(w1.scalar_type()), compute = kind_of(joined.scalar_type());
  TORCH_CHECK_TYPE(kind >= 0 && kind <= 2, "w1: expected float32, float16 or bfloat16, got ", w1.scalar_type());
  TORCH_CHECK_TYPE(compute == 1 || compute == 2, "joined: expected float16 or bfloat16, got ", joined.scalar_type());
  at::Device device = w1.device();
  check_tensor("b1", b1, {experts, hidden}, w1.scalar_type(), device);
  check_tensor("w2", w2, {experts, width, hidden}, w1.scalar_type(), device);
  check_tensor("b2", b2, {experts, width}, w1.scalar_type(), device);
  check_tensor("joined", joined, {-1, experts * width}, joined.scalar_type(), device);
  check_tensor("share", share, {joined.size(0), experts}, at::kFloat, device);
  Call call;
  CrossanExperts& n = call.experts;
  n.items = joined.size(0), n.experts = static_cast<int>(experts), n.width = static_cast<int>(width);
  n.hidden = static_cast<int>(hidden), n.compute_kind = compute, n.weight_kind = kind;
  n.joined = call.keep(joined), n.share = static_cast<const float*>(call.keep(share));
  n.w1 = call.keep(w1), n.b1 = call.keep(b1), n.w2 = call.keep(w2), n.b2 = call.keep(b2);
  call.options = joined.options();
  return call;
}

Tensor workspace_for(const Call& call, bool backward) {
  auto bytes = static_cast<int64_t>(crossan_experts_workspace(&call.experts, backward));
  return at::empty({bytes}, call.options.dtype(at::kByte));
}

Tensor experts_forward(const Tensor& joined, const Tensor& share, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                       const Tensor& b2) {
  DeviceGuard guard(joined.device());
  Call call = prepare(joined, share, w1, b1, w2, b2);
  Tensor output = at::empty({call.experts.items, call.experts.width}, call.options);
  call.experts.output = output.mutable_data_ptr();
  Tensor workspace = workspace_for(call, false);
  check_code(crossan_experts_forward(&call.experts, workspace.mutable_data_ptr(), current_stream(output)), "experts");
  return output;
}

// Gradients of joined and share in fp32 (zeros where an expert does not run), then of the weights in their type.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(const Tensor& grad_output,
                                                                            const Tensor& joined, const Tensor& share,
                                                                            const Tensor& w1, const Tensor& b1,
                                                                            const Tensor& w2, const Tensor& b2) {
  DeviceGuard guard(joined.device());
  Call call = prepare(joined, share, w1, b1, w2, b2);
  CrossanExperts& n = call.experts;
  check_tensor("grad_output", grad_output, {n.items, n.width}, joined.scalar_type(), joined.device());
  n.grad_output = call.keep(grad_output);
  auto wide = call.options.dtype(at::kFloat);
  Tensor grad_joined = at::zeros(joined.sizes(), wide), grad_share = at::zeros(share.sizes(), wide);
  Tensor grad_w1 = at::empty(w1.sizes(), w1.options()), grad_b1 = at::empty(b1.sizes(), w1.options());
  Tensor grad_w2 = at::empty(w2.sizes(), w1.options()), grad_b2 = at::empty(b2.sizes(), w1.options());
  n.grad_joined = grad_joined.mutable_data_ptr<float>(), n.grad_share = grad_share.mutable_data_ptr<float>();
  n.grad_w1 = grad_w1.mutable_data_ptr(), n.grad_b1 = grad_b1.mutable_data_ptr();
  n.grad_w2 = grad_w2.mutable_data_ptr(), n.grad_b2 = grad_b2.mutable_data_ptr();
  Tensor workspace = workspace_for(call, true);
  check_code(crossan_experts_backward(&n, workspace.mutable_data_ptr(), current_stream(grad_joined)),
             "experts_backward");
  return {grad_joined, grad_share, grad_w1, grad_b1, grad_w2, grad_b2};
}

}  // namespace
}  // namespace crossan_fast::border

CROSSAN_LIBRARY_FRAGMENT(CROSSAN_NAMESPACE, library) {
  library.def(
      "routing_forward(Tensor logits, Tensor? present, Tensor? counts, int top_k)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "routing_backward(Tensor grad_share, Tensor grad_mean, Tensor probability, Tensor share,"
      " Tensor? counts, Tensor total) -> Tensor");
  library.def("experts_forward(Tensor joined, Tensor share, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor");
  library.def(
      "experts_backward(Tensor grad_output, Tensor joined, Tensor share, Tensor w1, Tensor b1, Tensor w2,"
      " Tensor b2) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

CROSSAN_LIBRARY_IMPL(CROSSAN_NAMESPACE, CROSSAN_DISPATCH_KEY, library) {
  using namespace crossan_fast::border;
  library.impl("routing_forward", &routing_forward);
  library.impl("routing_backward", &routing_backward);
  library.impl("experts_forward", &experts_forward);
  library.impl("experts_backward", &experts_backward);
}
