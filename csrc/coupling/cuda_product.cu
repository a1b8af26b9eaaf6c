// out = f(A W^T + b) for all rows: a layer between two others, with everything that happens to its
// result before the next one reads it.
//
// A block computes 64 rows by 128 columns, a warp 64 by 32 of them. Both operands come in stages of
// 64 bytes of a row, copied asynchronously, three ahead.
#include "common/cuda_device.h"
#include "common/simt.h"
#include "coupling/cuda.h"
#include "coupling/cuda_operands.h"

namespace fasthyp::coupling::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRowTiles = 4;
constexpr int kRows = 16 * kRowTiles;
constexpr int kPairs = 2;  // of B tiles, per warp
constexpr int kColumns = 16 * kPairs * kWarps;
constexpr int kStages = 4;
constexpr int kStageUnits = 2;  // per pair of B tiles: 64 bytes of a row
constexpr int kWeightBytes = kColumns / 16 * kStageUnits * kUnitBytes;
constexpr int kStageBytes = kRows * kRowBytes + kWeightBytes;

template <class P>
class Product {
 public:
  __device__ explicit Product(const ProductCall& call) : call_(call) {
    shared_ = dynamic_shared<std::byte>();
    warp_ = static_cast<int>(threadIdx.x) / kWarp;
    lane_ = static_cast<int>(threadIdx.x) % kWarp;
    const int across = (call.columns + kColumns - 1) / kColumns;
    column_ = static_cast<int>(blockIdx.x % across) * kColumns;
    row_ = static_cast<std::int64_t>(blockIdx.x / across) * kRows;
  }

  __device__ void run() {
    const int stages = (call_.steps + kSixteens - 1) / kSixteens;
    for (int i = 0; i + 1 < kStages; ++i) prefetch(i, stages);
    float sums[kPairs][kRowTiles][2][4] = {};
    for (int i = 0; i < stages; ++i) {
      simt::cp_async_wait<kStages - 2>();
      __syncthreads();  // all copies are here, and the stage before has been read
      prefetch(i + kStages - 1, stages);
      multiply(shared_ + i % kStages * kStageBytes, sums);
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int column = column_ + (warp_ * kPairs + pair) * 16;
      if (column < call_.columns) finish(column, sums[pair]);
    }
  }

 private:
  // Groups of 16 inputs in a stage.
  static constexpr int kSixteens = kStageUnits / P::kSteps;
  static constexpr int kInputs = 16 * kSixteens;

