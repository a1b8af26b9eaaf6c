// What happens between the products of training: a warp owns a row, or a thread a column's sum.
#include <algorithm>

#include "common/simt.h"
#include "coupling/cuda_gradients.h"

namespace fasthyp::coupling::cuda::training {
namespace {

constexpr int kWarp = 32;
constexpr int kRowWarps = 8;  // of a block; each has a row
constexpr int kSumThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int own_row() {
  return static_cast<int>(blockIdx.x) * kRowWarps + static_cast<int>(threadIdx.x) / kWarp;
}
__device__ __forceinline__ int own_lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// The same in all lanes.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

__global__ void slots_kernel(const __grid_constant__ Slots slots, int* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = slots.v[i];
}

__global__ void move_kernel(const __grid_constant__ Move call) {
  const int row = own_row();
  if (row >= call.rows) return;
  const float* from = call.from + row * call.from_stride;
  float* to = call.to + row * call.to_stride;
  for (int i = own_lane(); i < call.columns; i += kWarp)
    to[call.to_index ? call.to_index[i] : i] = from[call.from_index ? call.from_index[i] : i];
}

__global__ void scale_kernel(const __grid_constant__ Scale call) {
  const int row = own_row();
  if (row >= call.rows) return;
  const std::int64_t place = static_cast<std::int64_t>(row) * call.columns;
  for (int i = own_lane(); i < call.columns; i += kWarp) {
    const float product = call.from[place + i] * call.weight[i];
    call.to[place + i] = call.shift ? product + call.shift[i] : product;
  }
}

// A row's part in a coupling.
class Coupled {
 public:
  __device__ Coupled(const Couple& call, int row) : call_(call), row_(row) {
    raw_ = call.raw + row * call.raw_stride;
    state_ = call.state + static_cast<std::int64_t>(row) * call.dim;
    if (call.kind != static_cast<int>(Kind::gin)) return;
    float sum = 0;
    for (int i = own_lane(); i < call.active; i += kWarp) sum += clamped(i);
    mean_ = warp_sum(sum) / static_cast<float>(call.active);
  }

  __device__ void change() const {
    float sum = 0;
    for (int i = own_lane(); i < call_.active; i += kWarp) {
      float& x = state_[call_.slots[i]];
      const float t = shift(i);
      if (call_.kind == static_cast<int>(Kind::additive)) {
        x = call_.inverse ? x - t : x + t;
        continue;
      }
      const float s = log_scale(i);
      x = call_.inverse ? (x - t) * expf(-s) : x * expf(s) + t;
      sum += s;
    }
    if (call_.kind != static_cast<int>(Kind::affine)) return;
    sum = warp_sum(sum);
    if (own_lane() == 0) call_.log_det[row_] += call_.inverse ? -sum : sum;
  }

  // Gradients of the active slots and of raw; the step's input.
  __device__ void gradient() const {
    float* grad = call_.grad + static_cast<std::int64_t>(row_) * call_.dim;
    float* grad_raw = call_.grad_raw + row_ * call_.grad_raw_stride;
    const bool additive = call_.kind == static_cast<int>(Kind::additive);
    const bool gin = call_.kind == static_cast<int>(Kind::gin);
    float of_log_det = 0;
    if (call_.kind == static_cast<int>(Kind::affine) && call_.grad_log_det)
      of_log_det = call_.inverse ? -call_.grad_log_det[row_] : call_.grad_log_det[row_];
    float sum = 0;
    for (int i = own_lane(); i < call_.active; i += kWarp) {
      float& v = state_[call_.slots[i]];  // of the step's output, or of its input
      float& g = grad[call_.slots[i]];
      const float t = shift(i);
      if (additive) {
        if (!call_.from_input) v = call_.inverse ? v + t : v - t;
        grad_raw[i] = call_.inverse ? -g : g;
        continue;
      }
      const float s = log_scale(i), up = expf(s), down = expf(-s);
      float of_s;
      if (call_.inverse) {  // y = (x - t) exp(-s)
        const float y = call_.from_input ? (v - t) * down : v;
        if (!call_.from_input) v = y * up + t;
        of_s = of_log_det - g * y;
        g *= down;
        grad_raw[call_.shift_at + i] = -g;
      } else {  // y = x exp(s) + t
        const float scaled = call_.from_input ? v * up : v - t;
        if (!call_.from_input) v = scaled * down;
        of_s = of_log_det + g * scaled;
        grad_raw[call_.shift_at + i] = g;
        g *= up;
      }
      sum += of_s;
      grad_raw[i] = gin ? of_s : of_s * slope(i);
    }
    if (!gin) return;
    const float mean = warp_sum(sum) / static_cast<float>(call_.active);
    for (int i = own_lane(); i < call_.active; i += kWarp)
      grad_raw[i] = (grad_raw[i] - mean) * slope(i);
  }

 private:
  __device__ float clamped(int i) const {
    return soft_clamp(raw_[i], call_.clamp, call_.clamp_kind);
  }
  __device__ float slope(int i) const {
    return soft_clamp_slope(raw_[i], call_.clamp, call_.clamp_kind);
  }
  __device__ float log_scale(int i) const { return clamped(i) - mean_; }
  __device__ float shift(int i) const { return raw_[call_.shift_at + i]; }

