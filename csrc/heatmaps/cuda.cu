// A block draws some of the samples of one map: it adds up the weights of segments of the map, and
// each of its warps then looks up one sample at a time.
#include <algorithm>
#include <string>

#include "common/cuda_device.h"
#include "common/simt.h"
#include "heatmaps/heatmaps.h"
#include "heatmaps/math.h"

namespace fasthyp::heatmaps {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kSegments = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// The greatest cell, not less than zero, in every thread; NaN if a cell is NaN or positive
// infinity.
template <class T>
__device__ double highest_of(const T* map, int cells) {
  __shared__ double of_warp[kWarps];
  T highest = 0;
  bool finite = true;
  for (int i = threadIdx.x; i < cells; i += kWarps * kWarp) {
    const T v = map[i];
    highest = v > highest ? v : highest;
    finite = finite && v <= kMost<T>;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, highest, offset);
    highest = other > highest ? other : highest;
  }
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = static_cast<double>(highest);
  if (__syncthreads_or(!finite)) return kNaN<double>;
  double all = of_warp[0];
  for (int w = 1; w < kWarps; ++w) all = of_warp[w] > all ? of_warp[w] : all;
  return all;
}

// The sum over the lanes up to and with this one.
__device__ std::uint64_t warp_scan(std::uint64_t v) {
  const int lane = threadIdx.x % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const std::uint64_t before = __shfl_up_sync(kAllLanes, v, offset);
    v += lane >= offset ? before : 0;
  }
  return v;
}

template <class T, bool kPower>
__global__ void __launch_bounds__(kWarps* kWarp)
    sample_kernel(const __grid_constant__ Call call, std::int64_t first) {
  __shared__ std::uint64_t ends[kSegments];  // sums of the weights up to and with each segment
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int cells = call.height * call.width;
  const std::int64_t index = first + blockIdx.x;
  const T* map = static_cast<const T*>(call.maps) + index * cells;
  const std::int64_t first_sample = static_cast<std::int64_t>(blockIdx.y) * kWarps + warp;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.y) * kWarps;

  const double highest = highest_of(map, cells);
  if (!(highest >= Weights::lowest(call))) {  // not finite, or nothing to weigh
    for (std::int64_t i = first_sample + lane * stride; i < call.samples; i += kWarp * stride) {
      const int cell = static_cast<int>(below(cells, random_bits(call, index, i)));
      if (highest == highest)
        store<T>(call, index, i, static_cast<T>(cell % call.width),
                 static_cast<T>(cell / call.width), static_cast<T>(call.flat_value));
      else
        store<T>(call, index, i, kNaN<T>, kNaN<T>, kNaN<T>);
    }
    return;
  }

  const Weights weights(call, highest);
  const int length = (cells + kSegments * kWarp - 1) / (kSegments * kWarp) * kWarp;
  const int segments = (cells + length - 1) / length;
  const auto weight_at = [&](int cell) {
    return cell < cells ? weights.of<kPower>(static_cast<double>(map[cell])) : 0;
  };
  for (int s = warp; s < segments; s += kWarps) {
    std::uint64_t sum = 0;
    for (int i = 0; i < length; i += kWarp) sum += weight_at(s * length + i + lane);
    sum = warp_scan(sum);
    if (lane == kWarp - 1) ends[s] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    std::uint64_t before = 0;
    for (int s = lane; s < kSegments; s += kWarp) {
      const std::uint64_t sum = before + warp_scan(s < segments ? ends[s] : 0);
      if (s < segments) ends[s] = sum;
      before = __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
  }
  __syncthreads();

  for (std::int64_t i = first_sample; i < call.samples; i += stride) {
    std::uint64_t number = below(ends[segments - 1], random_bits(call, index, i));
    int segment = 0;  // the first whose end is above the number
    for (int size = segments; size > 1;) {
      const int half = size / 2;
      segment += ends[segment + half - 1] <= number ? half : 0;
      size -= half;
    }
    if (segment > 0) number -= ends[segment - 1];
    for (int start = segment * length;; start += kWarp) {
      const std::uint64_t sum = warp_scan(weight_at(start + lane));
      const unsigned above = __ballot_sync(kAllLanes, sum > number);
      if (above != 0) {
        const int cell = start + __ffs(static_cast<int>(above)) - 1;
        if (lane == 0)
          store<T>(call, index, i, static_cast<T>(cell % call.width),
                   static_cast<T>(cell / call.width), map[cell]);
        break;
      }
      number -= __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
  }
}

template <class T>
cudaError_t launch(const Call& call, cudaStream_t stream) {
  constexpr std::int64_t kMostBlocks = 0x7fffffff, kMostSlices = 0xffff;
  constexpr std::int64_t kSlice = 256;  // samples that are worth another look at the map
  const auto kernel = call.temperature == 1 ? sample_kernel<T, false> : sample_kernel<T, true>;
  const std::int64_t maps = call.images * call.joints;
  const std::int64_t slices = std::min((call.samples + kSlice - 1) / kSlice, kMostSlices);
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kWarps * kWarp);
  config.stream = stream;
  cudaError_t error = cudaSuccess;
  for (std::int64_t first = 0; first < maps && error == cudaSuccess; first += kMostBlocks) {
    config.gridDim = dim3(static_cast<unsigned>(std::min(maps - first, kMostBlocks)),
                          static_cast<unsigned>(slices));
    error = cudaLaunchKernelEx(&config, kernel, call, first);
  }
  return error;
}

}  // namespace

void sample_cuda(const Call& call, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  check_cuda(call.is_double ? launch<double>(call, on) : launch<float>(call, on),
             "sample_heatmaps of " + std::to_string(call.images) + " x " +
                 std::to_string(call.joints) + " maps of " + std::to_string(call.height) + " x " +
                 std::to_string(call.width),
             device);
}

}  // namespace fasthyp::heatmaps
