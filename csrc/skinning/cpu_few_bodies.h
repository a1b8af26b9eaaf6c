// Points of a few bodies, by vectors over their coordinates. For cpu_kernels.cpp alone, which is
// compiled once per SIMD level.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "skinning/cpu_bodies.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

constexpr int kFew = 3;  // bodies

template <class T, int kCount>
struct Short {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
  static FASTHYP_INLINE type read(const T* from) {
    type v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static FASTHYP_INLINE type splat(T s) { return s - type{}; }  // GCC makes it one instruction
};

// sums (kTiles, kBodies, kColumns) = features x columns for the first kBodies lanes, by vectors
// over the columns. Several tiles at once are several streams from memory, whose speed is what
// counts here. Features of zero, as those of joints at rest, are not read.
template <int kBodies, int kTiles, class T>
void place_tiles_of_few(const T* features, const Rows<T> (&r)[kTiles],
                        T (*sums)[kBodies][kColumns]) {
  constexpr int kWidth = std::min(kLanes<T>, 8);
  using S = Short<T, kWidth>;
  constexpr int kAcross = kColumns / kWidth;
  constexpr int kHalf = kAcross > 3 ? kAcross / 2 : kAcross;
  int common = r[0].count;
  for (int t = 1; t < kTiles; ++t) common = std::min(common, r[t].count);
  for (int first = 0; first < kAcross; first += kHalf) {
    typename S::type acc[kTiles][kBodies][kHalf] = {};
    const auto add = [&](int t, int k) __attribute__((always_inline)) {
      const T* x = features + r[t].features[k] * kGroup<T>;
      const T* row = r[t].columns + k * kColumns + first * kWidth;
#pragma GCC unroll 3
      for (int b = 0; b < kBodies; ++b)
#pragma GCC unroll 6
        for (int i = 0; i < kHalf; ++i)
          acc[t][b][i] = fma(S::read(row + i * kWidth), S::splat(x[b]), acc[t][b][i]);
    };
    const auto zero = [&](int t, int k) __attribute__((always_inline)) {
      const T* x = features + r[t].features[k] * kGroup<T>;
      bool all = true;
#pragma GCC unroll 3
      for (int b = 0; b < kBodies; ++b) all = all && x[b] == 0;
      return all;
    };
    for (int k = 0; k < common; ++k) {
      bool all = true;
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) all = all && zero(t, k);
      if (all) continue;
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) add(t, k);
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      for (int k = common; k < r[t].count; ++k) add(t, k);
#pragma GCC unroll 3
      for (int b = 0; b < kBodies; ++b)
        std::memcpy(sums[t][b] + first * kWidth, acc[t][b], sizeof acc[t][b]);
    }
  }
}

// f(the number of bodies, as a constant)
template <class F>
FASTHYP_INLINE void of_few(int bodies, const F& f) {
  static_assert(kFew == 3);
  if (bodies == 1)
    f(std::integral_constant<int, 1>{});
  else if (bodies == 2)
    f(std::integral_constant<int, 2>{});
  else
    f(std::integral_constant<int, 3>{});
}

// The points of some tiles of a mesh for a few bodies, a vector for the coordinates of each. Bones:
// their columns, filled up to four numbers each.
template <int kBodies, int kTiles, class T>
void some_points_of_few(const Group<T>& group, std::int64_t tile, const T* bones, T* out) {
  using Four = Short<T, 4>;
  const Model& model = group.model;
  const T *weights = static_cast<const T*>(model.weights),
          *lift = static_cast<const T*>(model.lift);
  T sums[kTiles][kBodies][kColumns], moved[kColumns + 1];
  [&]<int... t>(std::integer_sequence<int, t...>) {
    place_tiles_of_few<kBodies, kTiles>(group.features, {Rows<T>(model, tile + t)...}, sums);
  }(std::make_integer_sequence<int, kTiles>{});
  for (int t = 0; t < kTiles; ++t) {
    const std::int64_t begin = (tile + t) * kTile, end = std::min(begin + kTile, model.points);
    const T* base = static_cast<const T*>(model.base) + (tile + t) * kColumns;
    for (int b = 0; b < kBodies; ++b) {
      T* from = sums[t][b];
      for (int c = 0; c < kColumns; ++c) from[c] += base[c];
      const T* of_body = bones + b * model.joints * 16;
      typename Four::type transl{};
      for (int i = 0; i < 3; ++i) transl[i] = group.transl[i * kGroup<T> + b];
      for (std::int64_t p = begin; p < end; ++p, from += 3) {
        typename Four::type bone[4] = {};
        for (std::int32_t e = model.starts[p]; e < model.starts[p + 1]; ++e) {
          const auto turn = Four::splat(weights[2 * e]), shift = Four::splat(weights[2 * e + 1]);
          const T* source = of_body + model.bones[e] * 16;
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c)
            bone[c] = fma(Four::read(source + 4 * c), c < 3 ? turn : shift, bone[c]);
        }
        typename Four::type to = bone[3];
#pragma GCC unroll 3
        for (int c = 2; c >= 0; --c) to = fma(bone[c], Four::splat(from[c]), to);
        to = fma(Four::splat(lift ? lift[p] : T(1)), transl, to);
        std::memcpy(moved + 3 * (p - begin), &to, sizeof to);  // the next point follows
      }
      std::copy_n(moved, 3 * (end - begin), out + b * 3 * model.outputs + 3 * begin);
    }
  }
}

template <int kBodies, class T>
void points_of_few(const Group<T>& group, std::int64_t tile, std::int64_t tiles, T* bones, T* out) {
  constexpr int L = kGroup<T>, kTogether = kBodies == 1 ? 4 : kBodies == 2 ? 2 : 1;
  static_assert(16 * kFew <= 12 * L, "bones do not fit into the work memory");
  const int joints = group.model.joints;
  for (int b = 0; b < kBodies; ++b)
    for (int j = 0; j < joints; ++j)
      for (int c = 0; c < 4; ++c)
        for (int i = 0; i < 4; ++i)
          bones[((b * joints + j) * 4 + c) * 4 + i] =
              i < 3 ? group.bones[(12 * j + (c < 3 ? 3 * i + c : 9 + i)) * L + b] : T(0);
  const std::int64_t end = tile + tiles;
  for (; tile + kTogether <= end; tile += kTogether)
    some_points_of_few<kBodies, kTogether>(group, tile, bones, out);
  for (; tile < end; ++tile) some_points_of_few<kBodies, 1>(group, tile, bones, out);
}

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
