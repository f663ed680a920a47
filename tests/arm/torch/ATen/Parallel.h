// One thread: of threads the tests of the library know.
#pragma once

namespace at {
inline int get_num_threads() { return 1; }
inline bool in_parallel_region() { return false; }
}  // namespace at
