// side_network's C interface: checks what it is given, cuts the scratch memory, and starts the kernels.
#include "side_network.h"

#include "cuda/interface.h"

namespace crossan_fast {
namespace {

static_assert(kCrossanMaxModalities == kMaxModalities && kCrossanMaxTowers == kMaxTowers &&
              kCrossanMaxSources == kMaxSources && kCrossanMaxLevels == kMaxLevels && kCrossanMaxSlots == kMaxSlots);

int check(const CrossanSideNetwork& n) {
  if (n.items < 0 || n.rows < 0 || (n.ids == nullptr && n.items > n.rows)) return kCrossanBadSize;
  if (n.items > (int64_t(1) << 25)) return kCrossanTooLarge;  // block numbers stay below 2^31
  if (n.modalities < 1 || n.modalities > kMaxModalities || n.towers < 1 || n.towers > kMaxTowers)
    return kCrossanBadSize;
  if (n.levels < 1 || n.levels > kMaxLevels) return kCrossanBadSize;
  if (n.rank < 8 || n.rank > kRank || n.rank % 8) return kCrossanBadSize;
  if (n.embedding < 8 || n.embedding > kMaxSlots * kTile || n.embedding % 8) return kCrossanBadSize;
  if (n.levels + head_parts(n.embedding) > kMaxSlots) return kCrossanBadSize;
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
  Fold fold = {};
  WeightGradient gradient = {};  // its walk is the backward's and, without gradients, the forward's
  Combine combine = {};
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
  const int parts = walk.parts = head_parts(n.embedding);
  walk.embedding = n.embedding, walk.embedding_stride = int64_t(n.towers) * n.embedding;
  Prepare& prepare = plan.prepare;
  prepare.ids = n.ids, prepare.wide = n.wide, prepare.rows = n.rows, prepare.items = n.items;
  prepare.tower_count = n.towers, prepare.levels = n.levels, prepare.rank = n.rank;
  prepare.embedding = n.embedding, prepare.weight_kind = n.weight_kind, prepare.compute_kind = n.compute_kind;
  prepare.max_width = walk.max_width, prepare.temperature = n.temperature;
  Combine& combine = plan.combine;
  Fold& fold = plan.fold;
  fold.tower_count = n.towers, fold.levels = n.levels, fold.parts = parts;
  combine.tower_count = n.towers, combine.levels = n.levels, combine.rank = n.rank;
  combine.embedding = n.embedding, combine.weight_kind = n.weight_kind;
  combine.max_width = walk.max_width, combine.temperature = n.temperature;
  int splits = plan.gradient.splits = combine.splits = choose_splits(n);

  for (int t = 0; t < n.towers; ++t) {
    Tower& tower = walk.towers[t];
    int width = n.widths[n.sources[t][0]];
    const int pairs = pair_count(n.levels, parts);
    int64_t tile_bytes = (int64_t(2 * n.levels + parts) * (width / kTile) + pairs) * kTileBytes;
    int64_t scratch = backward_items(n) * n.levels * kRank * 2;
    tower.source_count = n.source_counts[t], tower.owners = n.is_pair[t] ? 2 : 1, tower.width = width;
    for (int s = 0; s < tower.source_count; ++s) {
      int m = n.sources[t][s];
      tower.sources[s] = {static_cast<const unsigned char*>(n.states[m]), n.scales[m], n.state_kinds[m], m};
    }
    prepare.width[t] = combine.width[t] = width;
    prepare.source_count[t] = combine.source_count[t] = tower.source_count;
    prepare.is_pair[t] = combine.is_pair[t] = n.is_pair[t];
    prepare.down_weight[t] = n.down_weight[t], prepare.down_bias[t] = n.down_bias[t];
    prepare.up_weight[t] = n.up_weight[t], prepare.up_bias[t] = n.up_bias[t], prepare.gate[t] = n.gate[t];
    prepare.head_weight[t] = n.head_weight[t], prepare.head_bias[t] = n.head_bias[t];
    for (int s = 0; s < kMaxSources - 1; ++s) prepare.cross_gate[t][s] = n.cross_gate[t][s];
    tower.weights = prepare.forward_tiles[t] = cutter.take<unsigned char>(tile_bytes);
    fold.width[t] = width, fold.forward_tiles[t] = prepare.forward_tiles[t];
    combine.forward_tiles[t] = prepare.forward_tiles[t];
    tower.down_bias = prepare.down_biases[t] = cutter.take<float>(n.levels * kRank);
    tower.up_bias = prepare.up_biases[t] = cutter.take<float>(int64_t(n.levels) * width);
    tower.head_bias = prepare.head_biases[t] = cutter.take<float>(parts * kTile);
    fold.coefficients[t] = combine.coefficients[t] = tower.coefficients = prepare.coefficients[t] =
        cutter.take<float>(n.levels * kCoefficients);
    tower.saved = static_cast<unsigned char*>(n.saved) + t * n.items * n.levels * n.rank * 2;
    if (!backward) {
      tower.output = static_cast<unsigned char*>(n.embeddings) + int64_t(t) * n.embedding * 2;
      continue;
    }
    plan.gradient.transposed_tiles[t] = prepare.transposed_tiles[t] =
        cutter.take<unsigned char>(int64_t(n.levels + parts) * (width / kTile) * kTileBytes);
    tower.weights = fold.backward_tiles[t] = cutter.take<unsigned char>(int64_t(pairs) * kTileBytes);
    combine.products[t] = fold.products[t] = cutter.take<float>(int64_t(pairs) * kRank * kRank);
    combine.pair_tiles[t] = cutter.take<unsigned char>(int64_t(pairs) * 2 * kTileBytes);
    combine.pair_numbers[t] = cutter.take<float>(2 * pairs);
    combine.pair_partial[t] = plan.gradient.pair_partial[t] =
        cutter.take<float>(int64_t(splits) * pairs * kRank * kRank);
    tower.grad = static_cast<const unsigned char*>(n.grad_embeddings) + int64_t(t) * n.embedding * 2;
    tower.activated = cutter.take<unsigned char>(scratch);
    tower.bottleneck_grad = cutter.take<unsigned char>(scratch);
    combine.partial[t] = plan.gradient.partial[t] = cutter.take<float>(splits * Partial(n.levels + parts, width).total);
    combine.coefficient_partial[t] = plan.gradient.coefficient_partial[t] =
        cutter.take<float>(int64_t(splits) * (width / kGradientColumns) * n.levels * kCoefficients);
    combine.down_weight[t] = n.grad_down_weight[t], combine.down_bias[t] = n.grad_down_bias[t];
    combine.up_weight[t] = n.grad_up_weight[t], combine.up_bias[t] = n.grad_up_bias[t];
    combine.gate[t] = n.grad_gate[t];
    combine.head_weight[t] = n.grad_head_weight[t], combine.head_bias[t] = n.grad_head_bias[t];
    for (int s = 0; s < kMaxSources - 1; ++s) combine.cross_gate[t][s] = n.grad_cross_gate[t][s];
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
    tower.grad += first * walk.embedding_stride * 2;
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

size_t shared_of(bool hopper, int panels, int groups) {
  return hopper ? walk_hopper_shared(panels, groups) : walk_shared(panels, groups);
}

// What the backward's kernels need at most.
size_t backward_shared_of(bool hopper, int levels, int parts) {
  const size_t gradient = hopper ? weight_gradient_hopper_shared(levels, parts) : weight_gradient_shared(levels, parts);
  const size_t needs[] = {pair_sums_shared(levels), shared_of(hopper, walk_panels(levels, parts, 0, true), 1)};
  size_t most = gradient;
  for (size_t need : needs) most = need > most ? need : most;
  return most;
}

// One group of 32 items a block while that keeps multiprocessors busy that two would leave idle.
int run_walk(const CrossanSideNetwork& n, const Walk& walk, bool backward, void* stream) {
  DeviceLimits device = device_limits();
  bool hopper = takes_hopper(n);
  if (hopper && device.architecture != 90) return kCrossanBadPath;
  const int panels = walk_panels(walk.levels, walk.parts, walk.max_width, backward);
  auto shared = [&](int groups) { return shared_of(hopper, panels, groups); };
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

extern "C" int crossan_side_network_widest(int levels, int embedding) {
  DeviceLimits device = device_limits();
  auto limit = static_cast<size_t>(device.shared_per_block);
  int width = 0;
  bool hopper = device.architecture == 90;
  if (backward_shared_of(hopper, levels, head_parts(embedding)) > limit) return 0;
  const int parts = head_parts(embedding);
  while (shared_of(hopper, walk_panels(levels, parts, width + kTile, false), 1) <= limit) width += kTile;
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
  if (int error = launch_fold(plan.fold, network->compute_kind, stream)) return error;
  return run_walk(*network, plan.gradient.walk, false, stream);
}

extern "C" int crossan_side_network_backward(const CrossanSideNetwork* network, void* workspace, void* stream) {
  if (int error = check(*network)) return error;
  const CrossanSideNetwork& n = *network;
  const int64_t kept = backward_items(n) > 0 ? backward_items(n) : 1;
  Plan plan = make_plan(n, true, workspace);
  const bool hopper = takes_hopper(n);
  const size_t shared = backward_shared_of(hopper, n.levels, head_parts(n.embedding));
  if (shared > static_cast<size_t>(device_limits().shared_per_block)) return kCrossanTooLarge;
  if (int error = launch_prepare(plan.prepare, stream)) return error;
  if (int error = launch_fold(plan.fold, n.compute_kind, stream)) return error;
  const Walk whole = plan.gradient.walk;
  // Once without items too: it is what writes the sums.
  for (int64_t first = 0; first < n.items || first == 0; first += kept) {
    int64_t count = n.items - first < kept ? n.items - first : kept;
    plan.gradient.walk = part_of(whole, first, count);
    plan.gradient.accumulate = first > 0;
    if (int error = run_walk(n, plan.gradient.walk, true, stream)) return error;
    if (int error = launch_pair_sums(plan.gradient, n.compute_kind, stream)) return error;
    int error = hopper ? launch_weight_gradient_hopper(plan.gradient, n.compute_kind, stream)
                       : launch_weight_gradient(plan.gradient, n.compute_kind, stream);
    if (error) return error;
  }
  return launch_combine(plan.combine, n.compute_kind, stream);
}
