// fusion's border: checks every argument, then hands pointers to the kernels.

#include "cpu/border.h"
#include "cpu/library.h"
#include "fusion.h"

namespace crossan_fast::border {
namespace {

struct Arguments {
  fusion::Sizes sizes;
  fusion::Inputs inputs;
  std::vector<Tensor> kept;
};

// weights: head_weight and head_bias of each modality, then router_weight, router_bias, w1, b1, w2, b2.
Arguments read_arguments(TensorList hidden, TensorList weights, const OptionalTensor& present,
                         std::optional<int64_t> top_k, const OptionalTensor& counts) {
  const size_t modalities = hidden.size();
  TORCH_CHECK_VALUE(modalities > 0, "hidden: expected at least one modality");
  TORCH_CHECK_VALUE(weights.size() == 2 * modalities + 6, "weights: expected ", 2 * modalities + 6, " tensors, got ",
                    weights.size());
  const auto count = static_cast<int64_t>(modalities);
  const Tensor& w1 = weights[2 * modalities + 2];
  TORCH_CHECK_VALUE(hidden[0].dim() == 2 && w1.dim() == 3, "hidden[0] and w1: expected [N, D] and [M, f, d], got ",
                    described(hidden[0]), " and ", described(w1));
  Arguments args{{hidden[0].size(0), count, w1.size(2), w1.size(1), {}, 0}, {}, {}};
  fusion::Sizes& s = args.sizes;
  TORCH_CHECK_VALUE(s.width > 0 && s.expansion > 0, "w1: expected f and d above zero, got ", described(w1));
  for (size_t m = 0; m < modalities; ++m) {
    check_device(item("hidden", m), hidden[m], at::kCPU);
    check_floating(item("hidden", m), hidden[m]);
    TORCH_CHECK_VALUE(hidden[m].dim() == 2 && hidden[m].size(0) == s.items && hidden[m].size(1) > 0, item("hidden", m),
                      ": expected [", s.items, ", D], got ", described(hidden[m]));
    s.widths.push_back(hidden[m].size(1));
    args.kept.push_back(hidden[m].contiguous());
    args.inputs.hidden.push_back({args.kept.back().const_data_ptr(), stored_type(hidden[m].scalar_type())});
  }
  std::vector<std::vector<int64_t>> shapes;
  for (const int64_t width : s.widths) shapes.push_back({s.width, width});
  for (size_t m = 0; m < modalities; ++m) shapes.push_back({s.width});
  shapes.insert(shapes.end(), {{count, count * s.width},
                               {count},
                               {count, s.expansion, s.width},
                               {count, s.expansion},
                               {count, s.width, s.expansion},
                               {count, s.width}});
  for (size_t i = 0; i < weights.size(); ++i) {
    check_device(item("weights", i), weights[i], at::kCPU);
    check_floating(item("weights", i), weights[i]);
    check_shape(item("weights", i), weights[i], shapes[i]);
  }
  if (top_k) {
    TORCH_CHECK_VALUE(*top_k >= 1 && *top_k <= count, "top_k: expected 1 to ", count, ", got ", *top_k);
    s.top_k = *top_k;
  }
  if (present) {
    check_device("present", *present, at::kCPU);
    check_type("present", *present, {at::kBool});
    check_shape("present", *present, {s.items, count});
    args.kept.push_back(present->contiguous());
    args.inputs.present = args.kept.back().const_data_ptr<bool>();
  }
  if (counts) {
    check_device("counts", *counts, at::kCPU);
    check_type("counts", *counts, {at::kLong});
    check_shape("counts", *counts, {s.items});
    args.kept.push_back(counts->contiguous());
    args.inputs.counts = args.kept.back().const_data_ptr<int64_t>();
  }
  return args;
}

template <class P, class F>
fusion::Weights<P> group(size_t modalities, F&& pointer) {
  fusion::Weights<P> w{};
  for (size_t m = 0; m < modalities; ++m) w.head_weight.push_back(pointer(m));
  for (size_t m = 0; m < modalities; ++m) w.head_bias.push_back(pointer(modalities + m));
  P* rest[] = {&w.router_weight, &w.router_bias, &w.w1, &w.b1, &w.w2, &w.b2};
  for (size_t i = 0; i < 6; ++i) *rest[i] = pointer(2 * modalities + i);
  return w;
}

}  // namespace

std::vector<Tensor> fusion(TensorList hidden, TensorList weights, const OptionalTensor& present,
                           std::optional<int64_t> top_k, const OptionalTensor& counts, at::ScalarType dtype) {
  const Arguments args = read_arguments(hidden, weights, present, top_k, counts);
  const fusion::Sizes& s = args.sizes;
  return in_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr at::ScalarType wide = kScalarType<T>;
    Tensor items = empty({s.items, s.width}, dtype), e = empty({s.items, s.modalities * s.width}, dtype);
    Tensor logits = empty({s.items, s.modalities}, wide);
    Tensor assigned = zeros({s.modalities}, wide), probability = zeros({s.modalities}, wide);
    if (s.items > 0) {
      std::vector<Tensor> own;
      for (const Tensor& weight : weights) own.push_back(in_type<T>(weight));
      const auto grouped =
          group<const T*>(hidden.size(), [&](size_t i) { return own[i].template const_data_ptr<T>(); });
      fusion::forward<T>(s, args.inputs, grouped, stored_type(dtype), items.mutable_data_ptr(), e.mutable_data_ptr(),
                         logits.template mutable_data_ptr<T>(), assigned.template mutable_data_ptr<T>(),
                         probability.template mutable_data_ptr<T>());
    }
    return std::vector<Tensor>{items, assigned, probability, e, logits};
  });
}

