// side_network's C interface: checks what it is given, cuts the scratch memory, and starts the kernels.
#include "side_network.h"

#include "cuda/interface.h"

namespace crossan_fast {
namespace {

static_assert(kCrossanMaxModalities == kMaxModalities && kCrossanMaxTowers == kMaxTowers &&
              kCrossanMaxSources == kMaxSources && kCrossanMaxLevels == kMaxLevels);

int check(const CrossanSideNetwork& n) {
  if (n.items < 0 || n.rows < 0 || (n.ids == nullptr && n.items > n.rows)) return kCrossanBadSize;
  if (n.items > (int64_t(1) << 25)) return kCrossanTooLarge;  // block numbers stay below 2^31
  if (n.modalities < 1 || n.modalities > kMaxModalities || n.towers < 1 || n.towers > kMaxTowers)
    return kCrossanBadSize;
  if (n.levels < 1 || n.levels > kMaxLevels) return kCrossanBadSize;
  if (n.rank < 8 || n.rank > kRank || n.rank % 8) return kCrossanBadSize;
  if (n.compute_kind != kFloat16 && n.compute_kind != kBFloat16) return kCrossanBadKind;
  if (n.weight_kind < kFloat32 || n.weight_kind > kBFloat16) return kCrossanBadKind;
  for (int m = 0; m < n.modalities; ++m) {
    if (n.widths[m] < kTile || n.widths[m] % kTile) return kCrossanBadSize;
    if (n.state_kinds[m] <= kFloat32 || n.state_kinds[m] > kInt8) return kCrossanBadKind;
  }
  for (int t = 0; t < n.towers; ++t) {
    if (n.source_counts[t] < 1 || n.source_counts[t] > kMaxSources) return kCrossanBadSize;
    if (n.is_pair[t] && n.source_counts[t] != 2) return kCrossanBadSize;
    for (int s = 0; s < n.source_counts[t]; ++s) {
      int modality = n.sources[t][s];
      if (modality < 0 || modality >= n.modalities) return kCrossanBadSize;
      if (n.widths[modality] != n.widths[n.sources[t][0]]) return kCrossanBadSize;
    }
  }
  return 0;
}

// Hands out pieces of the workspace; with a null base it only counts.
struct Cutter {
  unsigned char* base;
  size_t used = 0;
  template <class U>
  U* take(int64_t count) {
    size_t start = used;
    used += (static_cast<size_t>(count) * sizeof(U) + 1023) / 1024 * 1024;
    return base ? reinterpret_cast<U*>(base + start) : nullptr;
  }
};

struct Plan {
  Prepare prepare = {};
  WeightGradient gradient = {};  // its walk is the backward's and, without gradients, the forward's
  Reduce reduce = {};
  size_t bytes = 0;
};

int max_width(const CrossanSideNetwork& n) {
  int width = 0;
  for (int t = 0; t < n.towers; ++t)
    if (n.widths[n.sources[t][0]] > width) width = n.widths[n.sources[t][0]];
  return width;
}

// The items of one pass of the backward, which bound its scratch: 7 kB an item at the paper's size.
constexpr int64_t kBackwardItems = 4096;

int64_t backward_items(const CrossanSideNetwork& n) {
  int64_t most = n.backward_items > 0 ? n.backward_items : kBackwardItems;
  return n.items < most ? n.items : most;
}

// Splits of the items that fill the multiprocessors in whole rounds, without more partial sums than pay: to
// write those of one block and read them again takes about as long as two blocks of items.
int choose_splits(const CrossanSideNetwork& n) {
  constexpr int64_t kPartialCost = 2;
  int processors = device_limits().multiprocessors, best = 1;
  int blocks = n.towers * (max_width(n) / kGradientColumns);
  int64_t item_blocks = (backward_items(n) + 63) / 64;
  double least = 1e30;
  for (int splits = 1; splits <= 16 && splits <= item_blocks; ++splits) {
    int64_t rounds = (int64_t(blocks) * splits + processors - 1) / processors;
    double cost = double(rounds) * double((item_blocks + splits - 1) / splits + kPartialCost);
    if (cost < 0.95 * least) least = cost, best = splits;
  }
  return best;
}

Plan make_plan(const CrossanSideNetwork& n, bool backward, void* workspace) {
  Plan plan;
  Cutter cutter = {static_cast<unsigned char*>(workspace)};
  Walk& walk = plan.gradient.walk;
  walk.ids = n.ids, walk.wide = n.wide, walk.present = n.present;
  walk.rows = n.rows, walk.items = n.items, walk.modalities = n.modalities;
  walk.tower_count = n.towers, walk.levels = n.levels, walk.rank = n.rank;
  walk.activation = n.relu ? kRelu : kGelu;
  walk.max_width = max_width(n);
  Prepare& prepare = plan.prepare;
  prepare.ids = n.ids, prepare.wide = n.wide, prepare.rows = n.rows, prepare.items = n.items;
  prepare.tower_count = n.towers, prepare.levels = n.levels, prepare.rank = n.rank;
  prepare.weight_kind = n.weight_kind, prepare.compute_kind = n.compute_kind;
  prepare.max_width = walk.max_width, prepare.temperature = n.temperature;
  Reduce& reduce = plan.reduce;
  reduce.tower_count = n.towers, reduce.levels = n.levels, reduce.rank = n.rank;
  reduce.weight_kind = n.weight_kind, reduce.max_width = walk.max_width, reduce.temperature = n.temperature;
  int splits = plan.gradient.splits = reduce.splits = choose_splits(n);

  for (int t = 0; t < n.towers; ++t) {
    Tower& tower = walk.towers[t];
    int width = n.widths[n.sources[t][0]];
    int64_t tile_bytes = int64_t(n.levels) * 2 * (width / kTile) * kTileBytes;
    int64_t scratch = backward_items(n) * n.levels * kRank * 2;
    tower.source_count = n.source_counts[t], tower.owners = n.is_pair[t] ? 2 : 1, tower.width = width;
    for (int s = 0; s < tower.source_count; ++s) {
      int m = n.sources[t][s];
      tower.sources[s] = {static_cast<const unsigned char*>(n.states[m]), n.scales[m], n.state_kinds[m], m};
    }
    prepare.width[t] = reduce.width[t] = width;
    prepare.source_count[t] = reduce.source_count[t] = tower.source_count;
    prepare.is_pair[t] = reduce.is_pair[t] = n.is_pair[t];
    prepare.down_weight[t] = n.down_weight[t], prepare.down_bias[t] = n.down_bias[t];
    prepare.up_weight[t] = n.up_weight[t], prepare.up_bias[t] = n.up_bias[t], prepare.gate[t] = n.gate[t];
    for (int s = 0; s < kMaxSources - 1; ++s) prepare.cross_gate[t][s] = n.cross_gate[t][s];
    tower.weights = prepare.forward_tiles[t] = cutter.take<unsigned char>(tile_bytes);
    tower.down_bias = prepare.down_biases[t] = cutter.take<float>(n.levels * kRank);
    tower.up_bias = prepare.up_biases[t] = cutter.take<float>(int64_t(n.levels) * width);
    reduce.coefficients[t] = tower.coefficients = prepare.coefficients[t] =
        cutter.take<float>(n.levels * kCoefficients);
    tower.saved = static_cast<unsigned char*>(n.saved[t]);
    tower.output = static_cast<unsigned char*>(n.outputs[t]);
    if (!backward) continue;
    plan.gradient.backward_tiles[t] = prepare.backward_tiles[t] = cutter.take<unsigned char>(tile_bytes);
    tower.grad = static_cast<const unsigned char*>(n.grad_outputs[t]);
    tower.activated = cutter.take<unsigned char>(scratch);
    tower.bottleneck_grad = cutter.take<unsigned char>(scratch);
    reduce.partial[t] = plan.gradient.partial[t] = cutter.take<float>(splits * partial_floats(n.levels, width));
    reduce.coefficient_partial[t] = plan.gradient.coefficient_partial[t] =
        cutter.take<float>(int64_t(splits) * (width / kGradientColumns) * n.levels * kCoefficients);
    reduce.down_weight[t] = n.grad_down_weight[t], reduce.down_bias[t] = n.grad_down_bias[t];
    reduce.up_weight[t] = n.grad_up_weight[t], reduce.up_bias[t] = n.grad_up_bias[t];
    reduce.gate[t] = n.grad_gate[t];
    for (int s = 0; s < kMaxSources - 1; ++s) reduce.cross_gate[t][s] = n.grad_cross_gate[t][s];
  }
  plan.bytes = cutter.used;
  return plan;
}

// The walk over items `first` … `first + count − 1` alone; the scratch of every such part is the same.
Walk part_of(Walk walk, int64_t first, int64_t count) {
  walk.items = count;
  if (walk.present) walk.present += first * walk.modalities;
  if (walk.ids) walk.ids = static_cast<const unsigned char*>(walk.ids) + first * (walk.wide ? 8 : 4);
  for (int t = 0; t < walk.tower_count; ++t) {
    Tower& tower = walk.towers[t];
    tower.saved += first * walk.levels * walk.rank * 2;
    tower.grad += first * tower.width * 2;
    for (int s = 0; s < tower.source_count && walk.ids == nullptr; ++s) {  // item i is row i
      Source& source = tower.sources[s];
      source.states += first * walk.levels * tower.width * element_size(source.kind);
      if (source.scales) source.scales += first * walk.levels;
    }
  }
  return walk;
}

bool takes_hopper(const CrossanSideNetwork& n) {
  return n.path == kCrossanPathHopper || (n.path == kCrossanPathAuto && device_limits().architecture == 90);
}

size_t gradient_shared_of(bool hopper, int levels) {
  return hopper ? weight_gradient_hopper_shared(levels) : weight_gradient_shared(levels);
}

size_t shared_of(bool hopper, int width, int groups) {
  return hopper ? walk_hopper_shared(width, groups) : walk_shared(width, groups);
}

// One group of 32 items a block while that keeps multiprocessors busy that two would leave idle.
int run_walk(const CrossanSideNetwork& n, const Walk& walk, bool backward, void* stream) {
  DeviceLimits device = device_limits();
  bool hopper = takes_hopper(n);
  if (hopper && device.architecture != 90) return kCrossanBadPath;
  auto shared = [&](int groups) { return shared_of(hopper, walk.max_width, groups); };
  int64_t blocks_of_two = (walk.items + 2 * kGroupItems - 1) / (2 * kGroupItems) * n.towers;
  auto limit = static_cast<size_t>(device.shared_per_block);
  int groups = blocks_of_two >= device.multiprocessors && shared(2) <= limit ? 2 : 1;
  if (shared(groups) > limit) return kCrossanTooLarge;
  auto resident = static_cast<unsigned>(device.multiprocessors * (limit / shared(groups) > 1 ? 2 : 1));
  return hopper ? launch_walk_hopper(walk, n.compute_kind, backward, groups, shared(groups), resident, stream)
                : launch_walk(walk, n.compute_kind, backward, groups, shared(groups), stream);
}

}  // namespace
}  // namespace crossan_fast

