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

// The k best of one segment for each user of a block, each list in order.
template <class T>
void best_of_segment(const Ranking<T>& ranking, ScoreBlock<T>& block, int64_t segment, int64_t kept,
                     std::vector<Candidate<T>>* lists, int64_t stride) {
  constexpr int lanes = kLanes<T, Vec<T>>;
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
  for (int64_t i = 0; i < block.count(); ++i) lists[i * stride] = std::move(best[static_cast<size_t>(i)].sorted());
}

// What is done at once: segments of so many groups of users. Lists of all would take B × ⌈I / 8192⌉ × k candidates.
struct Round {
  int64_t groups, segments;
  Round(int64_t most_groups, int64_t most_segments, int64_t kept) {
    const int64_t list = std::max<int64_t>(1, kUsers * std::min(kept, kSegment));
    segments = std::min(most_segments, std::max<int64_t>(workers_for(most_segments), kCandidates / list));
    groups = std::min(most_groups, std::max<int64_t>(1, kCandidates / (segments * list + kUsers * kept)));
  }
  static constexpr int64_t kCandidates = int64_t(1) << 22;  // 64 MiB of them
};

template <class T>
void topk_scores(const Ranking<T>& ranking, int64_t k, T* scores, int64_t* ids) {
  const int64_t kept = std::min(k, ranking.catalogue);  // no list grows beyond what there is
  const Round round(ranking.groups(), ranking.segments(), kept);
  const int64_t workers = workers_for(round.groups * round.segments);
  std::vector<ScoreBlock<T>> blocks;
  for (int64_t w = 0; w < workers; ++w) blocks.emplace_back(ranking);
  for (int64_t first = 0; first < ranking.groups(); first += round.groups) {
    const int64_t groups = std::min(round.groups, ranking.groups() - first);
    const int64_t users = std::min(groups * kUsers, ranking.batch - first * kUsers);
    std::vector<std::vector<Candidate<T>>> found(static_cast<size_t>(users));
    for (int64_t begin = 0; begin < ranking.segments(); begin += round.segments) {
      const int64_t segments = std::min(round.segments, ranking.segments() - begin);
      std::vector<std::vector<Candidate<T>>> lists(static_cast<size_t>(users * segments));  // [users][segments]
      run_tasks(workers, groups * segments, [&](int64_t w, int64_t task) {
        ScoreBlock<T>& block = blocks[static_cast<size_t>(w)];
        block.start(first + task / segments);
        const int64_t place = task / segments * kUsers * segments + task % segments;
        best_of_segment(ranking, block, begin + task % segments, kept, lists.data() + place, segments);
      });
      run_tasks(workers_for(users), users, [&](int64_t, int64_t u) {
        auto& all = found[static_cast<size_t>(u)];
        for (int64_t s = 0; s < segments; ++s) {
          const auto& list = lists[static_cast<size_t>(u * segments + s)];
          all.insert(all.end(), list.begin(), list.end());
        }
        const auto best = std::min<std::ptrdiff_t>(kept, static_cast<std::ptrdiff_t>(all.size()));
        std::partial_sort(all.begin(), all.begin() + best, all.end());
        all.resize(static_cast<size_t>(best));
      });
    }
    run_tasks(workers_for(users), users, [&](int64_t, int64_t u) {
      const auto& all = found[static_cast<size_t>(u)];
      const auto count = static_cast<int64_t>(all.size());
      const int64_t row = (first * kUsers + u) * k;
      for (int64_t j = 0; j < k; ++j) {
        scores[row + j] = j < count ? all[static_cast<size_t>(j)].score : -std::numeric_limits<T>::infinity();
        ids[row + j] = j < count ? all[static_cast<size_t>(j)].id : 0;
      }
    });
  }
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
