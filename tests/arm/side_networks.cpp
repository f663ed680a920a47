// side_network of every structure, over states of every type.
#include <cmath>

#include "driver.h"

namespace crossan_fast::arm {
namespace {

using Shape = std::vector<int64_t>;

struct Network {
  std::string name;
  Shape widths, sources;  // a tower's two modalities, −1 for none
  std::string cross, activation, projection;
  double temperature;
  int64_t levels = 3, rank = 17, embedding = 24;

  size_t towers() const { return sources.size() / 2; }
  int64_t first(size_t t) const { return widths[static_cast<size_t>(sources[2 * t])]; }
  int64_t second(size_t t) const {
    return sources[2 * t + 1] < 0 ? first(t) : widths[static_cast<size_t>(sources[2 * t + 1])];
  }
  int64_t width(size_t t) const { return std::min(first(t), second(t)); }
};

struct Case {
  at::ScalarType stored;
  int64_t rows, items;  // items = 0: all rows, without ids and presence
};

struct Named {
  const char* field;
  Shape shape;
  double scale;
};

// All weights in the schema's order.
std::vector<Named> weights_of(const Network& n) {
  const int64_t levels = n.levels, rank = n.rank;
  const auto inverse_root = [](int64_t width) { return 1 / std::sqrt(static_cast<double>(width)); };
  std::vector<Named> all;
  const auto each_tower = [&](const auto& named) {
    for (size_t t = 0; t < n.towers(); ++t) all.push_back(named(t, n.width(t)));
  };
  each_tower([&](size_t, int64_t d) { return Named{"down_weight", {levels, rank, d}, inverse_root(d)}; });
  each_tower([&](size_t, int64_t) { return Named{"down_bias", {levels, rank}, 0.1}; });
  each_tower([&](size_t, int64_t d) { return Named{"up_weight", {levels, d, rank}, inverse_root(rank)}; });
  each_tower([&](size_t, int64_t d) { return Named{"up_bias", {levels, d}, 0.1}; });
  each_tower([&](size_t, int64_t) { return Named{"gate", {levels}, 0.05}; });
  each_tower([&](size_t, int64_t d) { return Named{"head_weight", {n.embedding, d}, inverse_root(d)}; });
  each_tower([&](size_t, int64_t) { return Named{"head_bias", {n.embedding}, 0.1}; });
  std::vector<Named> gates, down, up;
  const auto modalities = n.cross == "none" ? 0 : n.widths.size();
  for (size_t m = 0; m < modalities; ++m)
    for (size_t from = 0; from < modalities; ++from) {
      if (m == from) continue;
      gates.push_back({"cross_gate", {levels}, 0.3});
      if (n.projection == "identity" && n.widths[m] == n.widths[from]) continue;
      down.push_back({"cross_down", {rank, n.widths[from]}, 0.1});
      up.push_back({"cross_up", {n.widths[m], rank}, 0.3});
    }
  for (const auto& group : {gates, down, up}) all.insert(all.end(), group.begin(), group.end());
  for (const bool bias : {false, true})
    for (size_t t = 0; t < n.towers(); ++t) {
      if (n.first(t) == n.second(t)) continue;
      if (bias)
        all.push_back({"pair_bias", {levels, n.width(t)}, 0.1});
      else
        all.push_back({"pair_weight", {levels, n.width(t), std::max(n.first(t), n.second(t))}, 0.1});
    }
  return all;
}

Tensor states_of(Draw& draw, at::ScalarType stored, const Shape& shape) {
  if (stored != at::kChar && stored != at::kFloat8_e4m3fn) return draw.normals(shape, stored);
  Tensor states(shape, stored);
  for (int64_t i = 0; i < states.numel(); ++i) {
    auto byte = static_cast<uint8_t>(draw.bits());
    if (stored == at::kFloat8_e4m3fn) byte &= 0xbf;  // below 2: subnormals among them, NaN not
    states.mutable_data_ptr<uint8_t>()[i] = byte;
  }
  return states;
}

// A gate's gradient is one sum over all items and columns, which may cancel in one tower and not in the next: how large
// its terms are is seen from the largest gradient of all gates of the kind. Its place among the outputs, after e and z.
int largest_alike(const std::vector<Named>& named, const std::vector<Tensor>& grads, size_t which) {
  const std::string field = named[which].field;
  if (field != "gate" && field != "cross_gate") return -1;
  double most = -1;
  size_t best = which;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (named[i].field != field) continue;
    const Tensor wide = grads[i].to(at::kDouble);
    for (int64_t l = 0; l < wide.numel(); ++l) {
      const double size = std::fabs(wide.const_data_ptr<double>()[l]);
      if (size <= most) continue;
      most = size;
      best = i;
    }
  }
  return static_cast<int>(best) + 2;
}

Outputs compute(const Network& n, const Case& c, at::ScalarType type) {
  Draw draw(static_cast<uint64_t>(c.rows));
  std::vector<Tensor> states, scales, weights;
  for (const int64_t width : n.widths) {
    states.push_back(states_of(draw, c.stored, {c.rows, n.levels, width}));
    if (c.stored != at::kChar) continue;
    scales.push_back(Tensor({c.rows, n.levels}, at::kFloat));
    for (int64_t i = 0; i < scales.back().numel(); ++i)
      scales.back().mutable_data_ptr<float>()[i] = static_cast<float>((0.5 + draw.uniform()) / 64);
  }
  std::optional<Tensor> ids, present;
  if (c.items > 0) {
    ids = draw.ids({c.items}, 0, c.rows);
    present = draw.flags({c.items, static_cast<int64_t>(n.widths.size())}, 0.6);
  }
  const auto named = weights_of(n);
  for (const Named& weight : named) weights.push_back(draw.normals(weight.shape, wide(type), weight.scale));
  const int64_t items = c.items > 0 ? c.items : c.rows;
  const auto out = border::side_network(states, scales, ids, present, weights, n.widths, n.sources, n.cross,
                                        n.activation, n.temperature, n.projection, type);
  Outputs outputs{{"e", out[0]}, {"z", out[1]}};
  // A z rounded to half a float's digits changes the gradients by more than their arithmetic does.
  if (type == at::kBFloat16 || type == at::kHalf) return outputs;
  const Tensor grad = draw.normals({items, static_cast<int64_t>(n.towers()), n.embedding}, type);
  const auto grads =
      border::side_network_backward(grad, out[1], out[2], states, scales, ids, present, weights, n.widths, n.sources,
                                    n.cross, n.activation, n.temperature, n.projection, type);
  for (size_t i = 0; i < grads.size(); ++i)
    outputs.push_back({c10::str("d", named[i].field, " ", i), grads[i], largest_alike(named, grads, i)});
  return outputs;
}

void judge_one(const Network& n, const Case& c, at::ScalarType type = at::kFloat) {
  const int64_t widest = *std::max_element(n.widths.begin(), n.widths.end());
  const int64_t items = c.items > 0 ? c.items : c.rows;
  const std::string name =
      c10::str("side_network ", n.name, ", ", c.stored, c.items > 0 ? ", by id, " : ", ", items, " items to ", type);
  judge(
      name, n.levels * (widest + n.rank) + n.embedding + items, [&](at::ScalarType as) { return compute(n, c, as); },
      type);
}

}  // namespace

