// What the library says about itself, and what it does when its process forks.
#include <pthread.h>
#include <torch/library.h>

#include <string>

#include "parallel.h"
#include "products.h"
#include "simd.h"

namespace crossan_fast {
namespace {

const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  if (threads_started.load()) threads_lost.store(true);
});

// An op and not a pybind11 module: the library then needs no Python header, and one build serves every Python.
std::string build_info() {
  return c10::str("vectors of ", kVectorBytes * 8, " bits, compiled by ", __VERSION__, ", fork handler ",
                  fork_handler == 0 ? "set" : "missing", ", bf16 products of side_network in ",
                  use_brgemm() ? "brgemm" : "fp32", " (", brgemm_reason(), ")");
}

}  // namespace

TORCH_LIBRARY(crossan_fast_cpp, library) { library.def("build_info() -> str", build_info); }

}  // namespace crossan_fast