using namespace crossan_fast;

extern "C" int crossan_side_network_widest(int levels) {
  DeviceLimits device = device_limits();
  auto limit = static_cast<size_t>(device.shared_per_block);
  int width = 0;
  bool hopper = device.architecture == 90;
  if (gradient_shared_of(hopper, levels) > limit) return 0;
  while (shared_of(hopper, width + kTile, 1) <= limit) width += kTile;
  return width;
}

extern "C" size_t crossan_side_network_workspace(const CrossanSideNetwork* network, int backward) {
  return check(*network) ? 0 : make_plan(*network, backward, nullptr).bytes;
}

extern "C" int crossan_side_network_forward(const CrossanSideNetwork* network, void* workspace, void* stream) {
  if (int error = check(*network)) return error;
  if (network->items == 0) return 0;
  Plan plan = make_plan(*network, false, workspace);
  if (int error = launch_prepare(plan.prepare, stream)) return error;
  return run_walk(*network, plan.gradient.walk, false, stream);
}

extern "C" int crossan_side_network_backward(const CrossanSideNetwork* network, void* workspace, void* stream) {
  if (int error = check(*network)) return error;
  const CrossanSideNetwork& n = *network;
  const int64_t kept = backward_items(n) > 0 ? backward_items(n) : 1;
  Plan plan = make_plan(n, true, workspace);
  const bool hopper = takes_hopper(n);
  if (gradient_shared_of(hopper, n.levels) > static_cast<size_t>(device_limits().shared_per_block))
    return kCrossanTooLarge;
  if (int error = launch_prepare(plan.prepare, stream)) return error;
  const Walk whole = plan.gradient.walk;
  // Once without items too: it is what writes the sums.
  for (int64_t first = 0; first < n.items || first == 0; first += kept) {
    int64_t count = n.items - first < kept ? n.items - first : kept;
    Walk walk = part_of(whole, first, count);
    plan.gradient.walk = walk;
    plan.gradient.accumulate = first > 0;
    // The walk reads the backward's tiles, the weight gradients the forward's.
    for (int t = 0; t < walk.tower_count; ++t) walk.towers[t].weights = plan.gradient.backward_tiles[t];
    if (int error = run_walk(n, walk, true, stream)) return error;
    int error = hopper ? launch_weight_gradient_hopper(plan.gradient, n.compute_kind, stream)
                       : launch_weight_gradient(plan.gradient, n.compute_kind, stream);
    if (error) return error;
  }
  return launch_reduce(plan.reduce, stream);
}
