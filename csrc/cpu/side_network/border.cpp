// side_network's border: checks every argument, then hands pointers to the kernels.

#include "cpu/border.h"
#include "cpu/library.h"
#include "links.h"
#include "side_network.h"
#include "side_network_schema.h"

namespace crossan_fast::border {
namespace {

// Everything the kernels read, and the tensors that keep it alive.
struct Arguments {
  side_network::Structure structure;
  side_network::Inputs inputs;
  std::vector<Tensor> kept;
};

Arguments read_arguments(TensorList states, TensorList scales, const OptionalTensor& ids, const OptionalTensor& present,
                         TensorList weights, side_network::Fields fields) {
  Arguments args{{std::move(fields), 0, 0, 0, 0, 0}, {}, {}};
  side_network::Structure& s = args.structure;
  const size_t modalities = s.widths.size();
  TORCH_CHECK_VALUE(states.size() == modalities, "states: expected ", modalities, " tensors, got ", states.size());
  TORCH_CHECK_VALUE(scales.empty() || scales.size() == modalities, "scales: expected ", modalities,
                    " tensors or none, got ", scales.size());
  TORCH_CHECK_VALUE(!weights.empty() && weights[0].defined() && weights[0].dim() == 3,
                    "weights[0]: expected [L, r, D]");
  TORCH_CHECK_VALUE(states[0].defined() && states[0].dim() == 3, "states[0]: expected [rows, L, D], got ",
                    described(states[0]));
  s.levels = weights[0].size(0);
  s.rank = weights[0].size(1);
  const size_t head = 5 * s.towers.size();
  TORCH_CHECK_VALUE(weights.size() > head && weights[head].defined() && weights[head].dim() == 2, item("weights", head),
                    ": expected [d, D]");
  s.embedding = weights[head].size(0);
  s.rows = states[0].size(0);
  TORCH_CHECK_VALUE(s.levels > 0 && s.rank > 0, "weights[0]: expected L and r above zero, got ", described(weights[0]));
  TORCH_CHECK_VALUE(s.embedding > 0, item("weights", head), ": expected d above zero, got ", described(weights[head]));
  for (size_t m = 0; m < modalities; ++m) {
    check_device(item("states", m), states[m], at::kCPU);
    check_shape(item("states", m), states[m], {s.rows, s.levels, s.widths[m]});
    check_type(item("states", m), states[m],
               {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kFloat8_e4m3fn, at::kChar});
    const Tensor& state = args.kept.emplace_back(rows_in_place(states[m]));
    side_network::States from{
        state.const_data_ptr(), stored_type(state.scalar_type()), state.stride(0), state.stride(1), nullptr, 0, 0};
    if (!scales.empty()) {
      check_device(item("scales", m), scales[m], at::kCPU);
      check_shape(item("scales", m), scales[m], {s.rows, s.levels});
      check_type(item("scales", m), scales[m], {at::kFloat});
      from.scale = scales[m].const_data_ptr<float>();
      from.scale_row = scales[m].stride(0);
      from.scale_level = scales[m].stride(1);
      args.kept.push_back(scales[m]);
    }
    args.inputs.states.push_back(from);
  }
  s.items = s.rows;
  if (ids) {
    check_device("ids", *ids, at::kCPU);
    TORCH_CHECK_VALUE(ids->dim() == 1, "ids: expected one dimension, got ", described(*ids));
    s.items = ids->size(0);
    args.kept.push_back(checked_ids("ids", *ids, 0, s.rows));
    args.inputs.ids = args.kept.back().const_data_ptr<int64_t>();
  }
  if (present) {
    check_device("present", *present, at::kCPU);
    check_shape("present", *present, {s.items, static_cast<int64_t>(modalities)});
    check_type("present", *present, {at::kBool});
    args.kept.push_back(present->contiguous());
    args.inputs.present = args.kept.back().const_data_ptr<bool>();
  }
  return args;
}

// The shapes of SideNetworkWeights.flatten(), field by field; `visit(field, shape)`.
template <class F>
void each_weight(const side_network::Structure& s, F&& visit) {
  const int64_t levels = s.levels, rank = s.rank;
  for (const auto& t : s.towers) visit(0, std::vector<int64_t>{levels, rank, s.width(t)});
  for (size_t t = 0; t < s.towers.size(); ++t) visit(1, std::vector<int64_t>{levels, rank});
  for (const auto& t : s.towers) visit(2, std::vector<int64_t>{levels, s.width(t), rank});
  for (const auto& t : s.towers) visit(3, std::vector<int64_t>{levels, s.width(t)});
  for (size_t t = 0; t < s.towers.size(); ++t) visit(4, std::vector<int64_t>{levels});
  for (const auto& t : s.towers) visit(5, std::vector<int64_t>{s.embedding, s.width(t)});
  for (size_t t = 0; t < s.towers.size(); ++t) visit(6, std::vector<int64_t>{s.embedding});
  const auto pairs = s.cross_pairs();
  for (size_t p = 0; p < pairs.size(); ++p) visit(7, std::vector<int64_t>{levels});
  for (const auto& [m, n] : pairs)
    if (s.projected(m, n)) visit(8, std::vector<int64_t>{rank, s.widths[n]});
  for (const auto& [m, n] : pairs)
    if (s.projected(m, n)) visit(9, std::vector<int64_t>{s.widths[m], rank});
  for (const auto& t : s.towers)
    if (s.narrowed(t)) visit(10, std::vector<int64_t>{levels, s.width(t), s.widths[s.wide(t)]});
  for (const auto& t : s.towers)
    if (s.narrowed(t)) visit(11, std::vector<int64_t>{levels, s.width(t)});
}

void check_weights(const side_network::Structure& s, TensorList weights) {
  size_t count = 0;
  each_weight(s, [&](int, const std::vector<int64_t>& shape) {
    TORCH_CHECK_VALUE(count < weights.size(), "weights: got only ", weights.size(), " tensors");
    const std::string name = item("weights", count);
    check_device(name, weights[count], at::kCPU);
    check_floating(name, weights[count]);
    check_shape(name, weights[count++], shape);
  });
  TORCH_CHECK_VALUE(count == weights.size(), "weights: expected ", count, " tensors, got ", weights.size());
}

template <class P, class F>
side_network::Weights<P> group_weights(const side_network::Structure& s, F&& pointer) {
  side_network::Weights<P> w;
  std::vector<P>* fields[] = {&w.down_weight, &w.down_bias,  &w.up_weight,  &w.up_bias,  &w.gate,        &w.head_weight,
                              &w.head_bias,   &w.cross_gate, &w.cross_down, &w.cross_up, &w.pair_weight, &w.pair_bias};
  size_t next = 0;
  each_weight(s, [&](int field, const std::vector<int64_t>&) { fields[field]->push_back(pointer(next++)); });
  return w;
}

int64_t links_size(const side_network::Structure& s) { return s.walks_with_h() ? 0 : s.links(); }

}  // namespace

std::vector<Tensor> side_network(TensorList states, TensorList scales, const OptionalTensor& ids,
                                 const OptionalTensor& present, TensorList weights, at::IntArrayRef widths,
                                 at::IntArrayRef sources, c10::string_view cross, c10::string_view activation,
                                 double temperature, c10::string_view cross_projection, at::ScalarType dtype) {
  const Arguments args =
      read_arguments(states, scales, ids, present, weights,
                     side_network::read_fields(widths, sources, cross, activation, temperature, cross_projection));
  const side_network::Structure& s = args.structure;
  check_weights(s, weights);
  return in_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto towers = static_cast<int64_t>(s.towers.size());
    std::vector<Tensor> out{empty({s.items, towers, s.embedding}, dtype),
                            empty({towers, s.items, s.levels, s.rank}, dtype),
                            empty({towers, links_size(s)}, kScalarType<T>)};
    if (s.items == 0) {
      out[2].zero_();
      return out;
    }
    const auto own = all_in_type<T>(weights);
    const auto grouped = group_weights<const T*>(s, [&](size_t i) { return own[i].template const_data_ptr<T>(); });
    const side_network::Kept kept{out[0].mutable_data_ptr(), out[1].mutable_data_ptr(), stored_type(dtype)};
    side_network::forward<T>(s, args.inputs, grouped, kept, out[2].template mutable_data_ptr<T>());
    return out;
  });
}

