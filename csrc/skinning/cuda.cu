// A lane of a warp holds a body; 32 bodies are a group, with the memory that GroupSizes says.
//
// One kernel poses the bones of a group. A second one places and moves the points: a warp does a
// tile of them, with its columns read by all lanes at once. Points that are summed up into outputs
// lie in the workspace until a third kernel adds them, in their order.
#include <algorithm>
#include <cmath>
#include <string>

#include "common/cuda_device.h"
#include "common/simt.h"
#include "skinning/math.h"
#include "skinning/skinning.h"

namespace fasthyp::skinning {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
template <class T>  // of blocks that place points, each with a tile in shared memory
constexpr int kTileWarps = sizeof(T) == 4 ? 8 : 4;

template <class T>
struct One {
  using Number = T;
  static FASTHYP_HD T of(double v) { return static_cast<T>(v); }
  static FASTHYP_HD T fma(T a, T b, T c) { return std::fma(a, b, c); }
  static FASTHYP_HD T sqrt(T v) { return std::sqrt(v); }
  static FASTHYP_HD T where_positive(T test, T yes, T no) { return test > 0 ? yes : no; }
  static FASTHYP_HD void sincos(T x, T& s, T& c) {
    s = std::sin(x);
    c = std::cos(x);
  }
};

template <class T>
struct Wide;
template <>
struct Wide<float> {
  using type = float4;
  static __device__ __forceinline__ void read(const float* from, float* to) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
  }
};
template <>
struct Wide<double> {
  using type = double2;
  static __device__ __forceinline__ void read(const double* from, double* to) {
    const double2 v = *reinterpret_cast<const double2*>(from);
    to[0] = v.x;
    to[1] = v.y;
  }
};

template <int kCount, class T>
__device__ __forceinline__ void load_all(const T* from, T* to) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = from[i * kWarp];
}
template <int kCount, class T>
__device__ __forceinline__ void store_all(T* to, const T* from) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i * kWarp] = from[i];
}

// What belongs to a group, at this thread's lane.
template <class T>
struct Group {
  T *features, *bones, *local, *rest, *posed, *transl;
  std::int64_t body;  // of a lane without one the last
  bool exists;

