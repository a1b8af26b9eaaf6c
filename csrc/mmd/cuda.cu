// A thread owns one sample, a row, of both sets of a problem laid end to end, with its coordinates
// and its gradient in registers. It meets the columns, the same samples again, a tile at a time
// from shared memory, where all threads of a warp read the same one.
//
// Large problems are split by rows and by columns into several blocks, in a way that depends on
// their size alone. What those find lies in the workspace until a second kernel adds it up, always
// in the same order.
#include <algorithm>
#include <cmath>
#include <string>

#include "common/cuda_device.h"
#include "common/simt.h"
#include "mmd/math.h"
#include "mmd/mmd.h"

namespace fasthyp::mmd {
namespace {

constexpr int kWarp = 32;
constexpr int kMostThreads = 128;
constexpr int kTile = 64;  // columns in shared memory
constexpr int kSumThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// How one problem is split.
struct Split {
  int threads;              // and rows, of a block
  std::int64_t rows;        // samples of x and y
  std::int64_t row_blocks;  // blocks of rows
  std::int64_t pieces;      // of the columns
  std::int64_t columns;     // of a piece

  explicit Split(const std::int64_t (&n)[2]) {
    // More pieces would take more workspace: each has a gradient of its own.
    constexpr std::int64_t kMostPieces = 8, kFewColumns = 256;
    rows = n[0] + n[1];
    threads =
        static_cast<int>(std::min<std::int64_t>((rows + kWarp - 1) / kWarp * kWarp, kMostThreads));
    row_blocks = (rows + threads - 1) / threads;
    const std::int64_t most = std::min((rows + kFewColumns - 1) / kFewColumns, kMostPieces);
    columns = ((rows + most - 1) / most + kTile - 1) / kTile * kTile;
    pieces = (rows + columns - 1) / columns;
  }
  FASTHYP_HD std::int64_t blocks() const { return row_blocks * pieces; }
};

// Where the kernels find and leave things.
template <class T>
struct Job {
  Call call;
  Split split;
  T rates[kMostBandwidths];
  T even[2];       // the weight of each sample where there are no weights
  double* values;  // (problems, blocks of a problem), or null: a problem is one block
  T* partial;      // (problems, pieces, rows, dim), or null: gradients are written at once
};

template <class T>
__device__ void store_value(const Call& call, std::int64_t problem, double sum) {
  static_cast<T*>(call.value)[problem] = static_cast<T>(sum + diagonal_of(call, problem));
}

// Where the gradient of a row goes; null if it is not wanted.
template <class T>
__device__ T* gradient_of(const Call& call, std::int64_t problem, std::int64_t row) {
  const int set = row >= call.n[0];
  T* grad = static_cast<T*>(call.grad[set]);
  return grad ? grad + (problem * call.n[set] + row - (set ? call.n[0] : 0)) * call.dim : nullptr;
}

// A sample: those of y weigh less than nothing.
template <class T>
struct Sample {
  const T* at;
  T weight;
};
template <class T>
__device__ Sample<T> sample_of(const Job<T>& job, std::int64_t problem, std::int64_t row) {
  const Call& call = job.call;
  const int set = row >= call.n[0];
  const std::int64_t i = problem * call.n[set] + row - (set ? call.n[0] : 0);
  const T* weights = static_cast<const T*>(call.weights[set]);
  const T weight = weights ? weights[i] : job.even[set];
  return {static_cast<const T*>(set ? call.y : call.x) + i * call.dim, set ? -weight : weight};
}

// What weighs nothing is not looked at: it may be NaN.
template <class T>
__device__ T coordinate(const Sample<T>& sample, int k) {
  return sample.weight != 0 ? sample.at[k] : T(0);
}

// 1 / t for t >= 1; 0 or next to it where t is beyond 1e37.
__device__ inline float reciprocal(float t) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, t);
#else
  return 1 / t;
#endif
}
// By Newton's steps from there: a division would be a call, for which registers are spilled.
__device__ inline double reciprocal(double t) {
  t = t > 1e37 ? 1e37 : t;  // keeps NaN
  double r = static_cast<double>(reciprocal(static_cast<float>(t)));
  r = std::fma(r, std::fma(-t, r, 1.0), r);
  return std::fma(r, std::fma(-t, r, 1.0), r);
}

// The kernel's value, and minus its derivative by the squared distance.
template <class T>
struct Value {
  T k, slope;
};
template <class T>
__device__ Value<T> kernel_of(const Job<T>& job, T distance) {
  Value<T> sum{0, 0};
  for (int i = 0; i < job.call.bandwidths; ++i) {
    const T rate = job.rates[i];
    const bool rbf = job.call.kernel == Kernel::rbf;
    const T k = rbf ? std::exp(-distance * rate) : reciprocal(1 + distance * rate);
    sum.k += k;
    sum.slope += rbf ? k * rate : k * rate * k;
  }
  return sum;
}

