// Compiled once per SIMD level. Each lane of a vector holds another body; two vectors make a group.
//
// Points of a tile are first placed in the body at rest: a product of the group's features with the
// tile's columns. For a few bodies there are vectors over the columns and over the coordinates of a
// point instead. Both add in the same order, so that a result does not depend on how many bodies
// there are.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

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
constexpr int kRegisters = FASTHYP_SIMD_BYTES == 64 ? 24 : 12;  // for sums
constexpr int kChunk = 128;  // features that are multiplied while they stay in the first cache
constexpr int kFew = 3;      // bodies

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

// --- from shape and pose to features and bones ---

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

template <class T>
void pose_vector(const Group<T>& group, int at) {
  using V = Vec<T>;
  using O = Lanes<T>;
  constexpr int L = kGroup<T>;
  const Model& model = group.model;
  const T* rest = static_cast<const T*>(model.rest);
  const T* shapes = static_cast<const T*>(model.rest_shapes);
  V step[3], zero[3] = {O::of(0), O::of(0), O::of(0)};
  for (int j = 0; j < model.joints; ++j) {
    V place[3];
    for (int i = 0; i < 3; ++i) {
      V sum = O::of(0);
      const T* row = shapes + (3 * j + i) * static_cast<std::ptrdiff_t>(model.shapes);
      for (int s = 0; s < model.shapes; ++s)
        sum = O::fma(splat<T>(row[s]), load(group.features + s * L + at), sum);
      place[i] = sum + splat<T>(rest[3 * j + i]);
    }
    store_all<3>(group.rest + 3 * j * L + at, place);

    V local[9], turned[9], posed[3], bone[3];
    load_all<9>(group.local + 9 * j * L + at, local);
    if (j == 0) {
      for (int i = 0; i < 9; ++i) turned[i] = local[i];
      for (int i = 0; i < 3; ++i) posed[i] = place[i];
    } else {
      const int parent = model.parents[j];
      V above[9], from[3], origin[3];
      load_all<9>(group.bones + 12 * parent * L + at, above);
      load_all<3>(group.rest + 3 * parent * L + at, from);
      load_all<3>(group.posed + 3 * parent * L + at, origin);
      for (int i = 0; i < 3; ++i) step[i] = place[i] - from[i];
      multiply<O>(above, local, turned);
      rotate<O>(above, step, origin, posed);
      if (model.pose_blend) {
        T* features = group.features + (model.shapes + 9 * (j - 1)) * L + at;
        for (int i = 0; i < 9; ++i) store(features + i * L, i % 4 ? local[i] : local[i] - O::of(1));
      }
    }
    // The bone's translation: a point at the joint goes where the joint goes.
    rotate<O>(turned, place, zero, bone);
    for (int i = 0; i < 3; ++i) bone[i] = posed[i] - bone[i];
    store_all<9>(group.bones + 12 * j * L + at, turned);
    store_all<3>(group.bones + (12 * j + 9) * L + at, bone);
    store_all<3>(group.posed + 3 * j * L + at, posed);
  }
}

template <class T>
void pose(const Call& call, std::int64_t index, const Memory& memory) {
  constexpr int L = kGroup<T>;
  using O = Lanes<T>;
  const Model& model = call.model;
  const Group<T> group(call, index, memory.groups);
  T* work = static_cast<T*>(memory.work);
  spread(group, call.betas, call.betas_stride, model.shapes, group.features);
  if (call.transl)
    spread(group, call.transl, call.transl_stride, 3, group.transl);
  else
    std::fill_n(group.transl, 3 * L, T(0));
  const int numbers = numbers_of(call.rotation);
  for (int j = 0; j < model.joints; ++j) {
    const T* given = static_cast<const T*>(call.pose) + static_cast<std::ptrdiff_t>(j) * numbers;
    T* local = group.local + 9 * j * L;
    if (call.rotation == Rotation::matrix) {
      spread(group, given, call.pose_stride, 9, local);
      continue;
    }
    spread(group, given, call.pose_stride, numbers, work);
    for (int v = 0; v < group.vectors; ++v) {
      Vec<T> x[9] = {}, m[9];
      if (numbers == 3)
        load_all<3>(work + v * kLanes<T>, x);
      else
        load_all<6>(work + v * kLanes<T>, x);
      to_matrix<O>(call.rotation, x, m);
      store_all<9>(local + v * kLanes<T>, m);
    }
  }
  for (int v = 0; v < group.vectors; ++v) pose_vector(group, v * kLanes<T>);

  if (!call.joints) return;
  T* out = static_cast<T*>(call.joints) + group.first * 3 * model.joints;
  for (int j = 0; j < model.joints; ++j) {
    for (int i = 0; i < 3; ++i)
      for (int v = 0; v < L; v += kLanes<T>)
        store(work + i * L + v,
              load(group.posed + (3 * j + i) * L + v) + load(group.transl + i * L + v));
    collect(group, work, 3, out + 3 * j, std::int64_t{3} * model.joints);
  }
}

