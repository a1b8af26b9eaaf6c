// From shape and pose to features and bones, and back. For cpu_kernels.cpp alone, which is compiled
// once per SIMD level.
#pragma once

#include <algorithm>

#include "skinning/cpu_bodies.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

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

// --- backward ---

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

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
