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

// weights: router_weight, router_bias, w1, b1, w2, b2.
Arguments read_arguments(const Tensor& embeddings, TensorList weights, const OptionalTensor& present,
                         std::optional<int64_t> top_k, const OptionalTensor& counts) {
  check_device("embeddings", embeddings, at::kCPU);
  check_floating("embeddings", embeddings);
  TORCH_CHECK_VALUE(weights.size() == 6, "weights: expected 6 tensors, got ", weights.size());
  const Tensor& w1 = weights[2];
  TORCH_CHECK_VALUE(embeddings.dim() == 3 && w1.dim() == 3, "embeddings and w1: expected [N, M, d] and [M, f, d], got ",
                    described(embeddings), " and ", described(w1));
  const int64_t count = embeddings.size(1);
  Arguments args{{embeddings.size(0), count, embeddings.size(2), w1.size(1), 0}, {}, {}};
  fusion::Sizes& s = args.sizes;
  TORCH_CHECK_VALUE(count > 0 && s.width > 0 && s.expansion > 0,
                    "embeddings and w1: expected M, d and f above zero, got ", described(embeddings), " and ",
                    described(w1));
  args.kept.push_back(embeddings.contiguous());
  args.inputs = {args.kept.back().const_data_ptr(), stored_type(embeddings.scalar_type()), nullptr, nullptr};
  const std::vector<int64_t> shapes[] = {{count, count * s.width},      {count},
                                         {count, s.expansion, s.width}, {count, s.expansion},
                                         {count, s.width, s.expansion}, {count, s.width}};
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
fusion::Weights<P> group(F&& pointer) {
  return {pointer(0), pointer(1), pointer(2), pointer(3), pointer(4), pointer(5)};
}

}  // namespace

std::vector<Tensor> fusion(const Tensor& embeddings, TensorList weights, const OptionalTensor& present,
                           std::optional<int64_t> top_k, const OptionalTensor& counts, at::ScalarType dtype) {
  const Arguments args = read_arguments(embeddings, weights, present, top_k, counts);
  const fusion::Sizes& s = args.sizes;
  return in_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr at::ScalarType wide = kScalarType<T>;
    Tensor items = empty({s.items, s.width}, dtype), logits = empty({s.items, s.modalities}, wide);
    Tensor assigned = zeros({s.modalities}, wide), probability = zeros({s.modalities}, wide);
    if (s.items > 0) {
      const auto own = all_in_type<T>(weights);
      const auto grouped = group<const T*>([&](size_t i) { return own[i].template const_data_ptr<T>(); });
      fusion::forward<T>(s, args.inputs, grouped, stored_type(dtype), items.mutable_data_ptr(),
                         logits.template mutable_data_ptr<T>(), assigned.template mutable_data_ptr<T>(),
                         probability.template mutable_data_ptr<T>());
    }
    return std::vector<Tensor>{items, assigned, probability, logits};
  });
}

std::vector<Tensor> fusion_backward(const Tensor& grad_items, const Tensor& grad_probability, const Tensor& logits,
                                    const Tensor& embeddings, TensorList weights, const OptionalTensor& present,
                                    std::optional<int64_t> top_k, const OptionalTensor& counts, at::ScalarType dtype) {
  const Arguments args = read_arguments(embeddings, weights, present, top_k, counts);
  const fusion::Sizes& s = args.sizes;
  check_device("grad_items", grad_items, at::kCPU);
  check_type("grad_items", grad_items, {dtype});
  check_shape("grad_items", grad_items, {s.items, s.width});
  check_device("grad_probability", grad_probability, at::kCPU);
  check_shape("grad_probability", grad_probability, {s.modalities});
  check_device("logits", logits, at::kCPU);
  check_shape("logits", logits, {s.items, s.modalities});
  return in_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Tensor> grads{empty(embeddings.sizes(), embeddings.scalar_type())}, grad_weights;
    for (const Tensor& weight : weights) {
      grad_weights.push_back(empty(weight.sizes(), kScalarType<T>));
      if (s.items == 0) grad_weights.back().zero_();
    }
    if (s.items > 0) {
      const auto own = all_in_type<T>(weights);
      const auto grouped = group<const T*>([&](size_t i) { return own[i].template const_data_ptr<T>(); });
      const auto sums = group<T*>([&](size_t i) { return grad_weights[i].template mutable_data_ptr<T>(); });
      const Tensor incoming = grad_items.contiguous(), balance = in_type<T>(grad_probability);
      const Tensor kept = in_type<T>(logits);
      fusion::backward<T>(s, args.inputs, grouped, stored_type(dtype), incoming.const_data_ptr(),
                          balance.template const_data_ptr<T>(), kept.template const_data_ptr<T>(),
                          grads[0].mutable_data_ptr(), sums);
    }
    for (size_t i = 0; i < weights.size(); ++i) grads.push_back(grad_weights[i].to(weights[i].scalar_type()));
    return grads;
  });
}

}  // namespace crossan_fast::border