// The row of a thread, and the columns that its block looks at.
template <class T>
struct Place {
  std::int64_t problem, piece, first_row, row, begin, end;
  int set;
  bool here;              // there is such a row
  bool of_x, of_y, mine;  // gradients that are wanted, and whether the row's is

  __device__ Place(const Job<T>& job, std::int64_t index, bool gradient) {
    const Call& call = job.call;
    const Split& split = job.split;
    const std::int64_t block = index % split.blocks();
    problem = index / split.blocks();
    piece = block / split.row_blocks;
    first_row = block % split.row_blocks * split.threads;
    row = first_row + threadIdx.x;
    begin = piece * split.columns;
    end = min(begin + split.columns, split.rows);
    set = row >= call.n[0];
    here = row < split.rows;
    of_x = gradient && call.grad[0];
    of_y = gradient && call.grad[1];
    mine = set ? of_y : of_x;
  }

  // How often the pair with a column is in the sum; 0: not here. A pair is met from both sides if
  // both want a gradient, from one that does, or else from the first.
  __device__ int times(std::int64_t column, int column_set) const {
    const bool wanted = column_set ? of_y : of_x;
    if (mine) return column == row ? 0 : wanted ? 1 : 2;
    return !wanted && column > row ? 2 : 0;
  }

  // Where the gradient of the row goes, or its share from these columns; null if it is not wanted.
  __device__ T* gradient(const Job<T>& job) const {
    if (!here || !mine) return nullptr;
    if (!job.partial) return gradient_of<T>(job.call, problem, row);
    return job.partial +
           ((problem * job.split.pieces + piece) * job.split.rows + row) * job.call.dim;
  }
};

// The value's share of a block, from those of its threads.
template <class T>
__device__ void store_share(const Job<T>& job, std::int64_t index, std::int64_t problem, double v) {
  __shared__ double of_warp[kMostThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_down_sync(kAllLanes, v, offset);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = v;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double sum = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += of_warp[w];
  if (job.values)
    job.values[index] = sum;
  else
    store_value<T>(job.call, problem, sum);
}

// As many numbers as one load takes.
template <class T, int kDim>
struct alignas(kDim * sizeof(T) < 16 ? kDim * sizeof(T) : 16) Piece {
  static constexpr int kSize = static_cast<int>(16 / sizeof(T)) < kDim ? 16 / sizeof(T) : kDim;
  T v[kSize];
};

// kDim: coordinates in registers, at least dim and the rest zeros.
template <class T, int kDim, bool kGradient>
__global__ void __launch_bounds__(kMostThreads)
    pairs_kernel(const __grid_constant__ Job<T> job, std::int64_t first) {
  using Part = Piece<T, kDim>;
  constexpr int kPart = Part::kSize, kParts = kDim / kPart;
  static_assert(kDim % kPart == 0);
  __shared__ Part tile[kTile][kParts];
  __shared__ T tile_weights[kTile];

  const Call& call = job.call;
  const std::int64_t index = first + blockIdx.x;
  const Place<T> place(job, index, kGradient);

  T mine[kDim] = {}, sums[kGradient ? kDim : 1] = {};
  T in_set = 0, across = 0;  // the row's weight, for columns of its set and of the other one
  if (place.here) {
    const auto sample = sample_of<T>(job, place.problem, place.row);
#pragma unroll
    for (int k = 0; k < kDim; ++k)
      if (k < call.dim) mine[k] = coordinate(sample, k);
    across = sample.weight;
    in_set = static_cast<T>(across * scale_of(call, place.problem, place.set));
  }

  double total = 0;
  for (std::int64_t start = place.begin; start < place.end; start += kTile) {
    const int count = static_cast<int>(min(place.end - start, static_cast<std::int64_t>(kTile)));
    if (!kGradient && start + count <= place.first_row) continue;  // met from the other side
    __syncthreads();
    for (int i = threadIdx.x; i < count * kDim; i += blockDim.x) {
      const auto sample = sample_of<T>(job, place.problem, start + i / kDim);
      const int k = i % kDim;
      tile[i / kDim][k / kPart].v[k % kPart] = k < call.dim ? coordinate(sample, k) : T(0);
      if (k == 0) tile_weights[i / kDim] = sample.weight;
    }
    __syncthreads();
    if (!place.here) continue;
    T tile_sum = 0;
    for (int i = 0; i < count; ++i) {
      const int column_set = start + i >= call.n[0];
      const int times = place.times(start + i, column_set);
      if (times == 0) continue;
      T distances[kPart] = {};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const Part column = tile[i][part];
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
          const T difference = mine[part * kPart + k] - column.v[k];
          distances[k] = std::fma(difference, difference, distances[k]);
        }
      }
      T distance = distances[0];
#pragma unroll
      for (int k = 1; k < kPart; ++k) distance += distances[k];
      const Value<T> value = kernel_of(job, distance);
      const T weight = tile_weights[i] * (column_set == place.set ? in_set : across);
      tile_sum += static_cast<T>(times) * weight * value.k;
      if constexpr (kGradient) {
        const T c = weight * value.slope;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const Part column = tile[i][part];
#pragma unroll
          for (int k = 0; k < kPart; ++k) {
            T& sum = sums[part * kPart + k];
            sum = std::fma(c, mine[part * kPart + k] - column.v[k], sum);
          }
        }
      }
    }
    total += static_cast<double>(tile_sum);
  }

  if constexpr (kGradient) {
    if (T* out = place.gradient(job)) {
      const T factor = job.partial ? T(1) : T(kGradientFactor);
#pragma unroll
      for (int k = 0; k < kDim; ++k)
        if (k < call.dim) out[k] = factor * sums[k];
    }
  }
  store_share(job, index, place.problem, total);
}

