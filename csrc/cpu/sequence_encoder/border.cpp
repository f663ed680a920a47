// sequence_encoder's border: checks every argument, then hands pointers to the kernels.

#include "cpu/border.h"
#include "cpu/library.h"
#include "sequence_encoder.h"

namespace crossan_fast::border {
namespace {

constexpr size_t kShared = 3, kPerLayer = 12;  // weights before the blocks; weights of a block

struct Arguments {
  sequence_encoder::Sizes sizes;
  sequence_encoder::Inputs inputs;
  Tensor items, mask;  // what `inputs` points into
};

// weights: position, norm's gain and bias, then of each block query, key, value, out, the norm after attention, widen,
// narrow, the norm after those; gain or weight before bias.
Arguments read_arguments(const Tensor& items, const Tensor& mask, TensorList weights, int64_t heads, double eps,
                         double dropout, const OptionalTensor& seed) {
  check_device("items", items, at::kCPU);
  check_floating("items", items);
  TORCH_CHECK_VALUE(items.dim() == 3 && items.size(2) > 0, "items: expected [B, S, d] with d above zero, got ",
                    described(items));
  TORCH_CHECK_VALUE(weights.size() >= kShared && (weights.size() - kShared) % kPerLayer == 0, "weights: expected ",
                    kShared, " tensors and ", kPerLayer, " a block, got ", weights.size());
  const int64_t batch = items.size(0), places = items.size(1), d = items.size(2);
  TORCH_CHECK_VALUE(heads > 0 && d % heads == 0, "heads: expected a divisor of ", d, ", got ", heads);
  TORCH_CHECK_VALUE(eps > 0, "eps: expected a positive number, got ", eps);
  TORCH_CHECK_VALUE(dropout >= 0 && dropout < 1, "dropout: expected a probability in [0, 1), got ", dropout);
  TORCH_CHECK_VALUE(dropout == 0 || seed, "seed: dropout=", dropout, " needs one");
  check_device("mask", mask, at::kCPU);
  check_type("mask", mask, {at::kBool});
  check_shape("mask", mask, {batch, places});
  const auto layers = static_cast<int64_t>((weights.size() - kShared) / kPerLayer);
  TORCH_CHECK_VALUE(weights[0].defined() && weights[0].dim() == 2 && weights[0].size(0) >= places,
                    "weights[0]: expected a position for each of ", places, " places, got ", described(weights[0]));
  const int64_t window = weights[0].size(0);
  int64_t inner = 0;
  if (layers > 0) {
    const Tensor& widen = weights[kShared + 6];
    TORCH_CHECK_VALUE(widen.defined() && widen.dim() == 2 && widen.size(0) > 0, item("weights", kShared + 6),
                      ": expected [f, ", d, "], got ", described(widen));
    inner = widen.size(0);
  }
  std::vector<std::vector<int64_t>> shapes{{window, d}, {d}, {d}};
  for (int64_t l = 0; l < layers; ++l)
    shapes.insert(shapes.end(),
                  {{d, d}, {d, d}, {d, d}, {d, d}, {d}, {d}, {inner, d}, {inner}, {d, inner}, {d}, {d}, {d}});
  for (size_t i = 0; i < weights.size(); ++i) {
    check_device(item("weights", i), weights[i], at::kCPU);
    check_floating(item("weights", i), weights[i]);
    check_shape(item("weights", i), weights[i], shapes[i]);
  }
  Arguments args{{batch, places, d, heads, inner, layers, window, eps}, {}, items.contiguous(), mask.contiguous()};
  if (seed) {
    check_device("seed", *seed, at::kCPU);
    check_type("seed", *seed, {at::kLong});
    check_shape("seed", *seed, {});
    args.inputs.dropout = Dropout(dropout, *seed->const_data_ptr<int64_t>());
  }
  args.inputs.items = args.items.const_data_ptr();
  args.inputs.type = stored_type(items.scalar_type());
  args.inputs.mask = args.mask.const_data_ptr<bool>();
  return args;
}

template <class P, class F>
sequence_encoder::Weights<P> group(int64_t layers, const F& pointer) {
  sequence_encoder::Weights<P> w{pointer(0), pointer(1), pointer(2), {}};
  for (int64_t l = 0; l < layers; ++l) {
    size_t i = kShared + static_cast<size_t>(l) * kPerLayer;
    sequence_encoder::Layer<P> layer;
    for (P* field :
         {&layer.query, &layer.key, &layer.value, &layer.out, &layer.attention_gain, &layer.attention_bias,
          &layer.widen, &layer.widen_bias, &layer.narrow, &layer.narrow_bias, &layer.forward_gain, &layer.forward_bias})
      *field = pointer(i++);
    w.layers.push_back(layer);
  }
  return w;
}

template <class T>
std::vector<Tensor> in_types(TensorList weights) {
  std::vector<Tensor> own;
  for (const Tensor& weight : weights) own.push_back(in_type<T>(weight));
  return own;
}

}  // namespace

Pair sequence_encoder(const Tensor& items, const Tensor& mask, TensorList weights, int64_t heads, double eps,
                      double dropout, const OptionalTensor& seed, bool keep, at::ScalarType dtype) {
  const Arguments args = read_arguments(items, mask, weights, heads, eps, dropout, seed);
  const auto& s = args.sizes;
  return in_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    Tensor users = zeros({s.batch, s.places, s.width}, dtype);
    Tensor kept = empty({keep ? s.batch * s.places : 0, sequence_encoder::kept_width(s)}, kScalarType<T>);
    const std::vector<Tensor> own = in_types<T>(weights);
    const auto grouped = group<const T*>(s.layers, [&](size_t i) { return own[i].template const_data_ptr<T>(); });
    sequence_encoder::forward<T>(s, args.inputs, grouped, stored_type(dtype), users.mutable_data_ptr(),
                                 keep ? kept.template mutable_data_ptr<T>() : nullptr);
    return std::tuple(users, kept);
  });
}