// --- points of a tile, in the body at rest ---

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

// sums (kCount columns) += features x columns
template <int kAcross, int kCount, class T>
FASTHYP_INLINE void place_columns(const T* features, const std::int32_t* rows, const T* columns,
                                  int count, T* sums) {
  constexpr int L = kGroup<T>;
  Vec<T> acc[kCount][kAcross];
#pragma GCC unroll 24
  for (int c = 0; c < kCount; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < kAcross; ++v) acc[c][v] = load(sums + c * L + v * kLanes<T>);
  for (int k = 0; k < count; ++k, columns += kColumns) {
    const T* feature = features + rows[k] * L;
    Vec<T> x[kAcross];
#pragma GCC unroll 2
    for (int v = 0; v < kAcross; ++v) x[v] = load(feature + v * kLanes<T>);
#pragma GCC unroll 24
    for (int c = 0; c < kCount; ++c) {
      const Vec<T> w = splat<T>(columns[c]);
#pragma GCC unroll 2
      for (int v = 0; v < kAcross; ++v) acc[c][v] = fma(w, x[v], acc[c][v]);
    }
  }
#pragma GCC unroll 24
  for (int c = 0; c < kCount; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < kAcross; ++v) store(sums + c * L + v * kLanes<T>, acc[c][v]);
}

template <int kAcross, class T>
void place_tile(const T* features, const std::int32_t* rows, const T* columns, int count, T* sums) {
  constexpr int kCount = kRegisters / kAcross;
  static_assert(kColumns % kCount == 0);
  for (int k = 0; k < count; k += kChunk)
    for (int c = 0; c < kColumns; c += kCount)
      place_columns<kAcross, kCount>(features, rows + k, columns + k * kColumns + c,
                                     std::min(kChunk, count - k), sums + c * kGroup<T>);
}

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

// sums (kTiles, kBodies, kColumns): the same for the first kBodies lanes, by vectors over the
// columns. Several tiles at once are several streams from memory, whose speed is what counts here.
// Features of zero, as those of joints at rest, are not read.
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

// sums (kColumns, group): where the points of a tile are before the bones move them.
template <class T>
FASTHYP_INLINE void place_points(const Group<T>& group, std::int64_t tile, T* sums) {
  constexpr int L = kGroup<T>;
  const Rows<T> r(group.model, tile);
  std::fill_n(sums, kColumns * L, T(0));
  if (group.bodies <= kFew) {
    of_few(group.bodies, [&](auto bodies) {
      T few[1][bodies][kColumns];
      place_tiles_of_few<bodies, 1>(group.features, {r}, few);
      for (int b = 0; b < bodies; ++b)
        for (int c = 0; c < kColumns; ++c) sums[c * L + b] = few[0][b][c];
    });
  } else if (group.vectors == 1)
    place_tile<1>(group.features, r.features, r.columns, r.count, sums);
  else
    place_tile<2>(group.features, r.features, r.columns, r.count, sums);
  // Last what is largest: the sums before are short and keep their digits.
  const T* base = static_cast<const T*>(group.model.base) + tile * kColumns;
  for (int c = 0; c < kColumns; ++c)
    for (int v = 0; v < L; v += kLanes<T>)
      store(sums + c * L + v, load(sums + c * L + v) + splat<T>(base[c]));
}

