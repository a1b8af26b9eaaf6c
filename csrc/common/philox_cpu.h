// The CPU side of philox.h.
#pragma once

#include <cstdint>

namespace fasthyp {

using PhiloxNormalRow = void (*)(std::uint64_t seed, std::uint32_t image, std::uint32_t hypothesis,
                                 int dim, float* out);

// out[0 .. dim): the normal numbers of one hypothesis of one image.
void philox_normal_row(std::uint64_t seed, std::uint32_t image, std::uint32_t hypothesis, int dim,
                       float* out);

}  // namespace fasthyp
