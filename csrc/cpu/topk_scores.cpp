#include <memory>
#include <utility>

#include "ranking_border.h"

namespace crossan_fast {
namespace {

template <class T>
struct Candidate {
  T score;
  int64_t id;
  // Better ones first; of equal scores the lower id.
  bool operator<(const Candidate& other) const {
    return score > other.score || (score == other.score && id < other.id);
  }
};

// The k best of a stream of candidates whose ids ascend: appended while above the k-th best, thinned out when full.
template <class T>
class Best {
 public:
  explicit Best(int64_t k) : k_(static_cast<size_t>(k)), room_(2 * k_ + 64) { found_.reserve(room_); }

  T bar() const { return bar_; }  // only scores above it are of interest

  void add(T score, int64_t id) {
    found_.push_back({score, id});
    if (found_.size() == room_) thin();
  }
  void thin() {
    if (found_.empty() || found_.size() < k_) return;  // empty: there may be no items at all
    std::nth_element(found_.begin(), found_.begin() + static_cast<std::ptrdiff_t>(k_) - 1, found_.end());
    found_.resize(k_);
    bar_ = found_.back().score;
  }
  std::vector<Candidate<T>>& sorted() {
    thin();
    std::sort(found_.begin(), found_.end());
    return found_;
  }

 private:
  size_t k_, room_;
  T bar_ = -std::numeric_limits<T>::infinity();
  std::vector<Candidate<T>> found_;
};

template <class T>
void topk_scores(const Ranking<T>& ranking, int64_t k, T* scores, int64_t* ids) {
  const int64_t groups = ranking.groups(), segments = ranking.segments();
  const int64_t tasks = groups * segments, workers = workers_for(tasks);
  const int64_t kept = std::min(k, ranking.catalogue);  // no list grows beyond what there is
  std::vector<ScoreBlock<T>> blocks;
  for (int64_t w = 0; w < workers; ++w) blocks.emplace_back(ranking);
  // A list a user and segment, merged at the end: [B][segments].
  std::vector<std::vector<Candidate<T>>> lists(static_cast<size_t>(ranking.batch * segments));
  run_tasks(workers, tasks, [&](int64_t w, int64_t task) {
    constexpr int lanes = kLanes<T, Vec<T>>;
    ScoreBlock<T>& block = blocks[static_cast<size_t>(w)];
    block.start(task / segments);
    const int64_t segment = task % segments;
    const int64_t begin = segment * kSegment, end = std::min(ranking.catalogue, begin + kSegment);
    std::vector<Best<T>> best(static_cast<size_t>(block.count()), Best<T>(std::min(kept, end - begin)));
    std::vector<std::vector<int64_t>> excluded(static_cast<size_t>(block.count()));
    T bar[kUsers];
    std::fill_n(bar, kUsers, std::numeric_limits<T>::infinity());  // lanes without a user want nothing
    for (int64_t i = 0; i < block.count(); ++i) {
      bar[i] = -std::numeric_limits<T>::infinity();
      if (ranking.exclude) excluded[static_cast<size_t>(i)] = block.excluded(i);
    }
    for (int64_t start = begin; start < end; start += kTileHeight) {
      const int64_t height = std::min(kTileHeight, end - start);
      block.score(start, height);
      for (int64_t j = 0; j < height; ++j)
        for (int64_t i = 0; i < kUsers; i += lanes) {
          const T* row = block.tile() + j * kUsers + i;
          const auto above = load<Vec<T>>(row) > load<Vec<T>>(bar + i);
          auto any = above[0];
          for (int lane = 1; lane < lanes; ++lane) any |= above[lane];
          if (!any) continue;
          for (int lane = 0; lane < lanes; ++lane) {
            if (!(row[lane] > bar[i + lane])) continue;
            const auto user = static_cast<size_t>(i + lane);
            const int64_t id = start + j + 1;
            if (std::binary_search(excluded[user].begin(), excluded[user].end(), id)) continue;
            best[user].add(row[lane], id);
            bar[i + lane] = best[user].bar();
          }
        }
    }
    for (int64_t i = 0; i < block.count(); ++i)
      lists[static_cast<size_t>((block.first() + i) * segments + segment)] =
          std::move(best[static_cast<size_t>(i)].sorted());
  });
  run_tasks(workers_for(ranking.batch), ranking.batch, [&](int64_t, int64_t b) {
    std::vector<Candidate<T>> all;
    for (int64_t s = 0; s < segments; ++s) {
      const auto& list = lists[static_cast<size_t>(b * segments + s)];
      all.insert(all.end(), list.begin(), list.end());
    }
    const auto found = std::min<std::ptrdiff_t>(k, static_cast<std::ptrdiff_t>(all.size()));
    std::partial_sort(all.begin(), all.begin() + found, all.end());
    for (int64_t j = 0; j < k; ++j) {
      scores[b * k + j] = j < found ? all[static_cast<size_t>(j)].score : -std::numeric_limits<T>::infinity();
      ids[b * k + j] = j < found ? all[static_cast<size_t>(j)].id : 0;
    }
  });
}

}  // namespace

namespace border {

Pair topk_scores(const Tensor& users, const Tensor& items, int64_t k, const OptionalTensor& exclude) {
  TORCH_CHECK_VALUE(k >= 1, "k: expected at least 1, got ", k);
  return with_ranking(users, items, exclude, [&](const auto& ranking, auto zero) {
    using T = decltype(zero);
    Tensor scores = empty({users.size(0), k}, kScalarType<T>);
    Tensor ids = empty({users.size(0), k}, at::kLong);
    crossan_fast::topk_scores(ranking, k, scores.template mutable_data_ptr<T>(), ids.mutable_data_ptr<int64_t>());
    return std::tuple(scores.to(users.scalar_type()), ids);
  });
}

}  // namespace border
}  // namespace crossan_fast