// The weighted sum of the bones of a point.
template <int kCount, class T>
FASTHYP_INLINE void blend_bones(const Group<T>& group, std::int64_t point, int at, Vec<T>* sum) {
  const Model& model = group.model;
  const T* weights = static_cast<const T*>(model.weights);
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) sum[i] = splat<T>(0);
  for (std::int32_t e = model.starts[point]; e < model.starts[point + 1]; ++e) {
    const Vec<T> turn = splat<T>(weights[2 * e]), shift = splat<T>(weights[2 * e + 1]);
    const T* bone = group.bones + 12 * model.bones[e] * kGroup<T> + at;
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i)
      sum[i] = fma(load(bone + i * kGroup<T>), i < 9 ? turn : shift, sum[i]);
  }
}

// --- forward ---

// What is made of the points [begin, end) of a tile: in place for a mesh, else added to outputs.
template <class T>
FASTHYP_INLINE void move_points(const Group<T>& group, std::int64_t begin, std::int64_t end,
                                T* places, T* outputs) {
  constexpr int L = kGroup<T>;
  const Model& model = group.model;
  for (std::int64_t p = begin; p < end; ++p)
    for (int v = 0; v < group.vectors; ++v) {
      const int at = v * kLanes<T>;
      T* place = places + (p - begin) * 3 * L + at;
      Vec<T> bone[12], from[3], to[3];
      blend_bones<12>(group, p, at, bone);
      load_all<3>(place, from);
      rotate<Lanes<T>>(bone, from, bone + 9, to);
      if (outputs) {
        T* out = outputs + static_cast<std::ptrdiff_t>(3) * model.targets[p] * L + at;
        for (int i = 0; i < 3; ++i) store(out + i * L, load(out + i * L) + to[i]);
      } else {
        const T* lift = static_cast<const T*>(model.lift);
        const Vec<T> times = splat<T>(lift ? lift[p] : T(1));
        for (int i = 0; i < 3; ++i)
          store(place + i * L, fma(times, load(group.transl + i * L + at), to[i]));
      }
    }
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

template <class T>
void points(const Call& call, std::int64_t first_group, int groups, std::int64_t first_tile,
            std::int64_t tiles, const Memory& memory) {
  constexpr int L = kGroup<T>;
  const Model& model = call.model;
  T* places = static_cast<T*>(memory.work);
  T* outputs = model.targets ? places + kColumns * L : nullptr;
  const std::int64_t stride = 3 * model.outputs;
  if (outputs) {  // one group at a time, all its points
    for (int g = 0; g < groups; ++g) {
      const Group<T> group(call, first_group + g, memory.groups);
      const T* lift = static_cast<const T*>(model.lift);
      for (std::int64_t o = 0; o < model.outputs; ++o)
        for (int i = 0; i < 3; ++i)
          for (int v = 0; v < L; v += kLanes<T>)
            store(outputs + (3 * o + i) * L + v,
                  load(group.transl + i * L + v) * splat<T>(lift ? lift[o] : T(1)));
      for (std::int64_t t = 0; t < tiles; ++t) {
        const std::int64_t begin = (first_tile + t) * kTile;
        place_points(group, first_tile + t, places);
        move_points(group, begin, std::min(begin + kTile, model.points), places, outputs);
      }
      collect(group, outputs, static_cast<int>(stride),
              static_cast<T*>(call.out) + group.first * stride, stride);
    }
    return;
  }
  const Group<T> last(call, first_group + groups - 1, memory.groups);
  if (last.bodies <= kFew) {
    of_few(last.bodies, [&](auto bodies) {
      points_of_few<bodies>(last, first_tile, tiles, places + 3 * kColumns * L,
                            static_cast<T*>(call.out) + last.first * stride);
    });
    --groups;
  }
  for (std::int64_t t = 0; t < tiles && groups > 0; ++t) {
    const std::int64_t begin = (first_tile + t) * kTile;
    const std::int64_t end = std::min(begin + kTile, model.points);
    for (int g = 0; g < groups; ++g) {
      const Group<T> group(call, first_group + g, memory.groups);
      place_points(group, first_tile + t, places);
      move_points(group, begin, end, places, outputs);
      T* out = static_cast<T*>(call.out) + group.first * stride + 3 * begin;
      if (end - begin == kTile)
        collect(group, places, kColumns, out, stride);
      else
        collect(group, places, static_cast<int>(3 * (end - begin)), out, stride);
    }
  }
}

// --- backward ---

// grads (kCount features) += columns x place_grads
template <int kAcross, int kCount, class T>
FASTHYP_INLINE void gather_features(const std::int32_t* rows, const T* columns,
                                    const T* place_grads, T* grads) {
  constexpr int L = kGroup<T>;
  Vec<T> acc[kCount][kAcross];
#pragma GCC unroll 24
  for (int k = 0; k < kCount; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < kAcross; ++v) acc[k][v] = load(grads + rows[k] * L + v * kLanes<T>);
  for (int c = 0; c < kColumns; ++c) {
    Vec<T> x[kAcross];
#pragma GCC unroll 2
    for (int v = 0; v < kAcross; ++v) x[v] = load(place_grads + c * L + v * kLanes<T>);
#pragma GCC unroll 24
    for (int k = 0; k < kCount; ++k) {
      const Vec<T> w = splat<T>(columns[k * kColumns + c]);
#pragma GCC unroll 2
      for (int v = 0; v < kAcross; ++v) acc[k][v] = fma(w, x[v], acc[k][v]);
    }
  }
#pragma GCC unroll 24
  for (int k = 0; k < kCount; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < kAcross; ++v) store(grads + rows[k] * L + v * kLanes<T>, acc[k][v]);
}

// For the features of a tile.
template <int kAcross, class T>
void gather_tile(const Rows<T>& r, const T* place_grads, T* grads) {
  constexpr int kCount = kRegisters / kAcross;
  int k = 0;
  for (; k + kCount <= r.count; k += kCount)
    gather_features<kAcross, kCount>(r.features + k, r.columns + k * kColumns, place_grads, grads);
  for (; k < r.count; ++k)
    gather_features<kAcross, 1>(r.features + k, r.columns + k * kColumns, place_grads, grads);
}

// One point: from the gradient of its place after the bones to that before them, in place.
template <class T>
FASTHYP_INLINE void move_back(const Group<T>& group, std::int64_t point, int at, const T* place,
                              T* grad, T* bone_grads) {
  constexpr int L = kGroup<T>;
  const Model& model = group.model;
  const T* weights = static_cast<const T*>(model.weights);
  Vec<T> bone[9], by_from[3], by_bone[12], from[3];
  blend_bones<9>(group, point, at, bone);
  load_all<3>(place, from);
  Vec<T>* g = by_bone + 9;
  load_all<3>(grad, g);
  rotate_back<Lanes<T>>(bone, g, by_from);
  store_all<3>(grad, by_from);
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) by_bone[i] = g[i / 3] * from[i % 3];
  for (std::int32_t e = model.starts[point]; e < model.starts[point + 1]; ++e) {
    const Vec<T> turn = splat<T>(weights[2 * e]), shift = splat<T>(weights[2 * e + 1]);
    T* to = bone_grads + 12 * model.bones[e] * L + at;
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i)
      store(to + i * L, fma(by_bone[i], i < 9 ? turn : shift, load(to + i * L)));
  }
}

