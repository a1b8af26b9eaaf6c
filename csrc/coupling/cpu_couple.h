// The arithmetic of a coupling on a row, forward and back. For cpu_training.cpp alone, which is
// compiled once per SIMD level.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/simd.h"
#include "coupling/coupling.h"
#include "coupling/math.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using coupling::Clamp;
using coupling::Coupling;
using coupling::Kind;

template <class T>
FASTHYP_INLINE IntVec<T> valid_lanes(int left) {
  return lane_index<T>() < static_cast<typename detail::IntOf<T>::type>(left) + IntVec<T>{};
}
template <class T>
FASTHYP_INLINE void store_some(T* to, Vec<T> v, int left) {
  if (left >= kLanes<T>)
    store<T>(to, v);
  else
    std::memcpy(to, &v, left * sizeof(T));
}

constexpr int kSumLanes = 16;
template <class T>
T sum_lanes(const T* lanes) {
  T v[kSumLanes];
  std::copy_n(lanes, kSumLanes, v);
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

template <class T>
struct Row {
  T* x;            // the values after the pass's step, then those before it
  T* g;            // their gradients, likewise
  const T *s, *t;  // raw
  T *gs, *gt;      // gradients of raw
  int count;
  T clamp;
  Clamp kind;
  bool inverse;  // of the pass
  T log_det;     // its gradient
};

// From gradients of the values after to those before and those of scale and shift. The pass gave
// x exp(scale) + shift, or (x - shift) exp(-scale).
template <class T>
FASTHYP_INLINE void affine_lanes(const Row<T>& r, int i, Vec<T> scale, Vec<T>& gscale) {
  const Vec<T> x = load<T>(r.x + i), g = load<T>(r.g + i), shift = load<T>(r.t + i);
  Vec<T> before, gbefore, gshift;
  if (r.inverse) {
    before = fma(x, exp<T>(scale), shift);
    gbefore = g * exp<T>(-scale);
    gshift = -gbefore;
    gscale = -(g * x);
  } else {
    before = (x - shift) * exp<T>(-scale);
    gbefore = g * exp<T>(scale);
    gshift = g;
    gscale = gbefore * before;
  }
  store_some<T>(r.x + i, before, r.count - i);
  store_some<T>(r.g + i, gbefore, r.count - i);
  store_some<T>(r.gt + i, gshift, r.count - i);
}

template <class T>
void affine_back(const Row<T>& r) {
  const Vec<T> log_det = splat<T>(r.inverse ? -r.log_det : r.log_det);
  for (int i = 0; i < r.count; i += kLanes<T>) {
    const Vec<T> raw = load<T>(r.s + i);
    Vec<T> gscale;
    affine_lanes<T>(r, i, soft_clamp<T>(raw, r.clamp, r.kind), gscale);
    store_some<T>(r.gs + i, (gscale + log_det) * soft_clamp_slope<T>(raw, r.clamp, r.kind),
                  r.count - i);
  }
}

template <class T>
void gin_back(const Row<T>& r) {
  constexpr int W = kLanes<T>;
  const auto number = static_cast<T>(r.count);
  T sums[kSumLanes] = {}, gsums[kSumLanes] = {};
  for (int i = 0; i < r.count; i += W) {
    const Vec<T> scale = soft_clamp<T>(load<T>(r.s + i), r.clamp, r.kind);
    T* lane = sums + i % kSumLanes;
    store<T>(lane, load<T>(lane) + select<T>(valid_lanes<T>(r.count - i), scale, splat<T>(0)));
  }
  const Vec<T> mean = splat<T>(sum_lanes(sums) / number);
  for (int i = 0; i < r.count; i += W) {
    Vec<T> gscale;
    affine_lanes<T>(r, i, soft_clamp<T>(load<T>(r.s + i), r.clamp, r.kind) - mean, gscale);
    store_some<T>(r.gs + i, gscale, r.count - i);
    T* lane = gsums + i % kSumLanes;
    store<T>(lane, load<T>(lane) + select<T>(valid_lanes<T>(r.count - i), gscale, splat<T>(0)));
  }
  const Vec<T> gmean = splat<T>(sum_lanes(gsums) / number);
  for (int i = 0; i < r.count; i += W)
    store_some<T>(
        r.gs + i,
        (load<T>(r.gs + i) - gmean) * soft_clamp_slope<T>(load<T>(r.s + i), r.clamp, r.kind),
        r.count - i);
}

template <class T>
void additive_back(const Row<T>& r) {
  for (int i = 0; i < r.count; ++i) {
    r.x[i] = r.inverse ? r.x[i] + r.t[i] : r.x[i] - r.t[i];
    r.gt[i] = r.inverse ? -r.g[i] : r.g[i];
  }
}

// The pass itself, as in cpu_kernels.cpp; sums gets the log-scales.
template <class T>
void couple_row(T* x, const T* s, const T* t, const Coupling& c, bool inverse, T* sums) {
  constexpr int W = kLanes<T>;
  const auto clamp = static_cast<T>(c.clamp);
  if (c.kind == Kind::additive) {
    for (int i = 0; i < c.active; ++i) x[i] = inverse ? x[i] - t[i] : x[i] + t[i];
    return;
  }
  Vec<T> mean = splat<T>(0);
  if (c.kind == Kind::gin) {
    T scales[kSumLanes] = {};
    for (int i = 0; i < c.active; i += W) {
      const Vec<T> scale = soft_clamp<T>(load<T>(s + i), clamp, c.clamp_activation);
      T* lane = scales + i % kSumLanes;
      store<T>(lane, load<T>(lane) + select<T>(valid_lanes<T>(c.active - i), scale, splat<T>(0)));
    }
    mean = splat<T>(sum_lanes(scales) / static_cast<T>(c.active));
  }
  for (int i = 0; i < c.active; i += W) {
    const auto valid = valid_lanes<T>(c.active - i);
    Vec<T> scale =
        select<T>(valid, soft_clamp<T>(load<T>(s + i), clamp, c.clamp_activation), splat<T>(0));
    if (c.kind == Kind::gin) scale = scale - mean;
    const Vec<T> shift = load<T>(t + i), v = load<T>(x + i);
    store_some<T>(x + i, inverse ? (v - shift) * exp<T>(-scale) : fma(v, exp<T>(scale), shift),
                  c.active - i);
    if (c.kind == Kind::gin) continue;
    T* lane = sums + i % kSumLanes;
    store<T>(lane, load<T>(lane) + scale);
  }
}

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
