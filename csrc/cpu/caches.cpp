#include "caches.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <fstream>

namespace crossan_fast {
namespace {

// "32K" or "2M" as bytes; 0 where there is no such file.
int64_t read_size(const std::string& path) {
  std::ifstream file(path);
  int64_t size = 0;
  char unit = 0;
  if (!(file >> size)) return 0;
  file >> unit;
  return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size;
}

std::string read_word(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

CacheSizes read() {
  if (const char* wish = std::getenv("CROSSAN_FAST_CPU_L2")) {
    char* end = nullptr;
    const long kilobytes = std::strtol(wish, &end, 10);
    TORCH_CHECK_VALUE(*wish != 0 && *end == 0 && kilobytes >= 1 && kilobytes <= (1 << 20),
                      "CROSSAN_FAST_CPU_L2: expected a core's L2 in kB, got '", wish, "'");
    return {int64_t{kilobytes} << 10, "CROSSAN_FAST_CPU_L2"};
  }
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    if (read_word(folder + "level") != "2" || read_word(folder + "type") == "Instruction") continue;
    if (const int64_t size = read_size(folder + "size")) return {size, "as the system says"};
  }
  return {512 << 10, "assumed: the system does not say"};
}

}  // namespace

const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = read();
  return sizes;
}

}  // namespace crossan_fast