// Samples of any dimension: all is read where it lies, for some columns together.
template <class T, bool kGradient>
__global__ void __launch_bounds__(kMostThreads)
    wide_pairs_kernel(const __grid_constant__ Job<T> job, std::int64_t first) {
  constexpr int kTogether = 4;
  const Call& call = job.call;
  const std::int64_t index = first + blockIdx.x;
  const Place<T> place(job, index, kGradient);
  T* out = place.gradient(job);
  if (out)
    for (int k = 0; k < call.dim; ++k) out[k] = 0;

  double total = 0;
  if (place.here) {
    const auto mine = sample_of<T>(job, place.problem, place.row);
    const T in_set = static_cast<T>(mine.weight * scale_of(call, place.problem, place.set));
    for (std::int64_t start = place.begin; start < place.end; start += kTogether) {
      Sample<T> columns[kTogether];
      T distances[kTogether] = {}, c[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)  // a sample of no weight where there is none
        columns[i] =
            start + i < place.end ? sample_of<T>(job, place.problem, start + i) : Sample<T>{};
      for (int k = 0; k < call.dim; ++k) {
        const T at = coordinate(mine, k);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const T difference = at - coordinate(columns[i], k);
          distances[i] = std::fma(difference, difference, distances[i]);
        }
      }
      T tile_sum = 0;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int column_set = start + i >= call.n[0];
        const int times = start + i < place.end ? place.times(start + i, column_set) : 0;
        const Value<T> value = kernel_of(job, distances[i]);
        const T weight = columns[i].weight * (column_set == place.set ? in_set : mine.weight);
        if (times > 0) tile_sum += static_cast<T>(times) * weight * value.k;
        c[i] = times > 0 ? weight * value.slope : T(0);
      }
      total += static_cast<double>(tile_sum);
      if (out) {
        const bool last = start + kTogether >= place.end;
        const T factor = last && !job.partial ? T(kGradientFactor) : T(1);
        for (int k = 0; k < call.dim; ++k) {
          const T at = coordinate(mine, k);
          T sum = out[k];
#pragma unroll
          for (int i = 0; i < kTogether; ++i)
            sum = std::fma(c[i], at - coordinate(columns[i], k), sum);
          out[k] = factor * sum;
        }
      }
    }
  }
  store_share(job, index, place.problem, total);
}

// Adds up what the blocks of each problem have found: gradients a number a thread, and the values
// by the first warp of each problem.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const __grid_constant__ Job<T> job, std::int64_t first, std::int64_t per_problem) {
  const Call& call = job.call;
  const Split& split = job.split;
  const std::int64_t problem = (first + blockIdx.x) / per_problem;
  const std::int64_t part = (first + blockIdx.x) % per_problem;
  const std::int64_t numbers = split.rows * call.dim;
  const std::int64_t i = part * kSumThreads + threadIdx.x;
  if (job.partial && i < numbers) {
    if (T* out = gradient_of<T>(call, problem, i / call.dim)) {
      const T* from = job.partial + problem * split.pieces * numbers + i;
      T sum = 0;
      for (std::int64_t piece = 0; piece < split.pieces; ++piece) sum += from[piece * numbers];
      out[i % call.dim] = T(kGradientFactor) * sum;
    }
  }
  if (part > 0 || threadIdx.x >= kWarp) return;
  const double* values = job.values + problem * split.blocks();
  double sum = 0;
  for (std::int64_t b = threadIdx.x; b < split.blocks(); b += kWarp) sum += values[b];
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    sum += __shfl_down_sync(kAllLanes, sum, offset);
  if (threadIdx.x == 0) store_value<T>(call, problem, sum);
}

