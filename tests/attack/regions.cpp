// Parallel regions on threads that ThreadSanitizer knows: preloaded, in the place of libgomp's entries of these names.
//
// libgomp is not instrumented and synchronizes by futexes of its own, so every hand-over between its threads would be
// reported. A region here starts its threads and joins them, which the sanitizer sees.
#include <dlfcn.h>

#include <thread>
#include <vector>

namespace {
thread_local int number = 0, count = 1, depth = 0;

void run(void (*work)(void*), void* data, int place, int threads) {
  const int before[] = {number, count};
  number = place, count = threads, ++depth;
  work(data);
  number = before[0], count = before[1], --depth;
}
}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return count; }
int omp_in_parallel() { return depth > 0; }

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  static const auto most = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
  const int wanted = depth > 0 ? 1 : threads != 0 ? static_cast<int>(threads) : most != nullptr ? most() : 1;
  std::vector<std::thread> others;
  for (int place = 1; place < wanted; ++place) others.emplace_back(run, work, data, place, wanted);
  run(work, data, 0, wanted);
  for (std::thread& other : others) other.join();
}

}  // extern "C"