  __device__ Group(const Call& call, std::int64_t group, void* workspace) {
    const GroupSizes sizes(call.model);
    const int lane = threadIdx.x % kWarp;
    T* p = static_cast<T*>(workspace) + group * sizes.total * kWarp + lane;
    features = p + sizes.features * kWarp;
    bones = p + sizes.bones * kWarp;
    local = p + sizes.local * kWarp;
    rest = p + sizes.rest * kWarp;
    posed = p + sizes.posed * kWarp;
    transl = p + sizes.transl * kWarp;
    body = group * kWarp + lane;
    exists = body < call.bodies;
    if (!exists) body = call.bodies - 1;
  }
};

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    pose_kernel(const __grid_constant__ Call call, void* workspace, std::int64_t first) {
  using O = One<T>;
  const Model& model = call.model;
  const Group<T> group(call, first + blockIdx.x, workspace);
  const int warp = threadIdx.x / kWarp;
  const T* betas = static_cast<const T*>(call.betas) + group.body * call.betas_stride;
  for (int s = warp; s < model.shapes; s += kWarps) group.features[s * kWarp] = betas[s];
  if (warp < 3)
    group.transl[warp * kWarp] =
        call.transl ? static_cast<const T*>(call.transl)[group.body * call.transl_stride + warp]
                    : T(0);
  const int numbers = numbers_of(call.rotation);
  for (int j = warp; j < model.joints; j += kWarps) {
    const T* given = static_cast<const T*>(call.pose) + group.body * call.pose_stride + j * numbers;
    T x[9] = {}, local[9];
#pragma unroll
    for (int i = 0; i < 9; ++i)
      if (i < numbers) x[i] = given[i];
    to_matrix<O>(call.rotation, x, local);
    store_all<9>(group.local + 9 * j * kWarp, local);
    if (model.pose_blend && j > 0) {
      T* features = group.features + (model.shapes + 9 * (j - 1)) * kWarp;
#pragma unroll
      for (int i = 0; i < 9; ++i) features[i * kWarp] = i % 4 ? local[i] : local[i] - T(1);
    }
    for (int i = 3 * j; i < 3 * j + 3; ++i) {
      const T* row =
          static_cast<const T*>(model.rest_shapes) + static_cast<std::int64_t>(i) * model.shapes;
      T sum = 0;
      for (int s = 0; s < model.shapes; ++s) sum = O::fma(row[s], betas[s], sum);
      group.rest[i * kWarp] = sum + static_cast<const T*>(model.rest)[i];
    }
  }
  __syncthreads();

  if (warp == 0)
    for (int j = 0; j < model.joints; ++j) {
      T local[9], turned[9], place[3], posed[3], bone[3];
      load_all<9>(group.local + 9 * j * kWarp, local);
      load_all<3>(group.rest + 3 * j * kWarp, place);
      if (j == 0) {
#pragma unroll
        for (int i = 0; i < 9; ++i) turned[i] = local[i];
#pragma unroll
        for (int i = 0; i < 3; ++i) posed[i] = place[i];
      } else {
        const int parent = model.parents[j];
        T above[9], step[3], origin[3];
        load_all<9>(group.bones + 12 * parent * kWarp, above);
        load_all<3>(group.rest + 3 * parent * kWarp, step);
        load_all<3>(group.posed + 3 * parent * kWarp, origin);
#pragma unroll
        for (int i = 0; i < 3; ++i) step[i] = place[i] - step[i];
        multiply<O>(above, local, turned);
        rotate<O>(above, step, origin, posed);
      }
      const T zero[3] = {};
      rotate<O>(turned, place, zero, bone);
#pragma unroll
      for (int i = 0; i < 3; ++i) bone[i] = posed[i] - bone[i];
      store_all<9>(group.bones + 12 * j * kWarp, turned);
      store_all<3>(group.bones + (12 * j + 9) * kWarp, bone);
      store_all<3>(group.posed + 3 * j * kWarp, posed);
    }
  __syncthreads();

  if (!call.joints || !group.exists) return;
  T* out = static_cast<T*>(call.joints) + group.body * 3 * model.joints;
  for (int i = warp; i < 3 * model.joints; i += kWarps)
    out[i] = group.posed[i * kWarp] + group.transl[i % 3 * kWarp];
}

// Where the points of a tile are before the bones move them.
template <class T>
__device__ __forceinline__ void place_points(const Group<T>& group, const Model& model,
                                             std::int64_t tile, T (&sums)[kColumns]) {
  constexpr int kStep = sizeof(typename Wide<T>::type) / sizeof(T);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) sums[c] = 0;
  const T* columns = static_cast<const T*>(model.columns);
  for (std::int64_t k = model.row_starts[tile]; k < model.row_starts[tile + 1]; ++k) {
    const T feature = group.features[model.rows[k] * kWarp];
    T w[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; c += kStep) Wide<T>::read(columns + k * kColumns + c, w + c);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[c] = One<T>::fma(w[c], feature, sums[c]);
  }
  const T* base = static_cast<const T*>(model.base) + tile * kColumns;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) sums[c] += base[c];
}

