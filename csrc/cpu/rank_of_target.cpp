#include <atomic>
#include <memory>

#include "ranking_border.h"

namespace crossan_fast {
namespace {

template <class T>
using Counts = decltype(Vec<T>{} >= Vec<T>{});  // as wide as T, 0 or −1 a lane

// counts[i] += #{items of the segment whose score ≥ bar[i]}
template <class T>
void count_ahead(ScoreBlock<T>& block, int64_t begin, int64_t end, const T* bar, int64_t* counts) {
  constexpr int lanes = kLanes<T, Vec<T>>, vectors = kUsers / lanes;
  Vec<T> bars[vectors];
  Counts<T> ahead[vectors] = {};  // kSegment bounds what a lane may hold
  for (int v = 0; v < vectors; ++v) bars[v] = load<Vec<T>>(bar + v * lanes);
  for (int64_t start = begin; start < end; start += kTileHeight) {
    const int64_t height = std::min(kTileHeight, end - start);
    block.score(start, height);
    for (int64_t j = 0; j < height; ++j)
      for (int v = 0; v < vectors; ++v) ahead[v] -= load<Vec<T>>(block.tile() + j * kUsers + v * lanes) >= bars[v];
  }
  for (int v = 0; v < vectors; ++v)
    for (int lane = 0; lane < lanes; ++lane) counts[v * lanes + lane] += static_cast<int64_t>(ahead[v][lane]);
}

template <class T>
void rank_of_target(const Ranking<T>& ranking, const int64_t* targets, int64_t* ranks) {
  const int64_t groups = ranking.groups(), segments = ranking.segments();
  const int64_t tasks = groups * segments, workers = workers_for(tasks);
  std::vector<ScoreBlock<T>> blocks;
  for (int64_t w = 0; w < workers; ++w) blocks.emplace_back(ranking);
  // Tasks of one group meet in whole numbers, whose sums know no order.
  std::unique_ptr<std::atomic<int64_t>[]> ahead(new std::atomic<int64_t>[static_cast<size_t>(ranking.batch)]());
  run_tasks(workers, tasks, [&](int64_t w, int64_t task) {
    ScoreBlock<T>& block = blocks[static_cast<size_t>(w)];
    block.start(task / segments);
    const int64_t segment = task % segments;
    const int64_t begin = segment * kSegment, end = std::min(ranking.catalogue, begin + kSegment);
    T bar[kUsers], scores[kUsers];
    int64_t counts[kUsers] = {};
    for (int64_t i = 0; i < kUsers; ++i) bar[i] = 0;
    for (int64_t i = 0; i < block.count(); ++i) {
      block.score_one(targets[block.first() + i] - 1, scores);
      bar[i] = scores[i];
    }
    count_ahead(block, begin, end, bar, counts);
    for (int64_t i = 0; i < block.count(); ++i) {
      const auto excluded = ranking.exclude ? block.excluded(i) : std::vector<int64_t>();
      // A target that is excluded scores −inf, as one whose score is no number does: everything is ahead of it,
      // the excluded, too.
      if (!(bar[i] > -std::numeric_limits<T>::infinity()) ||
          std::binary_search(excluded.begin(), excluded.end(), targets[block.first() + i]))
        counts[i] = end - begin;
      else
        for (auto id = std::upper_bound(excluded.begin(), excluded.end(), begin); id != excluded.end() && *id <= end;
             ++id) {
          block.score_one(*id - 1, scores);
          counts[i] -= scores[i] >= bar[i];
        }
      ahead[static_cast<size_t>(block.first() + i)] += counts[i];
    }
  });
  for (int64_t b = 0; b < ranking.batch; ++b) ranks[b] = ahead[static_cast<size_t>(b)];
}

}  // namespace

namespace border {

Tensor rank_of_target(const Tensor& users, const Tensor& items, const Tensor& targets, const OptionalTensor& exclude) {
  return with_ranking(users, items, exclude, [&](const auto& ranking, auto) {
    check_device("targets", targets, at::kCPU);
    check_shape("targets", targets, {users.size(0)});
    const Tensor ids = checked_ids("targets", targets, 1, items.size(0));
    Tensor ranks = empty({users.size(0)}, at::kLong);
    crossan_fast::rank_of_target(ranking, ids.const_data_ptr<int64_t>(), ranks.mutable_data_ptr<int64_t>());
    return ranks;
  });
}

}  // namespace border
}  // namespace crossan_fast
