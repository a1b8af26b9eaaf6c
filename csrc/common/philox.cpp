// Compiled once per SIMD level.
#include "common/philox.h"

#include "common/philox_cpu.h"

#include "common/simd.h"

namespace fasthyp::FASTHYP_SIMD {

void philox_normal_row(std::uint64_t seed, std::uint32_t image, std::uint32_t hypothesis, int dim,
                       float* out) {
  // Counters in groups, one array per word, so that the compiler vectorises over them.
  constexpr int kGroup = 16;
  const auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int start = 0; start < dim; start += 4 * kGroup) {
    std::uint32_t w[4][kGroup];
    float n[4][kGroup];
    for (int i = 0; i < kGroup; ++i) {
      const philox::Words r = philox::philox4x32(
          {{static_cast<std::uint32_t>(start / 4 + i), hypothesis, image, 0}}, key0, key1);
      for (int k = 0; k < 4; ++k) w[k][i] = r.w[k];
    }
    for (int i = 0; i < kGroup; ++i) philox::box_muller(w[0][i], w[1][i], &n[0][i], &n[1][i]);
    for (int i = 0; i < kGroup; ++i) philox::box_muller(w[2][i], w[3][i], &n[2][i], &n[3][i]);
    const int count = dim - start < 4 * kGroup ? dim - start : 4 * kGroup;
    for (int j = 0; j < count; ++j) out[start + j] = n[j % 4][j / 4];
  }
}

extern const PhiloxNormalRow philox_kernel;
const PhiloxNormalRow philox_kernel = philox_normal_row;

}  // namespace fasthyp::FASTHYP_SIMD
