// What a coupling computes per element, on vectors of one SIMD level.
#pragma once

#include "common/vmath.h"
#include "coupling/coupling.h"

namespace fasthyp::FASTHYP_SIMD {

// The soft clamp of a subnet's raw log-scale. 0.636, not 2/pi: FrEIA's constant.
template <class T>
FASTHYP_INLINE Vec<T> soft_clamp(Vec<T> raw, T clamp, coupling::Clamp kind) {
  const Vec<T> c = splat<T>(clamp);
  switch (kind) {
    case coupling::Clamp::atan:
      return c * (splat<T>(T(0.636)) * atan<T>(raw));
    case coupling::Clamp::atan_scaled:
      return c * (splat<T>(T(0.636)) * atan<T>(raw / c));
    case coupling::Clamp::tanh:
      return c * tanh<T>(raw);
    case coupling::Clamp::tanh_scaled:
      return c * tanh<T>(raw / c);
    // 2 (sigmoid(u) - 1/2) = tanh(u / 2), without the cancellation
    case coupling::Clamp::sigmoid:
      return c * tanh<T>(splat<T>(T(0.5)) * raw);
    case coupling::Clamp::none:
      break;
  }
  return raw;
}

template <class T>
FASTHYP_INLINE Vec<T> activate(Vec<T> x, coupling::Activation kind, T slope) {
  const Vec<T> zero = splat<T>(0), half = splat<T>(T(0.5)), one = splat<T>(1);
  switch (kind) {
    case coupling::Activation::relu:
      return select<T>(x < zero, zero, x);  // keeps NaN
    case coupling::Activation::leaky_relu:
      return select<T>(x < zero, x * splat<T>(slope), x);
    case coupling::Activation::silu:
      return x * sigmoid<T>(x);
    case coupling::Activation::tanh:
      return tanh<T>(x);
    case coupling::Activation::gelu:
      return half * x * (one + erf<T>(x * splat<T>(T(0.70710678118654752))));
    case coupling::Activation::gelu_tanh: {
      const Vec<T> cube = x * x * x;
      const Vec<T> u = splat<T>(T(0.79788456080286536)) * fma(splat<T>(T(0.044715)), cube, x);
      return half * x * (one + tanh<T>(u));
    }
  }
  return x;
}

// d soft_clamp / d raw.
template <class T>
FASTHYP_INLINE Vec<T> soft_clamp_slope(Vec<T> raw, T clamp, coupling::Clamp kind) {
  const Vec<T> c = splat<T>(clamp), one = splat<T>(1);
  switch (kind) {
    case coupling::Clamp::atan:
      return c * splat<T>(T(0.636)) / fma(raw, raw, one);
    case coupling::Clamp::atan_scaled: {
      const Vec<T> u = raw / c;
      return splat<T>(T(0.636)) / fma(u, u, one);
    }
    case coupling::Clamp::tanh: {
      const Vec<T> y = tanh<T>(raw);
      return c * (one - y * y);
    }
    case coupling::Clamp::tanh_scaled: {
      const Vec<T> y = tanh<T>(raw / c);
      return one - y * y;
    }
    case coupling::Clamp::sigmoid: {
      const Vec<T> y = tanh<T>(splat<T>(T(0.5)) * raw);
      return splat<T>(T(0.5)) * c * (one - y * y);
    }
    case coupling::Clamp::none:
      break;
  }
  return one;
}

// d activate / d x, with PyTorch's choice at 0.
template <class T>
FASTHYP_INLINE Vec<T> activation_slope(Vec<T> x, coupling::Activation kind, T slope) {
  const Vec<T> zero = splat<T>(0), half = splat<T>(T(0.5)), one = splat<T>(1);
  switch (kind) {
    case coupling::Activation::relu:
      return select<T>(x <= zero, zero, one);
    case coupling::Activation::leaky_relu:
      return select<T>(x > zero, one, splat<T>(slope));
    case coupling::Activation::silu: {
      const Vec<T> s = sigmoid<T>(x);
      return s * fma(x, one - s, one);
    }
    case coupling::Activation::tanh: {
      const Vec<T> y = tanh<T>(x);
      return one - y * y;
    }
    case coupling::Activation::gelu: {
      const Vec<T> cdf = half * (one + erf<T>(x * splat<T>(T(0.70710678118654752))));
      const Vec<T> pdf = splat<T>(T(0.39894228040143268)) * exp<T>(-half * x * x);
      return fma(x, pdf, cdf);
    }
    case coupling::Activation::gelu_tanh: {
      const Vec<T> k = splat<T>(T(0.79788456080286536)), square = x * x;
      const Vec<T> y = tanh<T>(k * fma(splat<T>(T(0.044715)), square * x, x));
      const Vec<T> inner = k * fma(splat<T>(T(3 * 0.044715)), square, one);
      return half * (one + y) + half * x * (one - y * y) * inner;
    }
  }
  return one;
}

}  // namespace fasthyp::FASTHYP_SIMD
