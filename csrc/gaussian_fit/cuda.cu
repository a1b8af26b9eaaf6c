// One block fits one map; in double whatever the map's type, as on the CPU.
#include <algorithm>
#include <string>

#include "common/cuda_device.h"
#include "common/simt.h"
#include "gaussian_fit/gaussian_fit.h"
#include "gaussian_fit/math.h"

namespace fasthyp::gaussian_fit {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// What a block shares.
struct Block {
  double partial[kWarps][kMoments];
  double sums[kMoments];
  MapSummary summary[kWarps];
  Initial start;
  Fitter fitter;
  Result result;
  Status status;
  bool measure;  // the residual of fitter.best is wanted
};

__device__ double warp_sum(double v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_down_sync(kAllLanes, v, offset);
  return v;  // in lane 0
}

__device__ void merge(MapSummary& a, const MapSummary& b) {
  if (b.argmax >= 0 &&
      (a.argmax < 0 || b.maximum > a.maximum || (b.maximum == a.maximum && b.argmax < a.argmax))) {
    a.maximum = b.maximum;
    a.argmax = b.argmax;
  }
  a.minimum = b.minimum < a.minimum ? b.minimum : a.minimum;
  a.square_sum += b.square_sum;
  a.finite = a.finite && b.finite;
}

// In block.summary[0], after the caller's barrier.
template <class T>
__device__ void summarise(const T* map, int cells, Block& block) {
  // argmax -1: no finite cell yet
  MapSummary s{0, kInfinity, -1, 0, true};
  for (int i = threadIdx.x; i < cells; i += blockDim.x) {
    const double h = static_cast<double>(map[i]);
    const bool finite = h - h == 0;
    s.finite = s.finite && finite;
    if (finite) {
      if (s.argmax < 0 || h > s.maximum) {
        s.maximum = h;
        s.argmax = i;
      }
      s.minimum = h < s.minimum ? h : s.minimum;
      s.square_sum += h * h;
    }
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    MapSummary other;
    other.maximum = __shfl_down_sync(kAllLanes, s.maximum, offset);
    other.minimum = __shfl_down_sync(kAllLanes, s.minimum, offset);
    other.argmax = __shfl_down_sync(kAllLanes, s.argmax, offset);
    other.square_sum = __shfl_down_sync(kAllLanes, s.square_sum, offset);
    other.finite = __shfl_down_sync(kAllLanes, static_cast<int>(s.finite), offset) != 0;
    merge(s, other);
  }
  if (threadIdx.x % kWarp == 0) block.summary[threadIdx.x / kWarp] = s;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) merge(block.summary[0], block.summary[w]);
    MapSummary& all = block.summary[0];
    all.argmax = all.argmax < 0 ? 0 : all.argmax;
    all.finite = all.finite && all.square_sum - all.square_sum == 0;
  }
}

// The moments of p in block.sums, after the caller's barrier. A warp takes whole rows, a lane
// columns.
template <class T>
__device__ void moments(const Gaussian& p, const T* map, int height, int width, Block& block) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double total[kMoments] = {};
  const Window window(p, height);
  const Cells rows = window.rows;
  for (int y = rows.begin + warp; y < rows.end; y += kWarps) {
    const double dy = y - p.y, v = p.l22 * dy;
    const Cells columns = window.columns(dy, width);
    double s[5] = {}, t[3] = {};
    for (int x = columns.begin + lane; x < columns.end; x += kWarp) {
      const double u = p.l11 * (x - p.x) + p.l21 * dy;
      const double g = exp(-0.5 * (u * u + v * v));
      const double r = p.amplitude * g - static_cast<double>(map[y * width + x]);
      const double gu = g * u, guu = gu * u;
      s[0] += g * g;
      s[1] += g * gu;
      s[2] += gu * gu;
      s[3] += gu * guu;
      s[4] += guu * guu;
      t[0] += g * r;
      t[1] += gu * r;
      t[2] += guu * r;
    }
    double power = 1;
#pragma unroll
    for (int j = 0; j <= 4; ++j, power *= v) {
#pragma unroll
      for (int i = 0; i <= 4 - j; ++i) total[moment_index(i, j, 4)] += s[i] * power;
    }
    power = 1;
#pragma unroll
    for (int j = 0; j <= 2; ++j, power *= v) {
#pragma unroll
      for (int i = 0; i <= 2 - j; ++i) total[kMoments2 + moment_index(i, j, 2)] += t[i] * power;
    }
  }
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    const double sum = warp_sum(total[k]);
    if (lane == 0) block.partial[warp][k] = sum;
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kMoments; k += blockDim.x) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += block.partial[w][k];
    block.sums[k] = sum;
  }
}