  const Couple& call_;
  int row_;
  const float* raw_;
  float* state_;
  float mean_ = 0;
};

template <bool kGradient>
__global__ void couple_kernel(const __grid_constant__ Couple call) {
  const int row = own_row();
  if (row >= call.rows) return;
  const Coupled coupled(call, row);
  if constexpr (kGradient)
    coupled.gradient();
  else
    coupled.change();
}

__global__ void through_kernel(const __grid_constant__ Through call) {
  const int row = own_row();
  if (row >= call.rows) return;
  float* grad = call.grad + row * call.stride;
  const std::int64_t place = row * call.value_stride;
  if (call.derivative)
    with_derivative(call.activation, call.slope, [&](const auto& derivative) {
      for (int i = own_lane(); i < call.columns; i += kWarp)
        grad[i] *= derivative(call.derivative[place + i]);
    });
  if (!call.scale && !call.kept && !call.gate) return;
  float* kept = call.kept ? call.kept + row * call.kept_stride : nullptr;
  const float* gate =
      call.gate ? call.gate + image_of(call.images, row) * call.gate_stride : nullptr;
  for (int i = own_lane(); i < call.columns; i += kWarp) {
    float g = grad[i];
    if (call.scale) g *= call.scale[i];
    if (call.take_kept) g += kept[i];
    if (call.give_kept) kept[i] = call.add_kept ? kept[i] + g : g;
    if (gate) g *= sigmoid(gate[i]);
    grad[i] = g;
  }
}

__global__ void __launch_bounds__(kSumThreads)
    image_sums_kernel(const __grid_constant__ ImageSums call) {
  constexpr int kTogether = 8;
  const int across = (call.columns + kSumThreads - 1) / kSumThreads;
  const int column = static_cast<int>(blockIdx.x % across) * kSumThreads + threadIdx.x;
  const int index = static_cast<int>(blockIdx.x / across);
  if (column >= call.columns) return;
  const int image = index / call.pieces, piece = index % call.pieces;
  const Images& images = call.images;
  // in 64 bits, as there may be one image of very many rows
  const std::int64_t first =
      image == 0 ? 0 : images.lead + static_cast<std::int64_t>(image - 1) * images.per;
  const std::int64_t last = image == 0 ? images.lead : first + images.per;
  const std::int64_t rows = call.rows;
  const std::int64_t begin = min(first + piece * kPieceRows, rows);
  const std::int64_t end = min(min(begin + kPieceRows, last), rows);
  float sums[kTogether] = {};
  for (std::int64_t row = begin; row < end; row += kTogether) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (row + i >= end) continue;
      const float v = call.from[(row + i) * call.stride + column];
      sums[i] += call.times ? v * call.times[(row + i) * call.times_stride + column] : v;
    }
  }
#pragma unroll
  for (int half = kTogether / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  float sum = sums[0];
  if (call.gate) {
    const float open = sigmoid(call.gate[image * call.gate_stride + column]);
    sum *= open * (1.0f - open);
  }
  call.to[static_cast<std::int64_t>(index) * call.columns + column] = sum;
}

__global__ void __launch_bounds__(kSumThreads) reduce_kernel(const __grid_constant__ Reduce call) {
  const std::int64_t across = (call.numbers + kSumThreads - 1) / kSumThreads;
  const std::int64_t i = blockIdx.x % across * kSumThreads + threadIdx.x;
  const std::int64_t b = blockIdx.x / across;
  if (i >= call.numbers) return;
  float* to = i < call.first ? call.to : call.other;
  if (!to) return;
  to += i < call.first ? b * call.first + i : b * (call.numbers - call.first) + i - call.first;
  const float* from = call.from + b * call.parts * call.numbers + i;
  float sum = 0;
#pragma unroll 4
  for (int s = 0; s < call.parts; ++s) sum += from[s * call.numbers];
  *to = call.accumulate ? *to + sum : sum;
}

template <class Call>
int launch(void (*kernel)(Call), const Call& call, std::int64_t blocks, int threads, void* stream) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, call);
}
template <class Call>
int launch_rows(void (*kernel)(Call), const Call& call, void* stream) {
  return launch(kernel, call, (call.rows + kRowWarps - 1) / kRowWarps, kRowWarps * kWarp, stream);
}

}  // namespace

int launch_slots(const Slots& slots, int* to, int count, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(256);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, slots_kernel, slots, to, count);
}
int launch_move(const Move& call, void* stream) { return launch_rows(move_kernel, call, stream); }
int launch_scale(const Scale& call, void* stream) {
  return launch_rows(scale_kernel, call, stream);
}
int launch_couple(const Couple& call, bool gradient, void* stream) {
  return launch_rows(gradient ? couple_kernel<true> : couple_kernel<false>, call, stream);
}
int launch_through(const Through& call, void* stream) {
  return launch_rows(through_kernel, call, stream);
}
int launch_image_sums(const ImageSums& call, void* stream) {
  const std::int64_t across = (call.columns + kSumThreads - 1) / kSumThreads;
  return launch(image_sums_kernel, call, across * call.image_count * call.pieces, kSumThreads,
                stream);
}
int launch_reduce(const Reduce& call, void* stream) {
  const std::int64_t across = (call.numbers + kSumThreads - 1) / kSumThreads;
  return launch(reduce_kernel, call, across * call.batch, kSumThreads, stream);
}

}  // namespace fasthyp::coupling::cuda::training