  __device__ void prefetch(int stage, int stages) {
    if (stage < stages) {
      std::byte* to = shared_ + stage % kStages * kStageBytes;
      constexpr int kPieces = 4, kPiece = 16 / sizeof(typename P::Element);  // elements
      const auto* a = static_cast<const typename P::Element*>(call_.a);
      for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
        const std::int64_t row = row_ + i / kPieces;
        const int input = stage * kInputs + i % kPieces * kPiece;
        const bool exists = row < call_.rows && input < call_.depth;
        simt::cp_async16(to + i / kPieces * kRowBytes + i % kPieces * 16,
                         a + (exists ? row * call_.a_stride + input : 0), exists);
      }
      to += kRows * kRowBytes;
      constexpr int kLines = kStageUnits * kWarp;  // of 16 bytes, per 16 columns
      for (int i = threadIdx.x; i < kColumns / 16 * kLines; i += kThreads) {
        const std::int64_t sixteen = column_ / 16 + i / kLines;
        const int unit = stage * kStageUnits + i % kLines / kWarp;
        const bool exists = sixteen * 16 < call_.columns && unit < call_.steps * P::kSteps;
        const std::int64_t line = (sixteen * call_.steps * P::kSteps + unit) * kWarp + i % kWarp;
        simt::cp_async16(to + i * 16, call_.weight + (exists ? line * 16 : 0), exists);
      }
    }
    simt::cp_async_commit();
  }

  __device__ void multiply(const std::byte* stage, float (&sums)[kPairs][kRowTiles][2][4]) {
    float part[kPairs][kRowTiles][2][4] = {};
#pragma unroll
    for (int k = 0; k < kSixteens; ++k) {
      typename P::A a[kRowTiles][P::kSteps];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        P::load(stage + m * 16 * kRowBytes + k * 32, kRowBytes, lane_, a[m]);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
        for (int s = 0; s < P::kSteps; ++s) {
          const uint4 w = *reinterpret_cast<const uint4*>(
              stage + kRows * kRowBytes +
              ((warp_ * kPairs + pair) * kStageUnits + k * P::kSteps + s) * kUnitBytes +
              lane_ * 16);
          const typename P::B b[2] = {P::weight(w.x, w.y), P::weight(w.z, w.w)};
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int j = 0; j < 2; ++j)
              P::multiply((kShortSums<P> ? part : sums)[pair][m][j], a[m][s], b[j]);
        }
    }
    if constexpr (kShortSums<P>) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[pair][m][i / 4][i % 4] += part[pair][m][i / 4][i % 4];
    }
  }

  // The results of 16 columns: bias, gate, residual, norm, activation, store.
  __device__ void finish(int column, float (&h)[kRowTiles][2][4]) {
    each_pair(
        row_, call_.rows, column, lane_, h, [&](std::int64_t row, int at, float& x, float& y) {
          x += call_.bias[at];
          y += call_.bias[at + 1];
          if (call_.gate) {
            const std::int64_t image =
                (call_.first_row + row) / call_.per_image - call_.first_image;
            const float* gate = call_.gate + image * call_.gate_stride + at;
            x = x / (1.0f + expf(-gate[0]));
            y = y / (1.0f + expf(-gate[1]));
          }
          if (call_.add || call_.keep) {
            float2& kept = *reinterpret_cast<float2*>(call_.kept + row * call_.out_stride + at);
            if (call_.add) {
              x += kept.x;
              y += kept.y;
            }
            if (call_.keep) kept = make_float2(x, y);
          }
          if (call_.norm) {
            const float *scale = call_.norm, *shift = call_.norm + call_.columns;
            x = x * scale[at] + shift[at];
            y = y * scale[at + 1] + shift[at + 1];
          }
        });
    activate(h, call_.activation, call_.slope);
    each_pair(row_, call_.rows, column, lane_, h,
              [&](std::int64_t row, int at, float& x, float& y) {
                const std::int64_t place = row * call_.out_stride + at;
                if (call_.narrow)
                  Bf16::store_pair(static_cast<std::byte*>(call_.out) + place * 2, x, y);
                else
                  Tf32::store_pair(static_cast<std::byte*>(call_.out) + place * 4, x, y);
              });
  }

  const ProductCall& call_;
  std::byte* shared_;
  int warp_, lane_, column_;
  std::int64_t row_;
};

template <class P>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const __grid_constant__ ProductCall call) {
  Product<P>(call).run();
}

template <class P>
cudaError_t launch(const ProductCall& call, int device, cudaStream_t stream) {
  const auto kernel = product_kernel<P>;
  static SharedMemory allowed;
  const int error = allowed.allow(reinterpret_cast<const void*>(kernel), device);
  if (error != cudaSuccess) return static_cast<cudaError_t>(error);
  const std::int64_t blocks =
      (call.rows + kRows - 1) / kRows * ((call.columns + kColumns - 1) / kColumns);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kStages * kStageBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, call);
}

}  // namespace

int launch_product(const ProductCall& call, Precision precision, int device, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (precision) {
    case Precision::tf32x3:
      return launch<Tf32x3>(call, device, on);
    case Precision::tf32:
      return launch<Tf32>(call, device, on);
    case Precision::bf16:
      return launch<Bf16>(call, device, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fasthyp::coupling::cuda
