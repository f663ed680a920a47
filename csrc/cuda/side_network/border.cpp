// Registers side_network's forward and backward with torch.

#include "cuda/border.h"
#include "side_network_schema.h"

namespace crossan_fast::border {

Tensor gather_convert(const Tensor& states, const OptionalTensor& scales, const OptionalTensor& ids,
                      at::ScalarType dtype);

namespace {

using Tensors = std::vector<Tensor>;

using side_network::Cross;

constexpr size_t kGroups = 7;  // of a tower's weights, in the order of SideNetworkWeights; cross gates follow

struct Structure : side_network::Fields {
  at::ScalarType dtype;
  int64_t path, backward_items;
};

// A call after its checks: the C interface's struct, and the tensors that its pointers point into.
struct Call {
  CrossanSideNetwork network = {};
  Tensors kept;
  std::vector<int64_t> tower_widths;
  at::TensorOptions options;

  const void* keep(const Tensor& tensor) {
    kept.push_back(dense_and_aligned(tensor));
    return kept.back().const_data_ptr();
  }
};

// The limits of interface.h.
void check_structure(const Structure& s) {
  const size_t modalities = s.widths.size(), towers = s.towers.size();
  TORCH_CHECK_VALUE(modalities <= kCrossanMaxModalities, "widths: expected 1 to ", int(kCrossanMaxModalities),
                    " modalities, got ", modalities);
  TORCH_CHECK_VALUE(towers <= kCrossanMaxTowers, "sources: expected ", modalities, " to ", int(kCrossanMaxTowers),
                    " towers, got ", towers);
  for (int64_t width : s.widths)
    TORCH_CHECK_VALUE(width % 64 == 0 && width <= 1 << 16, "widths: expected multiples of 64, got ", width);
  for (const auto& [a, b] : s.towers)
    TORCH_CHECK_VALUE(b < 0 || s.widths[a] == s.widths[b], "widths: expected equal widths for the pair (", a, ", ", b,
                      "), got ", s.widths);
  TORCH_CHECK_VALUE(s.cross != Cross::side, "cross: expected backbone or none, got side");
  if (s.cross == Cross::backbone) {
    TORCH_CHECK_VALUE(modalities <= kCrossanMaxSources, "widths: expected at most ", int(kCrossanMaxSources),
                      " modalities with cross gates, got ", modalities);
    for (int64_t width : s.widths)
      TORCH_CHECK_VALUE(width == s.widths[0], "widths: expected equal widths with cross gates, got ", s.widths);
    TORCH_CHECK_VALUE(!s.low_rank, "cross_projection: expected identity with cross gates, got low_rank");
  }
  TORCH_CHECK_TYPE(s.dtype == at::kHalf || s.dtype == at::kBFloat16, "dtype: expected float16 or bfloat16, got ",
                   s.dtype);
  TORCH_CHECK_VALUE(s.path >= kCrossanPathAuto && s.path <= kCrossanPathHopper,
                    "path: expected 0 (auto), 1 (mma) or 2 (Hopper), got ", s.path);
  TORCH_CHECK_VALUE(s.backward_items >= 0, "backward_items: expected 0 (its choice) or more, got ", s.backward_items);
}

void add_weights(Call& call, const Structure& s, at::TensorList flat, const at::Device& device) {
  CrossanSideNetwork& n = call.network;
  size_t towers = n.towers, modalities = n.modalities;
  size_t crosses = s.cross == Cross::backbone ? modalities * (modalities - 1) : 0, own = kGroups * towers;
  TORCH_CHECK_VALUE(flat.size() == own + crosses, "weights: expected ", own + crosses, " tensors, got ", flat.size());
  const Tensor& down = flat[0];
  TORCH_CHECK_VALUE(down.dim() == 3, "weights[0]: expected shape [levels, rank, width], got ", down.sizes());
  int64_t levels = down.size(0), rank = down.size(1);
  TORCH_CHECK_VALUE(levels >= 1 && levels <= kCrossanMaxLevels, "weights[0]: expected 1 to ", int(kCrossanMaxLevels),
                    " levels, got ", levels);
  TORCH_CHECK_VALUE(rank >= 8 && rank <= 64 && rank % 8 == 0,
                    "weights[0]: expected a rank that is a multiple of 8 up to 64, got ", rank);
  at::ScalarType type = down.scalar_type();
  n.levels = static_cast<int>(levels), n.rank = static_cast<int>(rank), n.weight_kind = kind_of(type);
  TORCH_CHECK_TYPE(n.weight_kind >= 0 && n.weight_kind <= 2, "weights[0]: expected float32, float16 or bfloat16, got ",
                   type);
  const std::string head = item("weights", 5 * towers);
  TORCH_CHECK_VALUE(flat[5 * towers].dim() == 2, head, ": expected shape [embedding, width], got ",
                    flat[5 * towers].sizes());
  const int64_t embedding = flat[5 * towers].size(0), slots = levels + (embedding + 63) / 64;
  TORCH_CHECK_VALUE(embedding >= 8 && embedding % 8 == 0 && slots <= kCrossanMaxSlots, head,
                    ": expected an embedding that is a multiple of 8 up to ", 64 * (kCrossanMaxSlots - levels),
                    " with ", levels, " levels, got ", embedding);
  n.embedding = static_cast<int>(embedding);
  for (size_t i = 0; i < flat.size(); ++i) {
    int64_t width = i < own ? call.tower_widths[i % towers] : 0;
    const std::vector<int64_t> shapes[] = {{levels, rank, width}, {levels, rank}, {levels, width, rank},
                                           {levels, width},       {levels},       {embedding, width},
                                           {embedding},           {levels}};
    check_tensor(item("weights", i), flat[i], shapes[i < own ? i / towers : kGroups], type, device);
  }
  for (size_t t = 0; t < towers; ++t) {
    n.down_weight[t] = call.keep(flat[t]), n.down_bias[t] = call.keep(flat[towers + t]);
    n.up_weight[t] = call.keep(flat[2 * towers + t]), n.up_bias[t] = call.keep(flat[3 * towers + t]);
    n.gate[t] = call.keep(flat[4 * towers + t]);
    n.head_weight[t] = call.keep(flat[5 * towers + t]), n.head_bias[t] = call.keep(flat[6 * towers + t]);
    if (crosses && t < modalities)
      for (size_t i = 0; i < modalities - 1; ++i) n.cross_gate[t][i] = call.keep(flat[own + t * (modalities - 1) + i]);
  }
}

// States that the kernels cannot read by id (fp32, or not on 16 bytes) become a dense 16-bit copy.
void add_states(Call& call, const Structure& s, at::TensorList states, at::TensorList scales, const OptionalTensor& ids,
                const OptionalTensor& present, const at::Device& device) {
  CrossanSideNetwork& n = call.network;
  TORCH_CHECK_VALUE(static_cast<int>(states.size()) == n.modalities, "states: expected ", n.modalities,
                    " tensors, got ", states.size());
  TORCH_CHECK_VALUE(scales.empty() || scales.size() == states.size(), "scales: expected none or ", states.size(),
                    " tensors, got ", scales.size());
  int64_t rows = states[0].dim() == 3 ? states[0].size(0) : 0;
  bool direct = true;
  for (size_t m = 0; m < states.size(); ++m) {
    std::string name = item("states", m);
    at::ScalarType type = states[m].scalar_type();
    TORCH_CHECK_TYPE(kind_of(type) >= 0, name, ": expected float32, float16, bfloat16, float8_e4m3fn or int8, got ",
                     type);
    check_tensor(name, states[m], {rows, n.levels, s.widths[m]}, type, device);
    TORCH_CHECK_VALUE(!scales.empty() || kind_of(type) <= 2, name, ": ", type, " needs scales");
    if (!scales.empty()) check_tensor(item("scales", m), scales[m], {rows, n.levels}, at::kFloat, device);
    direct = direct && type != at::kFloat && reinterpret_cast<uintptr_t>(states[m].const_data_ptr()) % 16 == 0;
  }
  n.items = rows;
  if (ids) {
    check_ids("ids", *ids);
    check_tensor("ids", *ids, {-1}, ids->scalar_type(), device);
    n.items = ids->size(0);
  }
  if (present) {
    check_tensor("present", *present, {n.items, n.modalities}, at::kBool, device);
    n.present = static_cast<const uint8_t*>(call.keep(*present));
  }
  n.rows = direct ? rows : n.items;
  if (ids && direct) n.ids = call.keep(*ids), n.wide = is_wide(ids);
  for (size_t m = 0; m < states.size(); ++m) {
    Tensor state = states[m].contiguous();
    OptionalTensor scale = scales.empty() ? std::nullopt : OptionalTensor(scales[m].contiguous());
    if (!direct) {
      state = gather_convert(state, scale, ids, s.dtype);
      scale.reset();
    }
    n.states[m] = call.keep(state), n.state_kinds[m] = kind_of(state.scalar_type());
    n.widths[m] = static_cast<int>(s.widths[m]);
    if (scale) n.scales[m] = static_cast<const float*>(call.keep(*scale));
  }
}

Call prepare_call(at::TensorList states, at::TensorList scales, const OptionalTensor& ids,
                  const OptionalTensor& present, at::TensorList weights, const Structure& s) {
  check_structure(s);
  TORCH_CHECK_VALUE(!states.empty() && !weights.empty(), "states: expected at least one tensor, got none");
  at::Device device = weights[0].device();
  Call call;
  CrossanSideNetwork& n = call.network;
  n.modalities = static_cast<int>(s.widths.size()), n.towers = static_cast<int>(s.towers.size());
  n.relu = s.relu, n.temperature = static_cast<float>(s.temperature);
  n.compute_kind = kind_of(s.dtype), n.path = static_cast<int>(s.path);
  n.backward_items = s.backward_items;
  for (int t = 0; t < n.towers; ++t) {
    const auto [a, b] = s.towers[t];
    call.tower_widths.push_back(s.widths[a]);
    n.sources[t][n.source_counts[t]++] = a;
    n.is_pair[t] = b >= 0;
    if (b >= 0)
      n.sources[t][n.source_counts[t]++] = b;
    else if (s.cross == Cross::backbone)
      for (int m = 0; m < n.modalities; ++m)
        if (m != a) n.sources[t][n.source_counts[t]++] = m;
  }
  add_weights(call, s, weights, device);
  add_states(call, s, states, scales, ids, present, device);
  call.options = weights[0].options();
  return call;
}

Tensor workspace_for(const Call& call, bool backward) {
  auto bytes = static_cast<int64_t>(crossan_side_network_workspace(&call.network, backward));
  return at::empty({bytes}, call.options.dtype(at::kByte));
}

Tensors side_network_forward(at::TensorList states, at::TensorList scales, const OptionalTensor& ids,
                             const OptionalTensor& present, at::TensorList weights, at::IntArrayRef widths,
                             at::IntArrayRef sources, c10::string_view cross, c10::string_view activation,
                             double temperature, c10::string_view cross_projection, at::ScalarType dtype, int64_t path,
                             int64_t backward_items) {
  TORCH_CHECK_VALUE(!weights.empty(), "weights: expected tensors, got none");
  DeviceGuard guard(weights[0].device());
  Call call =
      prepare_call(states, scales, ids, present, weights,
                   {side_network::read_fields(widths, sources, cross, activation, temperature, cross_projection), dtype,
                    path, backward_items});
  CrossanSideNetwork& n = call.network;
  const at::TensorOptions options = call.options.dtype(dtype);
  Tensors results = {at::empty({n.items, n.towers, n.embedding}, options),
                     at::empty({n.towers, n.items, n.levels, n.rank}, options),
                     at::empty({n.towers, 0}, call.options.dtype(at::kFloat))};  // no links are kept
  n.embeddings = results[0].mutable_data_ptr(), n.saved = results[1].mutable_data_ptr();
  Tensor workspace = workspace_for(call, false);
  check_code(crossan_side_network_forward(&n, workspace.mutable_data_ptr(), current_stream(workspace)), "side_network");
  return results;
}

Tensors side_network_backward(const Tensor& grad_embeddings, const Tensor& saved, const Tensor& /*links*/,
                              at::TensorList states, at::TensorList scales, const OptionalTensor& ids,
                              const OptionalTensor& present, at::TensorList weights, at::IntArrayRef widths,
                              at::IntArrayRef sources, c10::string_view cross, c10::string_view activation,
                              double temperature, c10::string_view cross_projection, at::ScalarType dtype, int64_t path,
                              int64_t backward_items) {
  TORCH_CHECK_VALUE(!weights.empty(), "weights: expected tensors, got none");
  DeviceGuard guard(weights[0].device());
  Call call =
      prepare_call(states, scales, ids, present, weights,
                   {side_network::read_fields(widths, sources, cross, activation, temperature, cross_projection), dtype,
                    path, backward_items});
  CrossanSideNetwork& n = call.network;
  auto towers = static_cast<size_t>(n.towers);
  at::Device device = weights[0].device();
  check_tensor("grad_embeddings", grad_embeddings, {n.items, n.towers, n.embedding}, dtype, device);
  check_tensor("saved", saved, {n.towers, n.items, n.levels, n.rank}, dtype, device);
  n.grad_embeddings = call.keep(grad_embeddings), n.saved = const_cast<void*>(call.keep(saved));
  Tensors grads;
  for (const Tensor& weight : weights) grads.push_back(at::empty(weight.sizes(), call.options));
  for (size_t t = 0; t < towers; ++t) {
    n.grad_down_weight[t] = grads[t].mutable_data_ptr();
    n.grad_down_bias[t] = grads[towers + t].mutable_data_ptr();
    n.grad_up_weight[t] = grads[2 * towers + t].mutable_data_ptr();
    n.grad_up_bias[t] = grads[3 * towers + t].mutable_data_ptr();
    n.grad_gate[t] = grads[4 * towers + t].mutable_data_ptr();
    n.grad_head_weight[t] = grads[5 * towers + t].mutable_data_ptr();
    n.grad_head_bias[t] = grads[6 * towers + t].mutable_data_ptr();
    for (int i = 0; i + 1 < n.source_counts[t] && !n.is_pair[t]; ++i)
      n.grad_cross_gate[t][i] = grads[kGroups * towers + t * (n.modalities - 1) + i].mutable_data_ptr();
  }
  Tensor workspace = workspace_for(call, true);
  check_code(crossan_side_network_backward(&n, workspace.mutable_data_ptr(), current_stream(workspace)),
             "side_network_backward");
  return grads;
}

}  // namespace
}  // namespace crossan_fast::border

