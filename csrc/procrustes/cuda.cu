// A group of threads of one warp aligns one pose, in double as on the CPU: each sums up some of the
// joints, all of them find the same rotation. One thread for poses of a skeleton, whose rotation is
// most of the work; a warp for meshes.
#include <algorithm>
#include <string>

#include "common/cuda_device.h"
#include "common/simt.h"
#include "procrustes/math.h"
#include "procrustes/procrustes.h"

namespace fasthyp::procrustes {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kMesh = 128;  // joints from which a warp takes a pose
constexpr unsigned kAllLanes = 0xffffffffu;

struct Thread {
  using Value = double;
  static __device__ double splat(double v) { return v; }
  static __device__ double select(bool mask, double yes, double no) { return mask ? yes : no; }
  static __device__ double fma(double a, double b, double c) { return ::fma(a, b, c); }
  static __device__ double sqrt(double v) { return ::sqrt(v); }
  static __device__ double abs(double v) { return ::fabs(v); }
  static __device__ bool any(bool mask) { return mask; }
};

template <int kGroup>
__device__ double group_sum(double v) {
  for (int offset = kGroup / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

template <class T>
__device__ const T* row_of(const Rows& rows, std::int64_t pose, std::int64_t width) {
  return static_cast<const T*>(rows.data) + pose / rows.inner % rows.count * width;
}

// The joints of one pose.
template <class T>
struct Pose {
  const T *source, *target;
  const bool* mask;
  double source_mean[3], target_mean[3];

  __device__ bool counts(int j) const { return !mask || mask[j]; }
  __device__ void centred(int j, double (&s)[3], double (&t)[3]) const {
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      s[c] = static_cast<double>(source[3 * j + c]) - source_mean[c];
      t[c] = static_cast<double>(target[3 * j + c]) - target_mean[c];
    }
  }
};

template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads)
    align_kernel(const __grid_constant__ Call call, std::int64_t first) {
  const std::int64_t thread = first + std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  // The threads of a group, and so of a warp with larger groups, leave together.
  const std::int64_t index = thread / kGroup;
  const int lane = static_cast<int>(thread % kGroup), joints = call.joints;
  if (index >= call.poses) return;
  Pose<T> pose{row_of<T>(call.source, index, 3 * joints),
               row_of<T>(call.target, index, 3 * joints),
               call.mask.data ? row_of<bool>(call.mask, index, joints) : nullptr,
               {},
               {}};
  double count = 0;
  for (int j = lane; j < joints; j += kGroup) {
    if (!pose.counts(j)) continue;
    count += 1;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      pose.source_mean[c] += static_cast<double>(pose.source[3 * j + c]);
      pose.target_mean[c] += static_cast<double>(pose.target[3 * j + c]);
    }
  }
  count = group_sum<kGroup>(count);
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    pose.source_mean[c] = group_sum<kGroup>(pose.source_mean[c]) / count;
    pose.target_mean[c] = group_sum<kGroup>(pose.target_mean[c]) / count;
  }

  double products[9] = {}, variance = 0, s[3], t[3];
  for (int j = lane; j < joints; j += kGroup) {
    if (!pose.counts(j)) continue;
    pose.centred(j, s, t);
#pragma unroll
    for (int i = 0; i < 9; ++i) products[i] = fma(t[i / 3], s[i % 3], products[i]);
#pragma unroll
    for (int c = 0; c < 3; ++c) variance = fma(s[c], s[c], variance);
  }