void judge_side_networks() {
  const Shape own{0, -1, 1, -1, 2, -1}, pairs{0, -1, 1, -1, 2, -1, 0, 1, 1, 2, 0, 2};
  const Network backbone{"backbone", {70, 70, 70}, own, "backbone", "gelu", "identity", 0.1};
  const Network side{"side", {70, 70, 70}, own, "side", "gelu", "identity", 0.1};
  for (const Network& n : {backbone, side}) {
    for (const auto stored : {at::kFloat, at::kBFloat16, at::kHalf, at::kFloat8_e4m3fn, at::kChar})
      judge_one(n, {stored, 37, 0});
    judge_one(n, {at::kBFloat16, 37, 131});
    judge_one(n, {at::kBFloat16, 37, 0}, at::kBFloat16);
    judge_one(n, {at::kHalf, 37, 0}, at::kHalf);
    Network whole = n;  // whole vectors and tiles
    whole.name += ", whole vectors";
    whole.widths = {64, 64, 64};
    whole.rank = 16;
    whole.embedding = 32;
    judge_one(whole, {at::kHalf, 96, 0});
  }
  const Network others[] = {
      {"alone, relu", {70}, {0, -1}, "none", "relu", "identity", 0.1},
      {"unequal widths", {20, 70, 20}, own, "backbone", "gelu", "identity", 0.3},
      {"unequal widths, side", {33, 70, 33}, own, "side", "gelu", "identity", 0.1},
      {"low rank", {70, 33, 70}, own, "backbone", "gelu", "low_rank", 0.1},
      {"low rank, side", {70, 33, 70}, own, "side", "gelu", "low_rank", 0.1},
      {"pairs, relu", {20, 33, 20}, pairs, "none", "relu", "identity", 0.1},
      {"pairs and crosses", {20, 33, 20}, pairs, "side", "gelu", "identity", 0.1},
  };
  for (const Network& n : others)
    for (const int64_t items : {0, 53}) judge_one(n, {at::kFloat, 37, items});
}

}  // namespace crossan_fast::arm