// moved: (groups, points, 3, lanes), where outputs are sums of points.
template <class T>
__global__ void __launch_bounds__(kTileWarps<T>* kWarp)
    points_kernel(const __grid_constant__ Call call, void* workspace, T* moved,
                  std::int64_t first) {
  __shared__ T places[kTileWarps<T>][kColumns][kWarp + 1];
  using O = One<T>;
  const Model& model = call.model;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t tiles = model.tiles(), blocks = (tiles + kTileWarps<T> - 1) / kTileWarps<T>;
  const std::int64_t index = first + blockIdx.x;
  const std::int64_t number = index / blocks, tile = index % blocks * kTileWarps<T> + warp;
  if (tile >= tiles) return;
  const Group<T> group(call, number, workspace);

  T sums[kColumns];
  place_points(group, model, tile, sums);
  const T* weights = static_cast<const T*>(model.weights);
  const T* lift = static_cast<const T*>(model.lift);
  const std::int64_t begin = tile * kTile;
  const std::int64_t left = model.points - begin, bodies_left = call.bodies - number * kWarp;
  const int count = static_cast<int>(left < kTile ? left : kTile);
#pragma unroll
  for (int p = 0; p < kTile; ++p) {
    if (p >= count) continue;
    T bone[12] = {}, from[3], to[3];
    for (std::int32_t e = model.starts[begin + p]; e < model.starts[begin + p + 1]; ++e) {
      const T* source = group.bones + 12 * model.bones[e] * kWarp;
      const T turn = weights[2 * e], shift = weights[2 * e + 1];
#pragma unroll
      for (int i = 0; i < 12; ++i)
        bone[i] = O::fma(source[i * kWarp], i < 9 ? turn : shift, bone[i]);
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) from[i] = sums[3 * p + i];
    rotate<O>(bone, from, bone + 9, to);
    if (moved) {
      T* out = moved + ((number * model.points + begin + p) * 3) * kWarp + lane;
      store_all<3>(out, to);
    } else {
      const T times = lift ? lift[begin + p] : T(1);
#pragma unroll
      for (int i = 0; i < 3; ++i)
        places[warp][3 * p + i][lane] = O::fma(times, group.transl[i * kWarp], to[i]);
    }
  }
  if (moved) return;
  __syncwarp();
  // Lanes write numbers that lie side by side.
  const std::int64_t body = number * kWarp;
  const int bodies = static_cast<int>(bodies_left < kWarp ? bodies_left : kWarp);
  T* out = static_cast<T*>(call.out) + body * 3 * model.outputs + 3 * begin;
  for (int i = lane; i < bodies * 3 * count; i += kWarp) {
    const int b = i / (3 * count), c = i % (3 * count);
    out[b * 3 * model.outputs + c] = places[warp][c][b];
  }
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    sum_kernel(const __grid_constant__ Call call, void* workspace, const T* moved,
               std::int64_t first) {
  const Model& model = call.model;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t index = first * kWarps + blockIdx.x * kWarps + threadIdx.x / kWarp;
  const std::int64_t number = index / model.outputs, output = index % model.outputs;
  if (number * kWarp >= call.bodies) return;
  const Group<T> group(call, number, workspace);
  std::int64_t at = 0;  // the first point of this output
  for (std::int64_t size = model.points; size > 0;) {
    const std::int64_t half = size / 2;
    const bool before = model.targets[at + half] < output;
    at += before ? half + 1 : 0;
    size = before ? size - half - 1 : half;
  }
  const T* lift = static_cast<const T*>(model.lift);
  const T times = lift ? lift[output] : T(1);
  T sum[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) sum[i] = group.transl[i * kWarp] * times;
  for (; at < model.points && model.targets[at] == output; ++at) {
    const T* from = moved + (number * model.points + at) * 3 * kWarp + lane;
#pragma unroll
    for (int i = 0; i < 3; ++i) sum[i] += from[i * kWarp];
  }
  if (!group.exists) return;
  const std::int64_t place = group.body * model.outputs + output;
  T* out = static_cast<T*>(call.out) + place * 3;
#pragma unroll
  for (int i = 0; i < 3; ++i) out[i] = sum[i];
  if (call.projected)
    project<One<T>>(call.camera_numbers,
                    static_cast<const T*>(call.camera) + group.body * call.camera_stride, sum,
                    static_cast<T*>(call.projected) + place * 2);
}

// --- backward ---

// A warp for each body. out_grad (bodies, outputs, 3): with what comes through the projection.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    project_backward_kernel(const __grid_constant__ Call call, T* out_grad, std::int64_t first) {
  constexpr unsigned kAllLanes = 0xffffffff;
  const std::int64_t body = (first + blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (body >= call.bodies) return;
  const int lane = threadIdx.x % kWarp;
  const T* given = static_cast<const T*>(call.camera) + body * call.camera_stride;
  T camera[kPerspective] = {}, by_camera[kPerspective] = {};
#pragma unroll
  for (int i = 0; i < kPerspective; ++i)
    if (i < call.camera_numbers) camera[i] = given[i];
  for (std::int64_t o = lane; o < call.model.outputs; o += kWarp) {
    const std::int64_t place = body * call.model.outputs + o;
    const T* from = static_cast<const T*>(call.out) + place * 3;
    const T* by_projected = static_cast<const T*>(call.projected_grad) + place * 2;
    T by_point[3] = {};
    if (call.out_grad)
#pragma unroll
      for (int i = 0; i < 3; ++i) by_point[i] = static_cast<const T*>(call.out_grad)[place * 3 + i];
    project_backward<One<T>>(call.camera_numbers, camera, from, by_projected, by_point, by_camera);
#pragma unroll
    for (int i = 0; i < 3; ++i) out_grad[place * 3 + i] = by_point[i];
  }
#pragma unroll
  for (int i = 0; i < kPerspective; ++i) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      by_camera[i] += __shfl_xor_sync(kAllLanes, by_camera[i], offset);
    if (lane == 0 && i < call.camera_numbers && call.camera_grad)
      static_cast<T*>(call.camera_grad)[body * call.camera_numbers + i] = by_camera[i];
  }
}

