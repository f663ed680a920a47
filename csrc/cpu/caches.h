// The cache of one core, for sizes of blocks: results may depend on the machine, never on the number of threads.
#pragma once

#include <cstdint>
#include <string>

namespace crossan_fast {

struct CacheSizes {
  int64_t l2;          // bytes of a core's level 2
  const char* source;  // who says so
};

// As the system says for the first CPU, 512 kB where it says nothing; or CROSSAN_FAST_CPU_L2, in kB, read at first use.
const CacheSizes& cache_sizes();

}  // namespace crossan_fast
