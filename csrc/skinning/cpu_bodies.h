// Groups of bodies, each in a lane of some vectors. For cpu_kernels.cpp alone, which is compiled
// once per SIMD level.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/simd.h"
#include "common/vmath.h"
#include "skinning/math.h"
#include "skinning/skinning.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using namespace skinning;

constexpr int kVectors = 2;  // of a group
template <class T>
constexpr int kGroup = kVectors * kLanes<T>;

template <class T>
struct Lanes {
  using Number = Vec<T>;
  static FASTHYP_INLINE Vec<T> of(double v) { return splat<T>(static_cast<T>(v)); }
  static FASTHYP_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
    return FASTHYP_SIMD::fma(a, b, c);
  }
  static FASTHYP_INLINE Vec<T> sqrt(Vec<T> v) {
#if FASTHYP_SIMD_BYTES == 64
    // maskz: the plain intrinsics make GCC warn of something uninitialised
    if constexpr (sizeof(T) == 4)
      return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
    else
      return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#else
    return FASTHYP_SIMD::sqrt(v);
#endif
  }
  static FASTHYP_INLINE Vec<T> where_positive(Vec<T> test, Vec<T> yes, Vec<T> no) {
    return select<T>(test > splat<T>(0), yes, no);
  }
  static FASTHYP_INLINE void sincos(Vec<T> x, Vec<T>& s, Vec<T>& c) {
    if constexpr (std::is_same_v<T, float>) {
      quarters(x, s, c);
      for (int i = 0; i < kLanes<T>; ++i)  // each lane by itself
        if (!(x[i] < 8000 && x[i] > -8000)) {
          s[i] = std::sin(x[i]);
          c[i] = std::cos(x[i]);
        }
    } else {
      s = detail::lanewise<T>(x, [](T v) { return std::sin(v); });
      c = detail::lanewise<T>(x, [](T v) { return std::cos(v); });
    }
  }

 private:
  // |x| <= 8000: x = n pi/2 + r; pi/2 in three parts, of which two times n are exact.
  static FASTHYP_INLINE void quarters(Vec<T> x, Vec<T>& s, Vec<T>& c) {
    const Vec<T> magic = splat<T>(12582912);  // 1.5 * 2^23
    const Vec<T> shifted = fma(x, splat<T>(0.636619772f), magic);
    const Vec<T> n = shifted - magic;
    Vec<T> r = fma(n, splat<T>(-1.5703125f), x);
    r = fma(n, splat<T>(-4.837512969970703125e-4f), r);
    r = fma(n, splat<T>(-7.54978995489188216e-8f), r);
    const Vec<T> square = r * r;
    // Cephes' sinf and cosf, |r| <= pi/4
    static constexpr T for_sine[] = {-1.6666654611e-1f, 8.3321608736e-3f, -1.9515295891e-4f};
    static constexpr T for_cosine[] = {4.166664568298827e-2f, -1.388731625493765e-3f,
                                       2.443315711809948e-5f};
    const Vec<T> sine = fma(detail::polynomial<T>(square, for_sine) * square, r, r);
    const Vec<T> cosine = fma(detail::polynomial<T>(square, for_cosine) * square, square,
                              fma(square, splat<T>(-0.5f), splat<T>(1)));
    const IntVec<T> quarter = bits_as<IntVec<T>>(shifted);  // n in its low bits
    const auto odd = (quarter & 1) != 0;
    const Vec<T> first = select<T>(odd, cosine, sine), second = select<T>(odd, sine, cosine);
    s = select<T>((quarter & 2) != 0, -first, first);
    c = select<T>(((quarter + 1) & 2) != 0, -second, second);
  }
};

template <int kCount, class T>
FASTHYP_INLINE void load_all(const T* from, Vec<T>* to) {
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) to[i] = load(from + i * kGroup<T>);
}
template <int kCount, class T>
FASTHYP_INLINE void store_all(T* to, const Vec<T>* from) {
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) store(to + i * kGroup<T>, from[i]);
}

template <class T>
struct Group {
  const Call& call;
  const Model& model;
  std::int64_t first;  // body
  int bodies;
  int vectors;
  T *features, *bones, *local, *rest, *posed, *transl;

  Group(const Call& c, std::int64_t group, void* memory)
      : call(c), model(c.model), first(group * kGroup<T>) {
    const GroupSizes sizes(model);
    T* p = static_cast<T*>(memory) + group * sizes.total * kGroup<T>;
    bodies = static_cast<int>(std::min<std::int64_t>(kGroup<T>, call.bodies - first));
    vectors = bodies > kLanes<T> ? 2 : 1;
    features = p + sizes.features * kGroup<T>;
    bones = p + sizes.bones * kGroup<T>;
    local = p + sizes.local * kGroup<T>;
    rest = p + sizes.rest * kGroup<T>;
    posed = p + sizes.posed * kGroup<T>;
    transl = p + sizes.transl * kGroup<T>;
  }
  // The body of a lane; of lanes without one the last.
  std::int64_t body(int lane) const { return first + std::min(lane, bodies - 1); }
};

template <class T>
struct Grads {
  T *features, *bones, *transl;
  int numbers;

  Grads(const Model& model, std::int64_t place, void* memory) {
    const GradSizes sizes(model);
    T* p = static_cast<T*>(memory) + place * sizes.total * kGroup<T>;
    features = p + sizes.features * kGroup<T>;
    bones = p + sizes.bones * kGroup<T>;
    transl = p + sizes.transl * kGroup<T>;
    numbers = sizes.total;
  }
};

// `count` numbers of each body, side by side in lanes.
template <class T>
void spread(const Group<T>& group, const void* from, std::int64_t stride, int count, T* to) {
  for (int lane = 0; lane < kGroup<T>; ++lane) {
    const T* body = static_cast<const T*>(from) + group.body(lane) * stride;
    for (int i = 0; i < count; ++i) to[i * kGroup<T> + lane] = body[i];
  }
}

// And back, for the bodies that there are, `stride` numbers apart.
template <class T>
FASTHYP_INLINE void collect(const Group<T>& group, const T* from, int count, T* to,
                            std::int64_t stride) {
  for (int lane = 0; lane < group.bodies; ++lane)
    for (int i = 0; i < count; ++i) to[lane * stride + i] = from[i * kGroup<T> + lane];
}

// The features that move the points of a tile.
template <class T>
struct Rows {
  const std::int32_t* features;
  const T* columns;
  int count;
  Rows(const Model& model, std::int64_t tile) {
    const std::int32_t first = model.row_starts[tile];
    features = model.rows + first;
    columns = static_cast<const T*>(model.columns) + std::int64_t{first} * kColumns;
    count = model.row_starts[tile + 1] - first;
  }
};

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