template <class T>
void points_backward(const Call& call, std::int64_t first_group, int groups,
                     std::int64_t first_tile, std::int64_t tiles, const Memory& memory) {
  constexpr int L = kGroup<T>;
  const Model& model = call.model;
  const T* lift = static_cast<const T*>(model.lift);
  const std::int64_t stride = 3 * model.outputs;
  T* places = static_cast<T*>(memory.work);
  T* by_place = places + kColumns * L;
  T* of_outputs = by_place + kColumns * L;  // where outputs are sums of points
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t begin = (first_tile + t) * kTile;
    const std::int64_t end = std::min(begin + kTile, model.points);
    const Rows<T> r(model, first_tile + t);
    for (int g = 0; g < groups; ++g) {
      const Group<T> group(call, first_group + g, memory.groups);
      const Grads<T> grads(model, g, memory.grads);
      const T* out_grad = static_cast<const T*>(call.out_grad);
      if (model.targets) {
        if (t == 0) {  // one group at a time
          for (int lane = 0; lane < L; ++lane)
            for (std::int64_t i = 0; i < stride; ++i)
              of_outputs[i * L + lane] =
                  lane < group.bodies ? out_grad[(group.first + lane) * stride + i] : T(0);
          for (std::int64_t i = 0; i < stride; ++i)
            for (int v = 0; v < L; v += kLanes<T>) {
              T* to = grads.transl + i % 3 * L + v;
              store(to, fma(splat<T>(lift ? lift[i / 3] : T(1)), load(of_outputs + i * L + v),
                            load(to)));
            }
        }
        for (std::int64_t p = begin; p < end; ++p)
          std::copy_n(of_outputs + static_cast<std::ptrdiff_t>(3) * model.targets[p] * L, 3 * L,
                      by_place + (p - begin) * 3 * L);
      } else {
        const int count = static_cast<int>(3 * (end - begin));
        for (int lane = 0; lane < L; ++lane) {
          const T* from = out_grad + (group.first + lane) * stride + 3 * begin;
          if (lane < group.bodies)
            for (int i = 0; i < count; ++i) by_place[i * L + lane] = from[i];
          else
            for (int i = 0; i < count; ++i) by_place[i * L + lane] = 0;
        }
        for (int i = 0; i < count; ++i)
          for (int v = 0; v < L; v += kLanes<T>) {
            T* to = grads.transl + i % 3 * L + v;
            store(to, fma(splat<T>(lift ? lift[begin + i / 3] : T(1)), load(by_place + i * L + v),
                          load(to)));
          }
      }
      std::fill(by_place + (end - begin) * 3 * L, by_place + kColumns * L, T(0));
      place_points(group, first_tile + t, places);
      for (std::int64_t p = begin; p < end; ++p)
        for (int v = 0; v < group.vectors; ++v) {
          const std::ptrdiff_t at = (p - begin) * 3 * L + v * kLanes<T>;
          move_back(group, p, v * kLanes<T>, places + at, by_place + at, grads.bones);
        }
      if (group.vectors == 1)
        gather_tile<1>(r, by_place, grads.features);
      else
        gather_tile<2>(r, by_place, grads.features);
    }
  }
}

