// Weights and draws, shared by the CPU and CUDA kernels, which give the same cells bit for bit.
//
// Weights are integers, so that their sums do not depend on the order: the greatest one has 51
// bits, or as many as the number of cells leaves of 63. A draw is an integer below their sum, from
// 64 random bits. What rounds is written out (fma, product), so that no compiler contracts it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/host_device.h"
#include "common/philox.h"
#include "heatmaps/heatmaps.h"

namespace fasthyp::heatmaps {

template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
template <class T>
constexpr T kMost = std::numeric_limits<T>::max();
constexpr double kLeast = std::numeric_limits<double>::min();  // that log2_of takes

FASTHYP_HD double fused(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}
FASTHYP_HD double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
FASTHYP_HD std::uint64_t bits_of(double v) { return __builtin_bit_cast(std::uint64_t, v); }
FASTHYP_HD double double_of(std::uint64_t bits) { return __builtin_bit_cast(double, bits); }

// Of a positive normal number, to 1e-13.
FASTHYP_HD double log2_of(double v) {
  // v = 2^e m with m in [sqrt(1/2), sqrt 2); log m = 2 artanh(s)
  const std::uint64_t e = (bits_of(v) + 0x00095f619980c433u) >> 52;  // + 1023
  const double m = double_of(bits_of(v) - ((e - 1023) << 52));
  const double s = (m - 1) / (m + 1), s2 = product(s, s);
  constexpr double k = 2.8853900817779268;  // 2 / ln 2
  double p = k / 15;
  p = fused(p, s2, k / 13);
  p = fused(p, s2, k / 11);
  p = fused(p, s2, k / 9);
  p = fused(p, s2, k / 7);
  p = fused(p, s2, k / 5);
  p = fused(p, s2, k / 3);
  p = fused(p, s2, k);
  constexpr double kWhole = 4503599627370496.0;  // 2^52: integers are the low bits
  return fused(s, p, double_of(bits_of(kWhole) | e) - (kWhole + 1023));
}

// 2^(y + shift), to 1e-13, for y in [-900, 900].
FASTHYP_HD double exp2_of(double y, int shift) {
  constexpr double kRound = 6755399441055744.0;
  const double shifted = y + kRound;  // rounded to an integer, also in the low bits
  const double r = y - (shifted - kRound);
  double p = 4.4455382718708e-10;  // ln(2)^k / k!
  p = fused(p, r, 7.0549116208011e-09);
  p = fused(p, r, 1.01780860092397e-07);
  p = fused(p, r, 1.32154867901443e-06);
  p = fused(p, r, 1.52527338040598e-05);
  p = fused(p, r, 1.54035303933816e-04);
  p = fused(p, r, 1.33335581464284e-03);
  p = fused(p, r, 9.61812910762848e-03);
  p = fused(p, r, 5.55041086648216e-02);
  p = fused(p, r, 2.40226506959101e-01);
  p = fused(p, r, 6.93147180559945e-01);
  p = fused(p, r, 1.0);
  return double_of(bits_of(p) + ((bits_of(shifted) + static_cast<std::uint64_t>(shift)) << 52));
}

// The weights of one map.
struct Weights {
  double threshold, temperature;
  double scale;        // of a weight that is the value itself
  double log_highest;  // of the greatest value, where it is not
  int shift;

  // The least value that has a weight.
  FASTHYP_HD static double lowest(const Call& call) {
    return call.threshold > kLeast ? call.threshold : kLeast;
  }

  FASTHYP_HD Weights(const Call& call, double highest)
      : threshold(lowest(call)), temperature(call.temperature), shift(50) {
    const std::int64_t cells = std::int64_t(call.height) * call.width;
    while (cells > std::int64_t(1) << (62 - shift)) --shift;
    // far down the scale of double, where no 2^shift can lift it, a map counts as zero
    const int exponent = static_cast<int>(bits_of(highest) >> 52) - 1023;
    scale = double_of(static_cast<std::uint64_t>(1023 + shift - (exponent > -950 ? exponent : -950))
                      << 52);
    log_highest = temperature == 1 ? 0 : log2_of(highest);
  }

  template <bool kPower>
  FASTHYP_HD std::uint64_t of(double value) const {
    double w;
    if constexpr (kPower) {
      const double v = value >= threshold ? value : 1.0;
      const double y = product(temperature, log2_of(v) - log_highest);
      w = exp2_of(y > -200.0 ? (y < 0.0 ? y : 0.0) : -200.0, shift);
    } else {
      w = product(value, scale);
    }
    constexpr double kWhole = 4503599627370496.0;
    return bits_of((value >= threshold ? w : 0.0) + kWhole) - bits_of(kWhole);
  }
};

// The high 64 bits: an integer below `sum`, uniform to sum / 2^64.
FASTHYP_HD std::uint64_t below(std::uint64_t sum, std::uint64_t random) {
#ifdef __CUDA_ARCH__
  return __umul64hi(sum, random);
#else
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(sum) * random) >> 64);
#endif
}

// 64 random bits: Philox with counter (sample / 2, joint, image, 1) and the seed as key; words 0
// and 1 are the low and high half of an even sample's bits, words 2 and 3 of an odd one's. The last
// word of the counter keeps them apart from the normal numbers of philox.h.
FASTHYP_HD std::uint64_t random_bits(const Call& call, std::int64_t map, std::int64_t sample) {
  const philox::Words r = philox::philox4x32(
      {{static_cast<std::uint32_t>(sample / 2), static_cast<std::uint32_t>(map % call.joints),
        static_cast<std::uint32_t>(call.image_offset + map / call.joints), 1}},
      static_cast<std::uint32_t>(call.seed), static_cast<std::uint32_t>(call.seed >> 32));
  const bool odd = sample % 2 != 0;
  const std::uint32_t low = odd ? r.w[2] : r.w[0], high = odd ? r.w[3] : r.w[1];
  return static_cast<std::uint64_t>(high) << 32 | low;
}

template <class T>
FASTHYP_HD void store(const Call& call, std::int64_t map, std::int64_t sample, T x, T y, T value) {
  const std::int64_t at =
      (map / call.joints * call.samples + sample) * call.joints + map % call.joints;
  static_cast<T*>(call.points)[2 * at] = x;
  static_cast<T*>(call.points)[2 * at + 1] = y;
  static_cast<T*>(call.values)[at] = value;
}

}  // namespace fasthyp::heatmaps