std::vector<Tensor> side_network_backward(const Tensor& grad_embeddings, const Tensor& saved, const Tensor& links,
                                          TensorList states, TensorList scales, const OptionalTensor& ids,
                                          const OptionalTensor& present, TensorList weights, at::IntArrayRef widths,
                                          at::IntArrayRef sources, c10::string_view cross, c10::string_view activation,
                                          double temperature, c10::string_view cross_projection, at::ScalarType dtype) {
  const Arguments args =
      read_arguments(states, scales, ids, present, weights,
                     side_network::read_fields(widths, sources, cross, activation, temperature, cross_projection));
  const side_network::Structure& s = args.structure;
  check_weights(s, weights);
  const auto towers = static_cast<int64_t>(s.towers.size());
  check_device("grad_embeddings", grad_embeddings, at::kCPU);
  check_type("grad_embeddings", grad_embeddings, {dtype});
  check_shape("grad_embeddings", grad_embeddings, {s.items, towers, s.embedding});
  check_device("saved", saved, at::kCPU);
  check_type("saved", saved, {dtype});
  check_shape("saved", saved, {towers, s.items, s.levels, s.rank});
  check_device("links", links, at::kCPU);
  check_shape("links", links, {towers, links_size(s)});
  return in_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    check_type("links", links, {kScalarType<T>});
    std::vector<Tensor> grads;
    for (const Tensor& weight : weights) {
      grads.push_back(empty(weight.sizes(), kScalarType<T>));
      if (s.items == 0) grads.back().zero_();
    }
    if (s.items > 0) {
      const Tensor incoming = grad_embeddings.contiguous(), kept = saved.contiguous(), kept_links = links.contiguous();
      const auto own = all_in_type<T>(weights);
      const auto grouped = group_weights<const T*>(s, [&](size_t i) { return own[i].template const_data_ptr<T>(); });
      const auto sums = group_weights<T*>(s, [&](size_t i) { return grads[i].template mutable_data_ptr<T>(); });
      side_network::backward<T>(s, args.inputs, grouped, {incoming.data_ptr(), kept.data_ptr(), stored_type(dtype)},
                                kept_links.template const_data_ptr<T>(), sums);
    }
    for (size_t i = 0; i < grads.size(); ++i) grads[i] = grads[i].to(weights[i].scalar_type());
    return grads;
  });
}

}  // namespace crossan_fast::border