std::vector<Tensor> fusion_backward(const Tensor& grad_items, const Tensor& grad_probability, TensorList saved,
                                    TensorList hidden, TensorList weights, const OptionalTensor& present,
                                    std::optional<int64_t> top_k, const OptionalTensor& counts, at::ScalarType dtype) {
  const Arguments args = read_arguments(hidden, weights, present, top_k, counts);
  const fusion::Sizes& s = args.sizes;
  check_device("grad_items", grad_items, at::kCPU);
  check_type("grad_items", grad_items, {dtype});
  check_shape("grad_items", grad_items, {s.items, s.width});
  check_device("grad_probability", grad_probability, at::kCPU);
  check_shape("grad_probability", grad_probability, {s.modalities});
  TORCH_CHECK_VALUE(saved.size() == 2, "saved: expected 2 tensors, got ", saved.size());
  check_device("saved[0]", saved[0], at::kCPU);
  check_device("saved[1]", saved[1], at::kCPU);
  check_type("saved[0]", saved[0], {dtype});
  check_shape("saved[0]", saved[0], {s.items, s.modalities * s.width});
  check_shape("saved[1]", saved[1], {s.items, s.modalities});
  return in_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Tensor> grads, grad_weights;
    std::vector<void*> grad_hidden;
    for (const Tensor& tensor : hidden) {
      grads.push_back(empty(tensor.sizes(), tensor.scalar_type()));
      grad_hidden.push_back(grads.back().mutable_data_ptr());
    }
    for (const Tensor& weight : weights) {
      grad_weights.push_back(empty(weight.sizes(), kScalarType<T>));
      if (s.items == 0) grad_weights.back().zero_();
    }
    if (s.items > 0) {
      std::vector<Tensor> own;
      for (const Tensor& weight : weights) own.push_back(in_type<T>(weight));
      const auto grouped =
          group<const T*>(hidden.size(), [&](size_t i) { return own[i].template const_data_ptr<T>(); });
      const auto sums =
          group<T*>(hidden.size(), [&](size_t i) { return grad_weights[i].template mutable_data_ptr<T>(); });
      const Tensor incoming = grad_items.contiguous(), balance = in_type<T>(grad_probability);
      const Tensor e = saved[0].contiguous(), logits = in_type<T>(saved[1]);
      fusion::backward<T>(s, args.inputs, grouped, stored_type(dtype), incoming.const_data_ptr(),
                          balance.template const_data_ptr<T>(), e.const_data_ptr(), logits.template const_data_ptr<T>(),
                          grad_hidden, sums);
    }
    for (size_t i = 0; i < weights.size(); ++i) grads.push_back(grad_weights[i].to(weights[i].scalar_type()));
    return grads;
  });
}

}  // namespace crossan_fast::border
