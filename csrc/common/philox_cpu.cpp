#include "common/philox_cpu.h"

#include "common/cpu_features.h"

namespace fasthyp {

FASTHYP_PER_SIMD_LEVEL(PhiloxNormalRow, philox_kernel)

void philox_normal_row(std::uint64_t seed, std::uint32_t image, std::uint32_t hypothesis, int dim,
                       float* out) {
  philox_kernel()(seed, image, hypothesis, dim, out);
}

}  // namespace fasthyp