// Root mean square residual of p over the whole map, in thread 0.
template <class T>
__device__ double residual(const Gaussian& p, const T* map, int height, int width, Block& block) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Window window(p, height);
  const Cells rows = window.rows;
  double sum = 0;
  for (int y = warp; y < height; y += kWarps) {
    const double dy = y - p.y, v = p.l22 * dy;
    Cells columns{0, 0};
    if (y >= rows.begin && y < rows.end) columns = window.columns(dy, width);
    for (int x = lane; x < width; x += kWarp) {
      double r = static_cast<double>(map[y * width + x]);
      if (x >= columns.begin && x < columns.end) {
        const double u = p.l11 * (x - p.x) + p.l21 * dy;
        r -= p.amplitude * exp(-0.5 * (u * u + v * v));
      }
      sum += r * r;
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) block.partial[warp][0] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += block.partial[w][0];
  return sqrt(sum / (static_cast<double>(height) * width));
}

// Three blocks at least on a multiprocessor: left to itself, the compiler spills registers for a
// fourth.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    fit_kernel(Call call, std::int64_t first, bool cached) {
  __shared__ Block block;
  const int height = call.height, width = call.width, cells = height * width;
  const std::int64_t index = first + blockIdx.x;
  const T* map = static_cast<const T*>(call.heatmaps) + index * cells;
  if (cached) {
    T* copy = dynamic_shared<T>();
    for (int i = threadIdx.x; i < cells; i += blockDim.x) copy[i] = map[i];
    map = copy;  // a thread summarises the cells that it copied; the others see them after that
  }
  summarise(map, cells, block);
  if (threadIdx.x == 0) {
    double init[6] = {};
    for (int i = 0; i < call.init_size; ++i)
      init[i] = static_cast<double>(static_cast<const T*>(call.init)[index * call.init_size + i]);
    const MapSummary& summary = block.summary[0];
    block.start = initial_guess(summary, width, init, call.init_size);
    block.result = unconverged(block.start, 0);
    block.result.rmse = kNaN;
    block.status = Status::failed;
    block.measure = false;
    if (summary.finite && usable(block.start)) {
      block.fitter.begin(gaussian_of(block.start), summary, height, width, call.max_iter, call.tol);
      block.measure = true;
      if (summary.maximum > summary.minimum) block.status = Status::running;
    }
  }
  __syncthreads();
  while (block.status == Status::running) {
    moments(block.fitter.trial, map, height, width, block);
    __syncthreads();
    if (threadIdx.x == 0) {
      block.status = block.fitter.advance(block.sums);
      block.result.iterations = block.fitter.iterations;
      if (block.status == Status::converged)
        block.result = converged(block.fitter.best, block.fitter.iterations);
      else if (block.status == Status::failed)
        block.fitter.best = gaussian_of(block.start);
    }
    __syncthreads();
  }
  if (block.measure) {
    const double rmse = residual(block.fitter.best, map, height, width, block);
    if (threadIdx.x == 0) block.result.rmse = rmse;
  }
  if (threadIdx.x == 0) store_result<T>(call, index, block.result);
}

template <class T>
cudaError_t launch(const Call& call, cudaStream_t stream) {
  // Beyond the shared memory that every block may have, the map is read through the caches.
  constexpr std::size_t kCache = 32 * 1024;
  constexpr std::int64_t kMostBlocks = 0x7fffffff;
  const std::size_t bytes = static_cast<std::size_t>(call.height) * call.width * sizeof(T);
  const bool cached = bytes <= kCache;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = cached ? bytes : 0;
  config.stream = stream;
  cudaError_t error = cudaSuccess;
  for (std::int64_t first = 0; first < call.count && error == cudaSuccess; first += kMostBlocks) {
    config.gridDim = dim3(static_cast<unsigned>(std::min(call.count - first, kMostBlocks)));
    error = cudaLaunchKernelEx(&config, fit_kernel<T>, call, first, cached);
  }
  return error;
}

}  // namespace

void fit_cuda(const Call& call, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  check_cuda(call.is_double ? launch<double>(call, on) : launch<float>(call, on),
             "fit_gaussians of " + std::to_string(call.count) + " maps of " +
                 std::to_string(call.height) + " x " + std::to_string(call.width),
             device);
}

}  // namespace fasthyp::gaussian_fit