// world: gradients by the rotation (9) and place (3) of each joint; rest: by its place at rest.
template <class T>
void pose_vector_backward(const Group<T>& group, const Grads<T>& grads, T* rest_grads, int at) {
  using V = Vec<T>;
  using O = Lanes<T>;
  constexpr int L = kGroup<T>;
  const Model& model = group.model;
  // From the bones to rotations and places of the joints: translation = place - rotation x rest.
  for (int j = 0; j < model.joints; ++j) {
    V turned[9], place[3], by_turned[9], by_posed[3], by_rest[3];
    T* of_bone = grads.bones + 12 * j * L + at;
    load_all<9>(group.bones + 12 * j * L + at, turned);
    load_all<3>(group.rest + 3 * j * L + at, place);
    load_all<9>(of_bone, by_turned);
    load_all<3>(of_bone + 9 * L, by_posed);
    add_outer<O>(by_posed, place, true, by_turned);
    rotate_back<O>(turned, by_posed, by_rest);
    for (int i = 0; i < 3; ++i) by_rest[i] = -by_rest[i];
    store_all<9>(of_bone, by_turned);
    store_all<3>(rest_grads + 3 * j * L + at, by_rest);
    if (!group.call.joints_grad) continue;
    const T* given = static_cast<const T*>(group.call.joints_grad) + 3 * j;
    for (int i = 0; i < 3; ++i) {
      T direct[kLanes<T>] = {};
      for (int l = 0; l < kLanes<T> && at + l < group.bodies; ++l)
        direct[l] = given[(group.first + at + l) * 3 * model.joints + i];
      const V of_joint = load(direct);
      store(of_bone + (9 + i) * L, by_posed[i] + of_joint);
      T* to = grads.transl + i * L + at;
      store(to, load(to) + of_joint);
    }
  }
  // From each joint to its parent; local rotations take the place of the joint's.
  for (int j = model.joints - 1; j > 0; --j) {
    const int parent = model.parents[j];
    V above[9], local[9], step[3], from[3], by_turned[9], by_posed[3], by_local[9], by_step[3];
    T* of_joint = grads.bones + 12 * j * L + at;
    T* of_parent = grads.bones + 12 * parent * L + at;
    load_all<9>(of_joint, by_turned);
    load_all<3>(of_joint + 9 * L, by_posed);
    load_all<9>(group.bones + 12 * parent * L + at, above);
    load_all<9>(group.local + 9 * j * L + at, local);
    load_all<3>(group.rest + 3 * j * L + at, step);
    load_all<3>(group.rest + 3 * parent * L + at, from);
    for (int i = 0; i < 3; ++i) step[i] = step[i] - from[i];
    multiply_back<O>(above, by_turned, by_local);
    rotate_back<O>(above, by_posed, by_step);
    if (model.pose_blend) {
      const T* of_features = grads.features + (model.shapes + 9 * (j - 1)) * L + at;
      for (int i = 0; i < 9; ++i) by_local[i] = by_local[i] + load(of_features + i * L);
    }
    store_all<9>(of_joint, by_local);
    V sum[9], moved[3];
    load_all<9>(of_parent, sum);
    add_multiply_turned<O>(by_turned, local, sum);
    add_outer<O>(by_posed, step, false, sum);
    store_all<9>(of_parent, sum);
    load_all<3>(of_parent + 9 * L, moved);
    for (int i = 0; i < 3; ++i) moved[i] = moved[i] + by_posed[i];
    store_all<3>(of_parent + 9 * L, moved);
    for (int i = 0; i < 3; ++i) {
      T* mine = rest_grads + (3 * j + i) * L + at;
      T* above_me = rest_grads + (3 * parent + i) * L + at;
      store(mine, load(mine) + by_step[i]);
      store(above_me, load(above_me) - by_step[i]);
    }
  }
  for (int i = 0; i < 3; ++i) {
    T* mine = rest_grads + i * L + at;
    store(mine, load(mine) + load(grads.bones + (9 + i) * L + at));
  }
  // From the joints at rest to the shape.
  const T* shapes = static_cast<const T*>(model.rest_shapes);
  for (int s = 0; s < model.shapes; ++s) {
    T* to = grads.features + s * L + at;
    V sum = O::of(0);
    for (std::ptrdiff_t i = 0; i < 3 * model.joints; ++i)
      sum = O::fma(splat<T>(shapes[i * model.shapes + s]), load(rest_grads + i * L + at), sum);
    store(to, load(to) + sum);
  }
}

