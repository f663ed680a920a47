// Threads of torch's own pool, as many as torch.set_num_threads says. No header of torch's is needed: see parallel.cpp.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace crossan_fast {

// OpenMP's threads do not survive a fork, and a child that asks for them waits for ever. A child of a process that
// had started them therefore works alone (library.cpp registers the handler).
inline std::atomic<bool> threads_started{false};
inline std::atomic<bool> threads_lost{false};

// How many of torch's threads to use for so many tasks, at least one.
int64_t workers_for(int64_t tasks);

// work(context, worker) for each of `workers` on threads of their own; the first exception is thrown again.
void run_region(int64_t workers, void (*work)(const void* context, int64_t worker), const void* context);

// work(worker) on each of `workers`; one after the other where there are no threads, so none may wait for a later.
template <class F>
void run_workers(int64_t workers, const F& work) {
  if (workers <= 1) {
    for (int64_t w = 0; w < workers; ++w) work(w);
    return;
  }
  run_region(workers, [](const void* context, int64_t w) { (*static_cast<const F*>(context))(w); }, &work);
}

// task(worker, index) for each index < count, claimed in ascending order.
template <class F>
void run_tasks(int64_t workers, int64_t count, const F& task) {
  std::atomic<int64_t> next{0};
  run_workers(workers, [&](int64_t w) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) task(w, i);
  });
}

// What has to be done before something else, in any order: collected, then run at once, since every parallel region
// waits for all threads.
class Tasks {
 public:
  template <class F>
  void add(F&& task) {
    list_.emplace_back(std::forward<F>(task));
  }
  void run() {
    const auto count = static_cast<int64_t>(list_.size());
    run_tasks(workers_for(count), count, [&](int64_t, int64_t i) { list_[static_cast<size_t>(i)](); });
    list_.clear();
  }

 private:
  std::vector<std::function<void()>> list_;
};

}  // namespace crossan_fast