constexpr std::int64_t kPart = 32;  // tiles whose gradients a warp adds up

// Parts of the tiles; at least one, which then is zero.
FASTHYP_HD std::int64_t parts_of(const Model& model) {
  const std::int64_t parts = (model.tiles() + kPart - 1) / kPart;
  return parts > 0 ? parts : 1;
}

// The gradients of a group by its features, bones and translation, at this thread's lane.
template <class T>
struct Grads {
  T *features, *bones, *transl;
  __device__ Grads(const Model& model, std::int64_t place, T* memory) {
    const GradSizes sizes(model);
    T* p = memory + place * sizes.total * kWarp + threadIdx.x % kWarp;
    features = p + sizes.features * kWarp;
    bones = p + sizes.bones * kWarp;
    transl = p + sizes.transl * kWarp;
  }
};

// parts: gradients by the tiles of each part, (groups, parts, GradSizes, lanes).
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    points_backward_kernel(const __grid_constant__ Call call, void* workspace, T* parts,
                           std::int64_t first) {
  using O = One<T>;
  const Model& model = call.model;
  const std::int64_t index = first * kWarps + blockIdx.x * kWarps + threadIdx.x / kWarp;
  const std::int64_t count = parts_of(model), number = index / count;
  if (number * kWarp >= call.bodies) return;
  const Group<T> group(call, number, workspace);
  const Grads<T> grads(model, index, parts);
  const int total = GradSizes(model).total;
  for (int i = 0; i < total; ++i) grads.features[i * kWarp] = 0;
  if (!call.out_grad) return;
  const T* weights = static_cast<const T*>(model.weights);
  const T* lift = static_cast<const T*>(model.lift);
  const T* given = static_cast<const T*>(call.out_grad) + group.body * 3 * model.outputs;
  const std::int64_t end = (index % count + 1) * kPart;
  T transl[3] = {};
  for (std::int64_t tile = index % count * kPart; tile < end && tile < model.tiles(); ++tile) {
    T places[kColumns];
    place_points(group, model, tile, places);
#pragma unroll
    for (int p = 0; p < kTile; ++p) {
      const std::int64_t point = tile * kTile + p;
      if (point >= model.points) {
#pragma unroll
        for (int i = 0; i < 3; ++i) places[3 * p + i] = 0;
        continue;
      }
      const std::int64_t output = model.targets ? model.targets[point] : point;
      T g[3], bone[9] = {}, outer[9], by_place[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        g[i] = group.exists ? given[3 * output + i] : T(0);
        if (!model.targets) transl[i] = O::fma(lift ? lift[output] : T(1), g[i], transl[i]);
#pragma unroll
        for (int k = 0; k < 3; ++k) outer[3 * i + k] = g[i] * places[3 * p + k];
      }
      for (std::int32_t e = model.starts[point]; e < model.starts[point + 1]; ++e) {
        const T* source = group.bones + 12 * model.bones[e] * kWarp;
        T* to = grads.bones + 12 * model.bones[e] * kWarp;
        const T turn = weights[2 * e], shift = weights[2 * e + 1];
#pragma unroll
        for (int i = 0; i < 9; ++i) {
          bone[i] = O::fma(source[i * kWarp], turn, bone[i]);
          to[i * kWarp] = O::fma(outer[i], turn, to[i * kWarp]);
        }
#pragma unroll
        for (int i = 0; i < 3; ++i) to[(9 + i) * kWarp] = O::fma(g[i], shift, to[(9 + i) * kWarp]);
      }
      rotate_back<O>(bone, g, by_place);
#pragma unroll
      for (int i = 0; i < 3; ++i) places[3 * p + i] = by_place[i];
    }
    constexpr int kStep = sizeof(typename Wide<T>::type) / sizeof(T);
    const T* columns = static_cast<const T*>(model.columns);
    for (std::int64_t k = model.row_starts[tile]; k < model.row_starts[tile + 1]; ++k) {
      T w[kColumns], sum = 0;
#pragma unroll
      for (int c = 0; c < kColumns; c += kStep) Wide<T>::read(columns + k * kColumns + c, w + c);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum = O::fma(w[c], places[c], sum);
      grads.features[model.rows[k] * kWarp] += sum;
    }
  }
  store_all<3>(grads.transl, transl);
}

