// Registers deduplicate, gather_convert and routing with torch. No kernel is defined here, and no ATen there.
#include "bindings.h"

namespace crossan::binding {

Tensor gather_convert(const Tensor& states, const OptionalTensor& scales, const OptionalTensor& ids,
                      at::ScalarType dtype) {
  TORCH_CHECK_VALUE(states.dim() == 3, "states: expected shape [rows, levels, width], got ", states.sizes());
  TORCH_CHECK_VALUE(states.is_contiguous(), "states: expected a contiguous tensor, got strides ",
                    states.strides());
  int kind = kind_of(states.scalar_type()), output_kind = kind_of(dtype);
  TORCH_CHECK_TYPE(kind >= 0, "states: expected float32, float16, bfloat16, float8_e4m3fn or int8, got ",
                   states.scalar_type());
  TORCH_CHECK_TYPE(output_kind >= 0 && output_kind <= 2,
                   "dtype: expected float32, float16 or bfloat16, got ", dtype);
  at::Device device = ids ? ids->device() : states.device();
  bool reachable = states.device() == device || (states.is_cpu() && states.is_pinned());
  TORCH_CHECK_VALUE(reachable && device.type() == kDeviceType, "states: expected device ", device,
                    " or pinned host memory, got ", states.device());
  if (scales) {
    check_tensor("scales", *scales, {states.size(0), states.size(1)}, at::kFloat, states.device());
    TORCH_CHECK_VALUE(scales->is_contiguous(), "scales: expected a contiguous tensor, got strides ",
                      scales->strides());
    TORCH_CHECK_VALUE(scales->device() == device || scales->is_pinned(), "scales: expected device ", device,
                      " or pinned host memory, got ", scales->device());
  }
  if (ids) {
    check_ids("ids", *ids);
    TORCH_CHECK_VALUE(ids->dim() == 1, "ids: expected shape [items], got ", ids->sizes());
  }
  DeviceGuard guard(device);
  OptionalTensor rows = contiguous(ids);
  int64_t count = rows ? rows->size(0) : states.size(0);
  Tensor output = at::empty({count, states.size(1), states.size(2)}, states.options().dtype(dtype).device(device));
  check_code(crossan_gather_convert(states.const_data_ptr(), pointer<const float>(scales),
                                    pointer<const void>(rows), is_wide(rows), states.size(0), count,
                                    states.size(1), states.size(2), kind, output.mutable_data_ptr(),
                                    output_kind, current_stream(output)),
             "gather_convert");
  return output;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> deduplicate(const Tensor& item_ids, int64_t capacity) {
  check_ids("item_ids", item_ids);
  TORCH_CHECK_VALUE(capacity >= 1, "capacity: expected at least 1, got ", capacity);
  TORCH_CHECK_VALUE(item_ids.numel() < (1 << 24), "item_ids: expected fewer than 2^24 places, got ",
                    item_ids.numel());
  DeviceGuard guard(item_ids.device());
  Tensor places = item_ids.contiguous();
  auto options = places.options().dtype(at::kLong);
  Tensor ids = at::empty({capacity}, options), slots = at::empty(places.sizes(), options);
  Tensor counts = at::empty({capacity}, options);
  auto bytes = static_cast<int64_t>(crossan_deduplicate_workspace(places.numel(), capacity));
  Tensor workspace = at::empty({bytes}, options.dtype(at::kByte));
  check_code(crossan_deduplicate(places.const_data_ptr(), is_wide(places), places.numel(), capacity,
                                 ids.mutable_data_ptr<int64_t>(), slots.mutable_data_ptr<int64_t>(),
                                 counts.mutable_data_ptr<int64_t>(), workspace.mutable_data_ptr(),
                                 current_stream(places)),
             "deduplicate");
  return {ids, slots, counts};
}

void check_routing(const Tensor& logits, const OptionalTensor& present, const OptionalTensor& counts) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= 16,
                    "logits: expected shape [items, experts] with 1 to 16 experts, got ", logits.sizes());
  check_tensor("logits", logits, {-1, -1}, at::kFloat, logits.device());
  if (present) check_tensor("present", *present, logits.sizes(), at::kBool, logits.device());
  if (counts) check_tensor("counts", *counts, {logits.size(0)}, at::kFloat, logits.device());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routing_forward(const Tensor& logits,
                                                                   const OptionalTensor& present,
                                                                   const OptionalTensor& counts,
                                                                   int64_t top_k) {
  check_routing(logits, present, counts);
  TORCH_CHECK_VALUE(top_k >= 0 && top_k <= logits.size(1), "top_k: expected 0 (all) to ", logits.size(1),
                    ", got ", top_k);
  DeviceGuard guard(logits.device());
  Tensor input = logits.contiguous();
  OptionalTensor exists = contiguous(present), weights = contiguous(counts);
  int64_t count = input.size(0), experts = input.size(1);
  Tensor probability = at::empty_like(input), share = at::empty_like(input);
  Tensor assigned = at::empty({experts}, input.options()), mean = at::empty_like(assigned);
  Tensor total = at::empty({1}, input.options());
  check_code(crossan_routing_forward(input.const_data_ptr<float>(), pointer<const uint8_t>(exists),
                                     pointer<const float>(weights), count, static_cast<int>(experts),
                                     static_cast<int>(top_k), probability.mutable_data_ptr<float>(),
                                     share.mutable_data_ptr<float>(), assigned.mutable_data_ptr<float>(),
                                     mean.mutable_data_ptr<float>(), total.mutable_data_ptr<float>(),
                                     current_stream(input)),
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
  check_code(crossan_routing_backward(gs.const_data_ptr<float>(), gm.const_data_ptr<float>(),
                                      p.const_data_ptr<float>(), s.const_data_ptr<float>(),
                                      pointer<const float>(weights), total.const_data_ptr<float>(), p.size(0),
                                      static_cast<int>(p.size(1)), grad.mutable_data_ptr<float>(),
                                      current_stream(p)),
             "routing_backward");
  return grad;
}

}  // namespace
}  // namespace crossan::binding

CROSSAN_LIBRARY(CROSSAN_NAMESPACE, library) {
  library.def("deduplicate(Tensor item_ids, int capacity) -> (Tensor, Tensor, Tensor)");
  library.def("gather_convert(Tensor states, Tensor? scales, Tensor? ids, ScalarType dtype) -> Tensor");
  library.def(
      "routing_forward(Tensor logits, Tensor? present, Tensor? counts, int top_k)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "routing_backward(Tensor grad_share, Tensor grad_mean, Tensor probability, Tensor share,"
      " Tensor? counts, Tensor total) -> Tensor");
}

CROSSAN_LIBRARY_IMPL(CROSSAN_NAMESPACE, CROSSAN_DISPATCH_KEY, library) {
  using namespace crossan::binding;
  library.impl("deduplicate", &deduplicate);
  library.impl("gather_convert", &gather_convert);
  library.impl("routing_forward", &routing_forward);
  library.impl("routing_backward", &routing_backward);
}