#pragma unroll
  for (int i = 0; i < 9; ++i) products[i] = group_sum<kGroup>(products[i]);
  variance = group_sum<kGroup>(variance);
  products[0] += (pose.source_mean[0] + pose.target_mean[0]) * 0;  // NaN where no joint counts
  const Similarity<Thread> fit(products, variance, count, pose.source_mean, pose.target_mean);
  if (lane == 0) {
    if (call.rotation)
#pragma unroll
      for (int i = 0; i < 9; ++i)
        static_cast<T*>(call.rotation)[index * 9 + i] = static_cast<T>(fit.rotation.matrix[i]);
    if (call.scale) static_cast<T*>(call.scale)[index] = static_cast<T>(fit.scale);
    if (call.translation)
#pragma unroll
      for (int c = 0; c < 3; ++c)
        static_cast<T*>(call.translation)[index * 3 + c] = static_cast<T>(fit.translation[c]);
  }

  const bool gradient = call.grad_source || call.grad_target;
  if (!call.error && !call.distances && !gradient) return;
  double error = 0, outer[9] = {}, pulls[3] = {}, pull[3];
  const auto pull_of = [&](double distance) {
    const double by = distance == 0 ? 0 : 1 / (distance * count);
#pragma unroll
    for (int c = 0; c < 3; ++c) pull[c] *= by;
  };
  for (int j = lane; j < joints; j += kGroup) {
    double distance = 0;
    if (pose.counts(j)) {
      pose.centred(j, s, t);
      distance = fit.distance(s, t, pull);
      error += distance;
      if (gradient) {
        pull_of(distance);
#pragma unroll
        for (int i = 0; i < 9; ++i) outer[i] = fma(pull[i / 3], s[i % 3], outer[i]);
#pragma unroll
        for (int c = 0; c < 3; ++c) pulls[c] += pull[c];
      }
    }
    if (call.distances)
      static_cast<T*>(call.distances)[index * joints + j] = static_cast<T>(distance);
  }
  error = group_sum<kGroup>(error);
  if (call.error && lane == 0) static_cast<T*>(call.error)[index] = static_cast<T>(error / count);
  if (!gradient) return;

#pragma unroll
  for (int i = 0; i < 9; ++i) outer[i] = group_sum<kGroup>(outer[i]);
#pragma unroll
  for (int c = 0; c < 3; ++c) pulls[c] = group_sum<kGroup>(pulls[c]);
  const Gradient<Thread> derivative(fit, outer, pulls, count);
  for (int j = lane; j < joints; j += kGroup) {
    double by_source[3] = {}, by_target[3] = {};
    if (pose.counts(j)) {
      pose.centred(j, s, t);
      pull_of(fit.distance(s, t, pull));
      derivative.joint(fit, s, t, pull, by_source, by_target);
    }
    const std::int64_t at = (index * joints + j) * 3;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      if (call.grad_source)
        static_cast<T*>(call.grad_source)[at + c] = static_cast<T>(by_source[c]);
      if (call.grad_target)
        static_cast<T*>(call.grad_target)[at + c] = static_cast<T>(by_target[c]);
    }
  }
}

template <class T, int kGroup>
cudaError_t launch(const Call& call, cudaStream_t stream) {
  constexpr std::int64_t kMostBlocks = 0x7fffffff;
  const std::int64_t blocks = (call.poses * kGroup + kThreads - 1) / kThreads;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaError_t error = cudaSuccess;
  for (std::int64_t first = 0; first < blocks && error == cudaSuccess; first += kMostBlocks) {
    config.gridDim = dim3(static_cast<unsigned>(std::min(blocks - first, kMostBlocks)));
    error = cudaLaunchKernelEx(&config, align_kernel<T, kGroup>, call, first * kThreads);
  }
  return error;
}

// By the number of joints alone, as the order of the sums depends on it: a pose's result must not
// depend on what else is in its batch.
template <class T>
cudaError_t launch(const Call& call, cudaStream_t stream) {
  return call.joints < kMesh ? launch<T, 1>(call, stream) : launch<T, kWarp>(call, stream);
}

}  // namespace

void align_cuda(const Call& call, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  check_cuda(call.is_double ? launch<double>(call, on) : launch<float>(call, on),
             "procrustes of " + std::to_string(call.poses) + " poses of " +
                 std::to_string(call.joints) + " joints",
             device);
}

}  // namespace fasthyp::procrustes
