#include "common/philox_cpu.h"

#include "common/cpu_features.h"

namespace fasthyp {

#define FASTHYP_LEVEL(name)                                                                     \
  namespace name {                                                                              \
  void philox_normal_row(std::uint64_t, std::uint32_t image, std::uint32_t hypothesis, int dim, \
                         float* out);                                                           \
  }
FASTHYP_LEVEL(portable)
#if defined(FASTHYP_X86)
FASTHYP_LEVEL(avx2)
FASTHYP_LEVEL(avx512)
#endif
#undef FASTHYP_LEVEL

void philox_normal_row(std::uint64_t seed, std::uint32_t image, std::uint32_t hypothesis, int dim,
                       float* out) {
  switch (simd_level()) {
#if defined(FASTHYP_X86)
    case Simd::avx2:
      return avx2::philox_normal_row(seed, image, hypothesis, dim, out);
    case Simd::avx512:
    case Simd::avx512bf16:
      return avx512::philox_normal_row(seed, image, hypothesis, dim, out);
#endif
    default:
      return portable::philox_normal_row(seed, image, hypothesis, dim, out);
  }
}

}  // namespace fasthyp
