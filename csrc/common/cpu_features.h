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

// To be used inside namespace fasthyp: declares the constant `name` that every compiled SIMD level
// defines in its own namespace, and name(), the one of the level in use.
#if defined(FASTHYP_X86)
#define FASTHYP_PER_SIMD_LEVEL(Type, name) \
  namespace portable {                     \
  extern const Type name;                  \
  }                                        \
  namespace avx2 {                         \
  extern const Type name;                  \
  }                                        \
  namespace avx512 {                       \
  extern const Type name;                  \
  }                                        \
  namespace avx512bf16 {                   \
  extern const Type name;                  \
  }                                        \
  static const Type& name() {              \
    switch (simd_level()) {                \
      case Simd::portable:                 \
        break;                             \
      case Simd::avx2:                     \
        return avx2::name;                 \
      case Simd::avx512:                   \
        return avx512::name;               \
      case Simd::avx512bf16:               \
        return avx512bf16::name;           \
    }                                      \
    return portable::name;                 \
  }
#else
#define FASTHYP_PER_SIMD_LEVEL(Type, name) \
  namespace portable {                     \
  extern const Type name;                  \
  }                                        \
  static const Type& name() { return portable::name; }
#endif