template <class T>
using Pairs = void (*)(Job<T>, std::int64_t);

template <bool kGradient>
Pairs<float> pairs_for(int dim, float) {
  if (dim <= 2) return pairs_kernel<float, 2, kGradient>;
  if (dim <= 4) return pairs_kernel<float, 4, kGradient>;
  if (dim <= 8) return pairs_kernel<float, 8, kGradient>;
  if (dim <= 16) return pairs_kernel<float, 16, kGradient>;
  if (dim <= 32) return pairs_kernel<float, 32, kGradient>;
  if (dim <= 48) return pairs_kernel<float, 48, kGradient>;
  if (dim <= 64) return pairs_kernel<float, 64, kGradient>;
  return wide_pairs_kernel<float, kGradient>;
}
template <bool kGradient>
Pairs<double> pairs_for(int dim, double) {
  if (dim <= 2) return pairs_kernel<double, 2, kGradient>;
  if (dim <= 8) return pairs_kernel<double, 8, kGradient>;
  if (dim <= 24) return pairs_kernel<double, 24, kGradient>;
  return wide_pairs_kernel<double, kGradient>;
}

constexpr std::int64_t round_up(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

template <class T>
cudaError_t launch(const Call& call, std::byte* workspace, cudaStream_t stream) {
  constexpr std::int64_t kMostBlocks = 0x7fffffff;
  const bool gradient = call.grad[0] || call.grad[1];
  Job<T> job{call, Split(call.n), {}, {}, nullptr, nullptr};
  for (int set = 0; set < 2; ++set)
    job.even[set] = static_cast<T>(1.0 / static_cast<double>(call.n[set]));
  for (int i = 0; i < call.bandwidths; ++i) job.rates[i] = static_cast<T>(call.rates[i]);
  const std::int64_t blocks = call.problems * job.split.blocks();
  if (job.split.blocks() > 1) job.values = reinterpret_cast<double*>(workspace);
  if (job.split.pieces > 1 && gradient)
    job.partial = reinterpret_cast<T*>(workspace + round_up(blocks * 8));

  const auto pairs = gradient ? pairs_for<true>(call.dim, T()) : pairs_for<false>(call.dim, T());
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(static_cast<unsigned>(job.split.threads));
  config.stream = stream;
  cudaError_t error = cudaSuccess;
  for (std::int64_t first = 0; first < blocks && error == cudaSuccess; first += kMostBlocks) {
    config.gridDim = dim3(static_cast<unsigned>(std::min(blocks - first, kMostBlocks)));
    error = cudaLaunchKernelEx(&config, pairs, job, first);
  }
  if (!job.values) return error;

  const std::int64_t numbers = job.partial ? job.split.rows * call.dim : 1;
  const std::int64_t per_problem = (numbers + kSumThreads - 1) / kSumThreads;
  const std::int64_t sums = call.problems * per_problem;
  config.blockDim = dim3(kSumThreads);
  for (std::int64_t first = 0; first < sums && error == cudaSuccess; first += kMostBlocks) {
    config.gridDim = dim3(static_cast<unsigned>(std::min(sums - first, kMostBlocks)));
    error = cudaLaunchKernelEx(&config, sum_kernel<T>, job, first, per_problem);
  }
  return error;
}

}  // namespace

std::int64_t workspace_bytes_cuda(bool is_double, std::int64_t problems, std::int64_t n,
                                  std::int64_t p, std::int64_t dim, bool gradient) {
  const std::int64_t sizes[2] = {n, p};
  const Split split(sizes);
  const std::int64_t values = split.blocks() > 1 ? round_up(problems * split.blocks() * 8) : 0;
  const std::int64_t numbers = problems * split.pieces * split.rows * dim;
  return values + (gradient && split.pieces > 1 ? numbers * (is_double ? 8 : 4) : 0);
}

void run_cuda(const Call& call, std::byte* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  check_cuda(
      call.is_double ? launch<double>(call, workspace, on) : launch<float>(call, workspace, on),
      "mmd2 of " + std::to_string(call.problems) + " times " + std::to_string(call.n[0]) + " and " +
          std::to_string(call.n[1]) + " samples of " + std::to_string(call.dim),
      device);
}

}  // namespace fasthyp::mmd
