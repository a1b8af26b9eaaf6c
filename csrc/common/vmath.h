// Elementary functions on vectors. float: polynomials, about 1 to 2 ulp. double: exp is a
// polynomial, the rest call libm lane by lane (double serves gradient checks, not speed).
//
// The polynomial coefficients are minimax fits (Lawson-weighted least squares on Chebyshev nodes);
// the comment beside each gives its interval and error before rounding to float.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace fasthyp::FASTHYP_SIMD {

namespace detail {

template <class T, class F>
FASTHYP_INLINE Vec<T> lanewise(Vec<T> x, F f) {
  for (int i = 0; i < kLanes<T>; ++i) x[i] = f(x[i]);
  return x;
}

// c[0] + c[1] x + ... by Horner's rule.
template <class T, int N>
FASTHYP_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[N]) {
  Vec<T> p = splat<T>(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = fma(p, x, splat<T>(c[i]));
  return p;
}

template <class T>
FASTHYP_INLINE Vec<T> abs(Vec<T> x) {
  using I = typename IntOf<T>::type;
  return bits_as<Vec<T>>(bits_as<IntVec<T>>(x) & ~(I(1) << (sizeof(T) * 8 - 1)));
}
template <class T>
FASTHYP_INLINE Vec<T> copysign(Vec<T> magnitude, Vec<T> sign) {
  using I = typename IntOf<T>::type;
  constexpr I bit = I(1) << (sizeof(T) * 8 - 1);
  return bits_as<Vec<T>>((bits_as<IntVec<T>>(magnitude) & ~bit) | (bits_as<IntVec<T>>(sign) & bit));
}

}  // namespace detail

// e^x. Overflows to infinity, underflows to zero, keeps NaN.
template <class T>
FASTHYP_INLINE Vec<T> exp(Vec<T> x) {
  using V = Vec<T>;
  constexpr bool f = sizeof(T) == 4;
  // Beyond these the two-step scaling below gives inf and 0 by itself.
  const V lo = splat<T>(f ? T(-110) : T(-750)), hi = splat<T>(f ? T(92) : T(715));
  x = select<T>(x < lo, lo, x);
  x = select<T>(x > hi, hi, x);
  // n = round(x / ln 2) by adding 1.5 * 2^(mantissa bits): the integer is then in the low bits.
  const V magic = splat<T>(f ? T(12582912.0) : T(6755399441055744.0));
  const V shifted = fma(x, splat<T>(T(1.4426950408889634)), magic);
  const V n = shifted - magic;
  V r = fma(n, splat<T>(f ? T(-0.693359375) : T(-0.6931471803691238)), x);
  r = fma(n, splat<T>(f ? T(2.12194440054690583e-4) : T(-1.9082149292705877e-10)), r);
  V p;
  if constexpr (f) {
    static constexpr T c[] = {1, 1, 0.5f, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
    p = detail::polynomial<T>(r, c);
  } else {
    static constexpr T c[] = {1,
                              1,
                              0.5,
                              1. / 6,
                              1. / 24,
                              1. / 120,
                              1. / 720,
                              1. / 5040,
                              1. / 40320,
                              1. / 362880,
                              1. / 3628800,
                              1. / 39916800,
                              1. / 479001600,
                              1. / 6227020800.};
    p = detail::polynomial<T>(r, c);
  }
  // p * 2^n in two factors, so that neither leaves the exponent's range.
  const IntVec<T> k = bits_as<IntVec<T>>(shifted) - bits_as<IntVec<T>>(magic);
  const IntVec<T> half = k >> 1;
  constexpr int mantissa = f ? 23 : 52, bias = f ? 127 : 1023;
  const V s1 = bits_as<V>((half + bias) << mantissa),
          s2 = bits_as<V>((k - half + bias) << mantissa);
  return p * s1 * s2;
}

template <class T>
FASTHYP_INLINE Vec<T> atan(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return detail::lanewise<T>(x, [](T v) { return ::atan(v); });
  } else {
    using V = Vec<T>;
    const V t = detail::abs<T>(x), one = splat<T>(1);
    const auto big = t > splat<T>(2.414213562f), mid = t > splat<T>(0.4142135624f);
    // atan t = pi/2 + atan(-1/t) = pi/4 + atan((t-1)/(t+1)): one division serves all three.
    const V num = select<T>(big, -one, select<T>(mid, t - one, t));
    const V den = select<T>(big, t, select<T>(mid, t + one, one));
    const V offset = select<T>(big, splat<T>(1.5707963268f),
                               select<T>(mid, splat<T>(0.7853981634f), splat<T>(0)));
    const V z = num / den, u = z * z;
    // (atan z / z - 1) / z^2 in z^2, |z| <= tan(pi/8): 6e-10
    static constexpr T c[] = {-3.333330808e-01f, 1.999823817e-01f, -1.424042965e-01f,
                              1.057578995e-01f, -6.040178169e-02f};
    const V p = fma(detail::polynomial<T>(u, c) * u, z, z);
    return detail::copysign<T>(p + offset, x);
  }
}

template <class T>
FASTHYP_INLINE Vec<T> tanh(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return detail::lanewise<T>(x, [](T v) { return ::tanh(v); });
  } else {
    using V = Vec<T>;
    const V t = detail::abs<T>(x), u = x * x;
    // (tanh x / x - 1) / x^2 in x^2, |x| <= 0.625: 4e-9
    static constexpr T c[] = {-3.333326338e-01f, 1.333118574e-01f, -5.372522988e-02f,
                              2.060314205e-02f, -5.672416504e-03f};
    const V small = fma(detail::polynomial<T>(u, c) * u, t, t);
    const V large = splat<T>(1) - splat<T>(2) / (exp<T>(t + t) + splat<T>(1));
    return detail::copysign<T>(select<T>(t < splat<T>(0.625f), small, large), x);
  }
}

template <class T>
FASTHYP_INLINE Vec<T> erf(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return detail::lanewise<T>(x, [](T v) { return ::erf(v); });
  } else {
    using V = Vec<T>;
    const V t = detail::abs<T>(x), u = x * x;
    // erf x / x in x^2, |x| <= 1: 2e-9
    static constexpr T c[] = {1.128379166e+00f,  -3.761262714e-01f, 1.128360017e-01f,
                              -2.685444451e-02f, 5.189535190e-03f,  -8.020839944e-04f,
                              7.889115067e-05f};
    // -log(erfc x), 1 <= x <= 4: 2e-11 of erfc
    static constexpr T q[] = {-1.880436709e-04f, 1.129578440e+00f,  6.332198640e-01f,
                              1.084186073e-01f,  -2.520827488e-02f, 4.204568332e-03f,
                              -4.413376282e-04f, 2.168695168e-05f};
    const V small = detail::polynomial<T>(u, c) * t;
    const V capped = select<T>(t > splat<T>(4), splat<T>(4), t);
    const V large = splat<T>(1) - exp<T>(-detail::polynomial<T>(capped, q));
    return detail::copysign<T>(select<T>(t < splat<T>(1), small, large), x);
  }
}

template <class T>
FASTHYP_INLINE Vec<T> sigmoid(Vec<T> x) {
  return splat<T>(1) / (splat<T>(1) + exp<T>(-x));
}

}  // namespace fasthyp::FASTHYP_SIMD