std::vector<Tensor> sequence_encoder_backward(const Tensor& grad_users, const Tensor& kept, const Tensor& items,
                                              const Tensor& mask, TensorList weights, int64_t heads, double eps,
                                              double dropout, const OptionalTensor& seed, at::ScalarType dtype) {
  const Arguments args = read_arguments(items, mask, weights, heads, eps, dropout, seed);
  const auto& s = args.sizes;
  check_device("grad_users", grad_users, at::kCPU);
  check_type("grad_users", grad_users, {dtype});
  check_shape("grad_users", grad_users, items.sizes());
  check_device("kept", kept, at::kCPU);
  check_shape("kept", kept, {s.batch * s.places, sequence_encoder::kept_width(s)});
  return in_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    check_type("kept", kept, {kScalarType<T>});
    std::vector<Tensor> grads{zeros(items.sizes(), items.scalar_type())};
    std::vector<Tensor> sums;
    for (const Tensor& weight : weights) sums.push_back(empty(weight.sizes(), kScalarType<T>));
    const std::vector<Tensor> own = in_types<T>(weights);
    const auto grouped = group<const T*>(s.layers, [&](size_t i) { return own[i].template const_data_ptr<T>(); });
    const auto into = group<T*>(s.layers, [&](size_t i) { return sums[i].template mutable_data_ptr<T>(); });
    const Tensor incoming = grad_users.contiguous(), saved = kept.contiguous();
    sequence_encoder::backward<T>(s, args.inputs, grouped, stored_type(dtype), incoming.const_data_ptr(),
                                  saved.template const_data_ptr<T>(), grads[0].mutable_data_ptr(), into);
    for (size_t i = 0; i < weights.size(); ++i) grads.push_back(sums[i].to(weights[i].scalar_type()));
    return grads;
  });
}

}  // namespace crossan_fast::border
