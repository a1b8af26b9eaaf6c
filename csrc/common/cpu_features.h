// Which of the compiled SIMD levels this processor runs.
#pragma once

#include <string>
#include <vector>

namespace fasthyp {

enum class Simd : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// Levels that both the build and the processor have, lowest first.
const std::vector<Simd>& simd_levels();
// The level in use: the highest, unless set otherwise.
Simd simd_level();
// Throws std::invalid_argument for a name that is not among simd_levels().
void set_simd_level(const std::string& name);
const char* simd_name(Simd level);

}  // namespace fasthyp
