// Points in the body at rest and moved by the bones, and back. For cpu_kernels.cpp alone, which is
// compiled once per SIMD level.
#pragma once

#include <algorithm>

#include "skinning/cpu_bodies.h"
#include "skinning/cpu_few_bodies.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

constexpr int kRegisters = FASTHYP_SIMD_BYTES == 64 ? 24 : 12;  // for sums
constexpr int kChunk = 128;  // features that are multiplied while they stay in the first cache

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

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
