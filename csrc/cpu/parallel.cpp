#include "parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>

// The entry that g++ calls for a parallel region. Called by name, clang reaches the runtime that torch brings too: its
// own regions would want LLVM's, a second pool of threads.
#if defined(__linux__)
extern "C" {
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}
#endif

namespace crossan_fast {
namespace {

struct Region {
  int64_t workers;
  void (*work)(const void*, int64_t);
  const void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr failure;

  void run(int64_t first, int64_t step) {
    try {
      for (int64_t w = first; w < workers; w += step) work(context, w);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  }
};

}  // namespace

int64_t workers_for(int64_t tasks) {
  if (threads_lost.load()) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), tasks));
}

void run_region(int64_t workers, void (*work)(const void*, int64_t), const void* context) {
  Region region{workers, work, context, {}, {}};
#if defined(__linux__)
  if (!at::in_parallel_region()) {
    threads_started.store(true);
    const auto run = [](void* data) { static_cast<Region*>(data)->run(omp_get_thread_num(), omp_get_num_threads()); };
    GOMP_parallel(run, &region, static_cast<unsigned>(workers), 0);
  } else {
    region.run(0, 1);
  }
#else
  region.run(0, 1);
#endif
  if (region.failure) std::rethrow_exception(region.failure);
}

}  // namespace crossan_fast