template <class T>
void pose_backward(const Call& call, std::int64_t index, const Memory& memory) {
  constexpr int L = kGroup<T>;
  const Model& model = call.model;
  const Group<T> group(call, index, memory.groups);
  const Grads<T> grads(model, 0, memory.grads);
  T* work = static_cast<T*>(memory.work);
  T* rest_grads = work + 3 * kColumns * L + (model.targets ? 3 * model.outputs * L : 0);
  for (int v = 0; v < group.vectors; ++v)
    pose_vector_backward(group, grads, rest_grads, v * kLanes<T>);
  if (call.betas_grad)
    collect(group, grads.features, model.shapes,
            static_cast<T*>(call.betas_grad) + group.first * model.shapes,
            static_cast<std::int64_t>(model.shapes));
  if (call.transl_grad)
    collect(group, grads.transl, 3, static_cast<T*>(call.transl_grad) + group.first * 3, 3);
  if (!call.pose_grad) return;
  const int numbers = numbers_of(call.rotation);
  const std::int64_t stride = static_cast<std::int64_t>(model.joints) * numbers;
  T* out = static_cast<T*>(call.pose_grad) + group.first * stride;
  for (int j = 0; j < model.joints; ++j, out += numbers) {
    const T* by_local = grads.bones + 12 * j * L;
    if (call.rotation == Rotation::matrix) {
      collect(group, by_local, 9, out, stride);
      continue;
    }
    spread(group, static_cast<const T*>(call.pose) + static_cast<std::ptrdiff_t>(j) * numbers,
           call.pose_stride, numbers, work);
    for (int v = 0; v < group.vectors; ++v) {
      T* given = work + v * kLanes<T>;
      Vec<T> x[9] = {}, g[9], by[9] = {};
      load_all<9>(by_local + v * kLanes<T>, g);
      if (numbers == 3) {
        load_all<3>(given, x);
        to_matrix_backward<Lanes<T>>(call.rotation, x, g, by);
        store_all<3>(given, by);
      } else {
        load_all<6>(given, x);
        to_matrix_backward<Lanes<T>>(call.rotation, x, g, by);
        store_all<6>(given, by);
      }
    }
    collect(group, work, numbers, out, stride);
  }
}

template <class T>
constexpr Functions kFunctions = {kGroup<T>, pose<T>, points<T>, points_backward<T>,
                                  pose_backward<T>};

}  // namespace

extern const skinning::Kernels skinning_kernels;
const skinning::Kernels skinning_kernels = {kFunctions<float>, kFunctions<double>};

}  // namespace fasthyp::FASTHYP_SIMD
