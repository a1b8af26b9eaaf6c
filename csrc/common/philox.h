// Counter-based normal numbers: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011) and the Box-Muller transform.
//
// Counter = (dim / 4, hypothesis, image, 0), key = seed: a number depends on its place alone, never
// on how the work is split. The transform uses only multiplications, additions, fma and square
// root, each rounded once, so that CPU levels with fma and CUDA give the same bits.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fasthyp::philox {

struct Words {
  std::uint32_t w[4];
};

FASTHYP_HD Words philox4x32(Words c, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t(0xD2511F53u) * c.w[0];
    const std::uint64_t p1 = std::uint64_t(0xCD9E8D57u) * c.w[2];
    c = {{std::uint32_t(p1 >> 32) ^ c.w[1] ^ key0, std::uint32_t(p1),
          std::uint32_t(p0 >> 32) ^ c.w[3] ^ key1, std::uint32_t(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

FASTHYP_HD float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
FASTHYP_HD float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);  // never contracted with a neighbouring addition
#else
  return a * b;
#endif
}

union FloatBits {
  float f;
  std::int32_t i;
};

// -2 ln u for u in (0, 1].
FASTHYP_HD float minus_two_log(float u) {
  FloatBits b;
  b.f = u;
  // u = 2^e * m with m in [sqrt(1/2), sqrt 2)
  const std::int32_t e = (b.i - 0x3f3504f3) >> 23;
  b.i -= e << 23;
  const float f = b.f - 1.0f;
  // (ln(1+f) - f + f^2/2) / f^3, minimax: 6e-9 of ln
  float p = -7.859456618e-02f;
  p = fused(p, f, 1.288158818e-01f);
  p = fused(p, f, -1.312878505e-01f);
  p = fused(p, f, 1.418120180e-01f);
  p = fused(p, f, -1.662455193e-01f);
  p = fused(p, f, 2.000228582e-01f);
  p = fused(p, f, -2.500081046e-01f);
  p = fused(p, f, 3.333331673e-01f);
  const float f2 = product(f, f);
  float l = fused(product(p, f), f2, product(-0.5f, f2)) + f;
  l = fused(float(e), 0.693147181f, l);
  return product(-2.0f, l) > 0.0f ? product(-2.0f, l) : 0.0f;
}

// sin and cos of 2 pi u for u in [0, 1].
FASTHYP_HD void sin_cos_turns(float u, float* sine, float* cosine) {
  // quarter turns: nearest integer and a rest in [-1/2, 1/2]
  const float quarters = product(4.0f, u);
  const std::int32_t q = std::int32_t(quarters + 0.5f);
  const float r = product(quarters - float(q), 1.57079633f);
  const float r2 = product(r, r);
  float s = 2.75573192e-06f;  // Taylor, |r| <= pi/4
  s = fused(s, r2, -1.98412698e-04f);
  s = fused(s, r2, 8.33333333e-03f);
  s = fused(s, r2, -1.66666667e-01f);
  s = fused(product(s, r2), r, r);
  float c = -2.75573192e-07f;
  c = fused(c, r2, 2.48015873e-05f);
  c = fused(c, r2, -1.38888889e-03f);
  c = fused(c, r2, 4.16666667e-02f);
  c = fused(c, r2, -0.5f);
  c = fused(c, r2, 1.0f);
  const float a = (q & 1) ? c : s, b = (q & 1) ? s : c;
  *sine = (q & 2) ? -a : a;
  *cosine = ((q + 1) & 2) ? -b : b;
}

// Two independent normal numbers from two words.
FASTHYP_HD void box_muller(std::uint32_t a, std::uint32_t b, float* n0, float* n1) {
  const float u = fused(float(a), 2.3283064e-10f, 1.1641532e-10f);  // (a + 1/2) / 2^32
  const float turns = product(float(b), 2.3283064e-10f);
#ifdef __CUDA_ARCH__
  const float radius = __fsqrt_rn(minus_two_log(u));
#else
  const float radius = __builtin_sqrtf(minus_two_log(u));
#endif
  float s, c;
  sin_cos_turns(turns, &s, &c);
  *n0 = product(radius, c);
  *n1 = product(radius, s);
}

}  // namespace fasthyp::philox
