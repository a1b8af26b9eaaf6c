#include "common/cpu_features.h"

#include <atomic>
#include <stdexcept>

namespace fasthyp {
namespace {

std::vector<Simd> detect() {
  std::vector<Simd> levels{Simd::portable};
#if defined(FASTHYP_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels.push_back(Simd::avx2);
  if (levels.back() == Simd::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    levels.push_back(Simd::avx512);
  if (levels.back() == Simd::avx512 && __builtin_cpu_supports("avx512bf16"))
    levels.push_back(Simd::avx512bf16);
#endif
  return levels;
}

std::atomic<int>& current() {
  static std::atomic<int> level{static_cast<int>(simd_levels().back())};
  return level;
}

}  // namespace

const std::vector<Simd>& simd_levels() {
  static const std::vector<Simd> levels = detect();
  return levels;
}

Simd simd_level() { return static_cast<Simd>(current().load(std::memory_order_relaxed)); }

const char* simd_name(Simd level) {
  switch (level) {
    case Simd::portable:
      return "portable";
    case Simd::avx2:
      return "avx2";
    case Simd::avx512:
      return "avx512";
    case Simd::avx512bf16:
      return "avx512bf16";
  }
  return "unknown";
}

void set_simd_level(const std::string& name) {
  std::string known;
  for (Simd level : simd_levels()) {
    if (name == simd_name(level)) {
      current() = static_cast<int>(level);
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + simd_name(level);
  }
  throw std::invalid_argument("SIMD level: expected one of " + known +
                              " (what this processor and build have), got '" + name + "'");
}

}  // namespace fasthyp