CROSSAN_LIBRARY_FRAGMENT(CROSSAN_NAMESPACE, library) {
#define CROSSAN_STATIC                                                                                           \
  "int[] widths, int[] sources, str cross, str activation, float temperature, str cross_projection, ScalarType " \
  "dtype, int path=0, "                                                                                          \
  "int backward_items=0"
  library.def(
      "side_network(Tensor[] states, Tensor[] scales, Tensor? ids, Tensor? present, "
      "Tensor[] weights, " CROSSAN_STATIC ") -> Tensor[]");
  library.def(
      "side_network_backward(Tensor grad_embeddings, Tensor saved, Tensor links, Tensor[] states, "
      "Tensor[] scales, Tensor? ids, Tensor? present, Tensor[] weights, " CROSSAN_STATIC ") -> Tensor[]");
#undef CROSSAN_STATIC
  library.def("side_network_widest(int levels, int embedding) -> int", [](int64_t levels, int64_t embedding) {
    TORCH_CHECK_VALUE(levels >= 1 && levels <= kCrossanMaxLevels, "levels: expected 1 to ", int(kCrossanMaxLevels),
                      ", got ", levels);
    TORCH_CHECK_VALUE(embedding >= 1 && embedding <= 64 * (kCrossanMaxSlots - levels), "embedding: expected 1 to ",
                      64 * (kCrossanMaxSlots - levels), ", got ", embedding);
    return int64_t{crossan_side_network_widest(static_cast<int>(levels), static_cast<int>(embedding))};
  });
}

CROSSAN_LIBRARY_IMPL(CROSSAN_NAMESPACE, CROSSAN_DISPATCH_KEY, library) {
  using namespace crossan_fast::border;
  library.impl("side_network", &side_network_forward);
  library.impl("side_network_backward", &side_network_backward);
}