// Adds the parts of each group to its first one, always in the same order.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    add_parts_kernel(const __grid_constant__ Call call, T* parts, std::int64_t groups,
                     std::int64_t first) {
  const std::int64_t size = std::int64_t{GradSizes(call.model).total} * kWarp;
  const std::int64_t count = parts_of(call.model);
  const std::int64_t index = (first + blockIdx.x) * kWarps * kWarp + threadIdx.x;
  if (index >= groups * size) return;
  T* sum = parts + index / size * count * size + index % size;
  T total = sum[0];
  for (std::int64_t p = 1; p < count; ++p) total += sum[p * size];
  sum[0] = total;
}

// One block for each group: from its bones and features to its inputs.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    pose_backward_kernel(const __grid_constant__ Call call, void* workspace, T* parts,
                         std::int64_t first) {
  using O = One<T>;
  const Model& model = call.model;
  const std::int64_t number = first + blockIdx.x;
  const Group<T> group(call, number, workspace);
  const Grads<T> grads(model, number * parts_of(model), parts);
  T* rest_grads = group.posed;  // has been read
  const int warp = threadIdx.x / kWarp;
  const T* joints_grad =
      call.joints_grad && group.exists
          ? static_cast<const T*>(call.joints_grad) + group.body * 3 * model.joints
          : nullptr;
  for (int j = warp; j < model.joints; j += kWarps) {
    T turned[9], place[3], by_turned[9], by_posed[3], by_rest[3];
    T* of_bone = grads.bones + 12 * j * kWarp;
    load_all<9>(group.bones + 12 * j * kWarp, turned);
    load_all<3>(group.rest + 3 * j * kWarp, place);
    load_all<9>(of_bone, by_turned);
    load_all<3>(of_bone + 9 * kWarp, by_posed);
    add_outer<O>(by_posed, place, true, by_turned);
    rotate_back<O>(turned, by_posed, by_rest);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      by_rest[i] = -by_rest[i];
      if (joints_grad) by_posed[i] += joints_grad[3 * j + i];
    }
    store_all<9>(of_bone, by_turned);
    store_all<3>(of_bone + 9 * kWarp, by_posed);
    store_all<3>(rest_grads + 3 * j * kWarp, by_rest);
  }
  __syncthreads();

  if (warp == 0) {
    for (int j = model.joints - 1; j > 0; --j) {
      const int parent = model.parents[j];
      T above[9], local[9], step[3], from[3], by_turned[9], by_posed[3], by_local[9], by_step[3];
      T* of_joint = grads.bones + 12 * j * kWarp;
      T* of_parent = grads.bones + 12 * parent * kWarp;
      load_all<9>(of_joint, by_turned);
      load_all<3>(of_joint + 9 * kWarp, by_posed);
      load_all<9>(group.bones + 12 * parent * kWarp, above);
      load_all<9>(group.local + 9 * j * kWarp, local);
      load_all<3>(group.rest + 3 * j * kWarp, step);
      load_all<3>(group.rest + 3 * parent * kWarp, from);
#pragma unroll
      for (int i = 0; i < 3; ++i) step[i] -= from[i];
      multiply_back<O>(above, by_turned, by_local);
      rotate_back<O>(above, by_posed, by_step);
      if (model.pose_blend) {
        const T* of_features = grads.features + (model.shapes + 9 * (j - 1)) * kWarp;
#pragma unroll
        for (int i = 0; i < 9; ++i) by_local[i] += of_features[i * kWarp];
      }
      store_all<9>(of_joint, by_local);
      T sum[9];
      load_all<9>(of_parent, sum);
      add_multiply_turned<O>(by_turned, local, sum);
      add_outer<O>(by_posed, step, false, sum);
      store_all<9>(of_parent, sum);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        of_parent[(9 + i) * kWarp] += by_posed[i];
        rest_grads[(3 * j + i) * kWarp] += by_step[i];
        rest_grads[(3 * parent + i) * kWarp] -= by_step[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) rest_grads[i * kWarp] += grads.bones[(9 + i) * kWarp];
  }
  __syncthreads();

  if (!group.exists) return;
  if (call.betas_grad) {
    const T* shapes = static_cast<const T*>(model.rest_shapes);
    T* out = static_cast<T*>(call.betas_grad) + group.body * model.shapes;
    for (int s = warp; s < model.shapes; s += kWarps) {
      T sum = 0;
      for (int i = 0; i < 3 * model.joints; ++i)
        sum = O::fma(shapes[static_cast<std::int64_t>(i) * model.shapes + s], rest_grads[i * kWarp],
                     sum);
      out[s] = grads.features[s * kWarp] + sum;
    }
  }
  if (call.transl_grad && warp < 3) {
    T sum = grads.transl[warp * kWarp];
    if (model.targets && call.out_grad) {
      const T* lift = static_cast<const T*>(model.lift);
      const T* given = static_cast<const T*>(call.out_grad) + group.body * 3 * model.outputs;
      for (std::int64_t o = 0; o < model.outputs; ++o)
        sum = O::fma(lift ? lift[o] : T(1), given[3 * o + warp], sum);
    }
    if (joints_grad)
      for (int j = 0; j < model.joints; ++j) sum += joints_grad[3 * j + warp];
    static_cast<T*>(call.transl_grad)[group.body * 3 + warp] = sum;
  }
  if (!call.pose_grad) return;
  const int numbers = numbers_of(call.rotation);
  for (int j = warp; j < model.joints; j += kWarps) {
    const T* given = static_cast<const T*>(call.pose) + group.body * call.pose_stride + j * numbers;
    T* out = static_cast<T*>(call.pose_grad) + (group.body * model.joints + j) * numbers;
    T x[9] = {}, g[9], by[9] = {};
#pragma unroll
    for (int i = 0; i < 9; ++i)
      if (i < numbers) x[i] = given[i];
    load_all<9>(grads.bones + 12 * j * kWarp, g);
    to_matrix_backward<O>(call.rotation, x, g, by);
#pragma unroll
    for (int i = 0; i < 9; ++i)
      if (i < numbers) out[i] = by[i];
  }
}

