// One block fits one map; in double whatever the map's type, as on the CPU.
//
// Lanes take rows and warps columns: what a row costs (its part of the window, the powers of v) is
// then paid once per row, and not once per row and lane. Rows lie at an odd distance in shared
// memory, so that the lanes hit different banks.
#include <algorithm>
#include <string>

#include "common/cuda_device.h"
#include "common/simt.h"
#include "gaussian_fit/gaussian_fit.h"
#include "gaussian_fit/math.h"

namespace fasthyp::gaussian_fit {
namespace {

constexpr int kWarp = 32;
constexpr int kMostWarps = 8;
constexpr unsigned kAllLanes = 0xffffffffu;

// What a block shares.
struct Block {
  double partial[kMostWarps][kMoments];
  double sums[kMoments];
  MapSummary summary[kMostWarps];
  Initial start;
  Fitter fitter;
  Result result;
  Status status;
  bool measure;  // the residual of fitter.best is wanted
};

template <class T>
struct Map {
  const T* cells;
  int height, width, stride;
};

// The cells of a window that a thread takes: rows at a distance, and in each of them columns.
template <int kWarps>
struct Share {
  int row, row_step, column, column_step;

  // With few rows, several lanes share a row.
  __device__ explicit Share(int rows) {
    row_step = kWarp;
    while (row_step / 2 >= rows && row_step > 1) row_step /= 2;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    row = lane % row_step;
    column = warp * (kWarp / row_step) + lane / row_step;
    column_step = kWarps * (kWarp / row_step);
  }
};

__device__ double warp_sum(double v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_down_sync(kAllLanes, v, offset);
  return v;  // in lane 0
}

// The sum over the lanes of w[k] in w[0] of lane k: each step halves what a lane still adds up.
template <int kHalf>
__device__ void warp_sums(double (&w)[kWarp]) {
  if constexpr (kHalf > 0) {
    const bool high = (threadIdx.x & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const double keep = high ? w[i + kHalf] : w[i], give = high ? w[i] : w[i + kHalf];
      w[i] = keep + __shfl_xor_sync(kAllLanes, give, kHalf);
    }
    warp_sums<kHalf / 2>(w);
  }
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

// In block.summary[0], after the caller's barrier. Copies the map to `copy` on the way, if not
// null.
template <int kWarps, class T>
__device__ void summarise(const Map<T>& map, T* copy, int stride, Block& block) {
  // argmax -1: no finite cell yet
  MapSummary s{0, kInfinity, -1, 0, true};
  for (int y = threadIdx.x / kWarp; y < map.height; y += kWarps) {
    for (int x = threadIdx.x % kWarp; x < map.width; x += kWarp) {
      const T cell = map.cells[y * map.width + x];
      if (copy) copy[y * stride + x] = cell;
      const double h = static_cast<double>(cell);
      const bool finite = h - h == 0;
      s.finite = s.finite && finite;
      if (finite) {
        if (s.argmax < 0 || h > s.maximum) {
          s.maximum = h;
          s.argmax = y * map.width + x;
        }
        s.minimum = h < s.minimum ? h : s.minimum;
        s.square_sum += h * h;
      }
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

// The moments of p in block.sums, after the caller's barrier.
template <int kWarps, class T>
__device__ void moments(const Gaussian& p, const Map<T>& map, Block& block) {
  double total[kWarp] = {};  // kMoments of them, and zeros
  const Window window(p, map.height);
  const Share<kWarps> share(window.rows.end - window.rows.begin);
  for (int y = window.rows.begin + share.row; y < window.rows.end; y += share.row_step) {
    const double dy = y - p.y, v = p.l22 * dy;
    const Cells columns = window.columns(dy, map.width);
    const T* row = map.cells + y * map.stride;
    double s[5] = {}, t[3] = {};
#pragma unroll 2
    for (int x = columns.begin + share.column; x < columns.end; x += share.column_step) {
      const double u = p.l11 * (x - p.x) + p.l21 * dy;
      const double g = exp(-0.5 * (u * u + v * v));
      const double r = p.amplitude * g - static_cast<double>(row[x]);
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
  const int lane = threadIdx.x % kWarp;
  warp_sums<kWarp / 2>(total);
  if (lane < kMoments) block.partial[threadIdx.x / kWarp][lane] = total[0];
  __syncthreads();
  if (threadIdx.x < kMoments) {
    double all = 0;
    for (int w = 0; w < kWarps; ++w) all += block.partial[w][lane];
    block.sums[lane] = all;
  }
}

// Root mean square residual of p over the whole map, in thread 0.
template <int kWarps, class T>
__device__ double residual(const Gaussian& p, const Map<T>& map, Block& block) {
  const Window window(p, map.height);
  const Share<kWarps> share(map.height);
  double sum = 0;
  for (int y = share.row; y < map.height; y += share.row_step) {
    const double dy = y - p.y, v = p.l22 * dy;
    Cells columns{0, 0};
    if (y >= window.rows.begin && y < window.rows.end) columns = window.columns(dy, map.width);
    for (int x = share.column; x < map.width; x += share.column_step) {
      double r = static_cast<double>(map.cells[y * map.stride + x]);
      if (x >= columns.begin && x < columns.end) {
        const double u = p.l11 * (x - p.x) + p.l21 * dy;
        r -= p.amplitude * exp(-0.5 * (u * u + v * v));
      }
      sum += r * r;
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) block.partial[threadIdx.x / kWarp][0] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += block.partial[w][0];
  return sqrt(sum / (static_cast<double>(map.height) * map.width));
}

// Twelve warps at least on a multiprocessor: left to itself, the compiler spills registers for
// more.
template <int kWarps, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 12 / kWarps)
    fit_kernel(Call call, std::int64_t first, int shared_stride) {
  __shared__ Block block;
  const std::int64_t index = first + blockIdx.x;
  const int height = call.height, width = call.width;
  Map<T> map{static_cast<const T*>(call.heatmaps) + index * height * width, height, width, width};
  T* copy = shared_stride > 0 ? dynamic_shared<T>() : nullptr;
  summarise<kWarps>(map, copy, shared_stride, block);
  if (copy) map = {copy, height, width, shared_stride};  // whole after the next barrier
  if (threadIdx.x == 0) {
    double init[6] = {};
#pragma unroll
    for (int i = 0; i < 6; ++i)
      if (i < call.init_size)
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
    moments<kWarps>(block.fitter.trial, map, block);
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
    const double rmse = residual<kWarps>(block.fitter.best, map, block);
    if (threadIdx.x == 0) block.result.rmse = rmse;
  }
  if (threadIdx.x == 0) store_result<T>(call, index, block.result);
}

template <int kWarps, class T>
cudaError_t launch(const Call& call, int device, cudaStream_t stream) {
  static SharedMemory shared_memory;
  constexpr std::int64_t kMostBlocks = 0x7fffffff;
  const int stride = call.width | 1;
  const std::size_t bytes = static_cast<std::size_t>(call.height) * stride * sizeof(T);
  // A map that is larger is read through the caches.
  const bool fits = bytes + sizeof(Block) <= static_cast<std::size_t>(device_limits(device).shared);
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kWarps * kWarp);
  config.dynamicSmemBytes = fits ? bytes : 0;
  config.stream = stream;
  constexpr auto kernel = fit_kernel<kWarps, T>;
  auto error =
      static_cast<cudaError_t>(shared_memory.allow(reinterpret_cast<const void*>(kernel), device));
  for (std::int64_t first = 0; first < call.count && error == cudaSuccess; first += kMostBlocks) {
    config.gridDim = dim3(static_cast<unsigned>(std::min(call.count - first, kMostBlocks)));
    error = cudaLaunchKernelEx(&config, kernel, call, first, fits ? stride : 0);
  }
  return error;
}

// Warps by the size of the map alone, because the order of the sums depends on them, and a fit must
// not depend on what else is in its batch. A lane then has some eight cells of a typical window (a
// fourth of the map): more warps would mostly add to each other's sums, fewer take longer.
template <class T>
cudaError_t launch(const Call& call, int device, cudaStream_t stream) {
  const std::int64_t cells = static_cast<std::int64_t>(call.height) * call.width;
  if (cells <= 512) return launch<1, T>(call, device, stream);
  if (cells <= 8192) return launch<4, T>(call, device, stream);
  return launch<kMostWarps, T>(call, device, stream);
}

}  // namespace

void fit_cuda(const Call& call, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  check_cuda(call.is_double ? launch<double>(call, device, on) : launch<float>(call, device, on),
             "fit_gaussians of " + std::to_string(call.count) + " maps of " +
                 std::to_string(call.height) + " x " + std::to_string(call.width),
             device);
}

}  // namespace fasthyp::gaussian_fit