// --- launches ---

std::int64_t groups_of(std::int64_t bodies) { return (bodies + kWarp - 1) / kWarp; }

template <class T>
struct Launches {
  cudaLaunchConfig_t config{};
  cudaError_t error = cudaSuccess;

  // kernel(arguments..., first) on so many blocks, first being the number of those before.
  template <class Kernel, class... Arguments>
  void run(std::int64_t blocks, Kernel kernel, const Arguments&... arguments) {
    constexpr std::int64_t kMost = 0x7fffffff;
    for (std::int64_t first = 0; first < blocks && error == cudaSuccess; first += kMost) {
      config.gridDim = dim3(static_cast<unsigned>(std::min(blocks - first, kMost)));
      error = cudaLaunchKernelEx(&config, kernel, arguments..., first);
    }
  }
};

template <class T>
cudaError_t launch(const Call& call, std::byte* workspace, cudaStream_t stream) {
  const Model& model = call.model;
  const std::int64_t groups = groups_of(call.bodies);
  void* memory = workspace;
  Launches<T> launches;
  launches.config.blockDim = dim3(kWarps * kWarp);
  launches.config.stream = stream;
  launches.run(groups, pose_kernel<T>, call, memory);
  if (!call.out) return launches.error;
  T* moved =
      model.targets ? static_cast<T*>(memory) + groups * GroupSizes(model).total * kWarp : nullptr;
  const std::int64_t blocks = (model.tiles() + kTileWarps<T> - 1) / kTileWarps<T>;
  launches.config.blockDim = dim3(kTileWarps<T> * kWarp);
  launches.run(groups * blocks, points_kernel<T>, call, memory, moved);
  if (moved) {
    const T* found = moved;
    launches.config.blockDim = dim3(kWarps * kWarp);
    launches.run((groups * model.outputs + kWarps - 1) / kWarps, sum_kernel<T>, call, memory,
                 found);
  }
  return launches.error;
}

template <class T>
cudaError_t launch_backward(const Call& given, std::byte* workspace, cudaStream_t stream) {
  Call call = given;
  call.joints = nullptr;
  const std::int64_t groups = groups_of(call.bodies), parts = parts_of(call.model);
  const std::int64_t grads = std::int64_t{GradSizes(call.model).total} * kWarp;
  void* memory = workspace;
  T* found = static_cast<T*>(memory) + groups * GroupSizes(call.model).total * kWarp;
  Launches<T> launches;
  launches.config.blockDim = dim3(kWarps * kWarp);
  launches.config.stream = stream;
  if (given.projected_grad) {
    T* out_grad = found + groups * parts * grads;
    launches.run((given.bodies + kWarps - 1) / kWarps, project_backward_kernel<T>, given, out_grad);
    call.out_grad = out_grad;
  }
  launches.run(groups, pose_kernel<T>, call, memory);
  launches.run((groups * parts + kWarps - 1) / kWarps, points_backward_kernel<T>, call, memory,
               found);
  if (parts > 1)
    launches.run((groups * grads + kWarps * kWarp - 1) / (kWarps * kWarp), add_parts_kernel<T>,
                 call, found, groups);
  launches.run(groups, pose_backward_kernel<T>, call, memory, found);
  return launches.error;
}

std::string described(const Call& call) {
  return "skinning of " + std::to_string(call.bodies) + " bodies of " +
         std::to_string(call.model.points) + " points";
}

}  // namespace

std::int64_t workspace_bytes_cuda(const Model& model, std::int64_t bodies, bool backward,
                                  bool projected) {
  std::int64_t more = 0;
  if (backward)
    more = parts_of(model) * GradSizes(model).total + (projected ? 3 * model.outputs : 0);
  else if (model.targets)
    more = 3 * model.points;
  return groups_of(bodies) * (GroupSizes(model).total + more) * kWarp * (model.is_double ? 8 : 4);
}

void forward_cuda(const Call& call, std::byte* workspace, int device, void* stream) {
  if (call.bodies == 0) return;
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const auto run = call.model.is_double ? launch<double> : launch<float>;
  check_cuda(run(call, workspace, on), described(call), device);
}

void backward_cuda(const Call& call, std::byte* workspace, int device, void* stream) {
  if (call.bodies == 0) return;
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const auto run = call.model.is_double ? launch_backward<double> : launch_backward<float>;
  check_cuda(run(call, workspace, on), described(call) + ", backward", device);
}

}  // namespace fasthyp::skinning
