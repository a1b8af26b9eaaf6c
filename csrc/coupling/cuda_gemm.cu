// The products of training: a layer, the gradient of its input, the gradient of its weight.
//
// A block computes a tile of the result, from tiles of both operands that are copied to shared
// memory two stages of 16 ahead. An operand lies there as in global memory: its lines of 16 numbers
// of the sum, or, where the sum runs across its lines, 16 of its lines. What a result goes through
// before or after it happens while it is in registers.
#include <algorithm>

#include "common/cuda_device.h"
#include "common/simt.h"
#include "coupling/cuda_gradients.h"

namespace fasthyp::coupling::cuda::training {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kDepth = 16;  // of a stage
constexpr int kStages = 3;
// The distance of lines of kDepth, and what lines across are longer than the tile: neither has
// fragments with bank conflicts.
constexpr int kPitch = 24;
constexpr int kMargin = 4;

// 64 x 128 for most, 128 x 48 for few columns.
template <int kRowTiles_, int kPairs_, int kAcross_>
struct Shape {
  static constexpr int kRowTiles = kRowTiles_;  // of 16 rows, per warp
  static constexpr int kPairs = kPairs_;        // of 8 columns, per warp
  static constexpr int kAcross = kAcross_;      // warps side by side
  static constexpr int kRows = 16 * kRowTiles * (kWarps / kAcross);
  static constexpr int kColumns = 16 * kPairs * kAcross;
};
using Broad = Shape<4, 2, 4>;
using Tall = Shape<2, 3, 1>;

// An operand's tile in shared memory: kLines of its rows or columns, a stage of the sum.
template <int kLines, bool kAlong>
struct Tile {
  static constexpr int kLength = kAlong ? kLines * kPitch : kDepth * (kLines + kMargin);

  static __device__ __forceinline__ int place(int line, int k) {
    return kAlong ? line * kPitch + k : k * (kLines + kMargin) + line;
  }

  // Starts the copies of lines [line, lines), numbers [k, end) of the sum; zeros beyond.
  static __device__ __forceinline__ void copy(float* to, const Operand& from, bool wide, int line,
                                              int lines, int k, int end) {
    constexpr int kInner = kAlong ? kDepth : kLines;
    const int outer = kAlong ? line : k, outers = kAlong ? lines : end;
    const int inner = kAlong ? k : line, inners = kAlong ? end : lines;
    constexpr int kOuter = kAlong ? kLines : kDepth;
    constexpr int kStride = kAlong ? kPitch : kLines + kMargin;
    if (wide) {
      constexpr int kPieces = kInner / 4;
#pragma unroll 4
      for (int i = threadIdx.x; i < kOuter * kPieces; i += kThreads) {
        const int o = outer + i / kPieces, n = inner + i % kPieces * 4;
        const bool exists = o < outers && n < inners;
        simt::cp_async16(to + i / kPieces * kStride + i % kPieces * 4,
                         exists ? from.at + o * from.stride + n : from.at, exists);
      }
    } else {
#pragma unroll 4
      for (int i = threadIdx.x; i < kOuter * kInner; i += kThreads) {
        const int o = outer + i / kInner, n = inner + i % kInner;
        const bool exists = o < outers && n < inners;
        const float* source = from.at;
        if (exists) source += o * from.stride + (from.index ? from.index[n] : n);
        simt::cp_async4(to + i / kInner * kStride + i % kInner, source, exists);
      }
    }
  }

  // Numbers k and k + 1 of the sum, of one line; k is even.
  static __device__ __forceinline__ float2 pair(const float* tile, int line, int k) {
    if constexpr (kAlong) return *reinterpret_cast<const float2*>(tile + place(line, k));
    return make_float2(tile[place(line, k)], tile[place(line, k + 1)]);
  }
};

template <Form kForm, class P, class S>
class Product {
 public:
  using A = Tile<S::kRows, kForm != Form::weight>;
  using B = Tile<S::kColumns, kForm == Form::layer>;
  static constexpr int kStage = A::kLength + B::kLength;
  static constexpr int kBytes = kStages * kStage * static_cast<int>(sizeof(float));

  __device__ explicit Product(const Gemm& call) : call_(call) {
    shared_ = dynamic_shared<float>();
    warp_ = static_cast<int>(threadIdx.x) / kWarp;
    lane_ = static_cast<int>(threadIdx.x) % kWarp;
    const unsigned across = max((call.n + S::kColumns - 1) / S::kColumns, 1);
    const unsigned down = (call.m + S::kRows - 1) / S::kRows;
    column_ = static_cast<int>(blockIdx.x % across) * S::kColumns;
    row_ = static_cast<int>(blockIdx.x / across % down) * S::kRows;
    part_ = static_cast<int>(blockIdx.x / across / down);
    warp_row_ = warp_ / S::kAcross * S::kRowTiles * 16;
    warp_column_ = warp_ % S::kAcross * S::kPairs * 16;
    begin_ = part_ * call.part;
    end_ = min(begin_ + call.part, call.k);
  }

  __device__ void run() {
    const int stages = (end_ - begin_ + kDepth - 1) / kDepth;
    for (int i = 0; i + 1 < kStages; ++i) prefetch(i, stages);
    float sums[S::kPairs][S::kRowTiles][2][4] = {};
    float column_sum = 0;
    for (int i = 0; i < stages; ++i) {
      simt::cp_async_wait<kStages - 2>();
      __syncthreads();  // all copies are here, and the stage before has been read
      prefetch(i + kStages - 1, stages);
      const float* stage = shared_ + i % kStages * kStage;
      if (kForm == Form::weight && call_.sums && column_ == 0 && threadIdx.x < S::kRows) {
        float sum = 0;
#pragma unroll
        for (int k = 0; k < kDepth; ++k) sum += stage[A::place(threadIdx.x, k)];
        column_sum += sum;
      }
      if (row_ + warp_row_ < call_.m && column_ + warp_column_ < call_.n) multiply(stage, sums);
    }
    if (kForm == Form::weight && call_.sums && column_ == 0 && threadIdx.x < S::kRows) {
      const int row = row_ + threadIdx.x;
      if (row < call_.m) {
        float& to = call_.sums[part_ * call_.part_sums + row];
        to = call_.accumulate ? to + column_sum : column_sum;
      }
    }
#pragma unroll
    for (int pair = 0; pair < S::kPairs; ++pair) {
      const int column = column_ + warp_column_ + pair * 16;
      if (column < call_.n) finish(column, sums[pair]);
    }
  }

 private:
  __device__ void prefetch(int stage, int stages) {
    if (stage < stages) {
      float* to = shared_ + stage % kStages * kStage;
      const int k = begin_ + stage * kDepth;
      A::copy(to, call_.a, call_.a_wide, row_, call_.m, k, end_);
      B::copy(to + A::kLength, call_.b, call_.b_wide, column_, call_.n, k, end_);
    }
    simt::cp_async_commit();
  }

  // Lane l takes numbers 2t and 2t + 1 of eight for t = l % 4, as in cuda_operands.h.
  __device__ void multiply(const float* stage, float (&sums)[S::kPairs][S::kRowTiles][2][4]) {
    const int g = lane_ / 4, t = lane_ % 4;
    const float *a_tile = stage, *b_tile = stage + A::kLength;
    float part[S::kPairs][S::kRowTiles][2][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      typename P::A a[S::kRowTiles];
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
        const int line = warp_row_ + m * 16 + g;
        const float2 low = A::pair(a_tile, line, k + 2 * t);
        const float2 high = A::pair(a_tile, line + 8, k + 2 * t);
        P::set(a[m], 0, low.x);
        P::set(a[m], 1, high.x);
        P::set(a[m], 2, low.y);
        P::set(a[m], 3, high.y);
      }
#pragma unroll
      for (int pair = 0; pair < S::kPairs; ++pair) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 v = B::pair(b_tile, warp_column_ + pair * 16 + j * 8 + g, k + 2 * t);
          typename P::B b;
          b.r[0][0] = simt::to_tf32(v.x);
          b.r[0][1] = simt::to_tf32(v.y);
          if constexpr (P::kParts > 1) {
            b.r[1][0] = simt::to_tf32(v.x - as_float(b.r[0][0]));
            b.r[1][1] = simt::to_tf32(v.y - as_float(b.r[0][1]));
          }
#pragma unroll
          for (int m = 0; m < S::kRowTiles; ++m)
            P::multiply((kShortSums<P> ? part : sums)[pair][m][j], a[m], b);
        }
      }
    }
    if constexpr (kShortSums<P>) {
#pragma unroll
      for (int pair = 0; pair < S::kPairs; ++pair)
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m)
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[pair][m][i / 4][i % 4] += part[pair][m][i / 4][i % 4];
    }
  }

  // --- results, two columns at a time ---

  using Sums = float[S::kRowTiles][2][4];

  // Calls f(row, column, x, y) for the pairs that a lane holds of 16 columns. The second column of
  // a pair may be one that is not there.
  template <class F>
  __device__ __forceinline__ void each(int column, Sums& h, const F& f) const {
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_ + warp_row_ + m * 16 + half * 8 + lane_ / 4;
        if (row < call_.m)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int at = column + j * 8 + lane_ % 4 * 2;
            if (at < call_.n) f(row, at, h[m][j][2 * half], h[m][j][2 * half + 1]);
          }
      }
  }
  __device__ __forceinline__ float2 load(const float* from, int column) const {
    if (call_.pairs) return *reinterpret_cast<const float2*>(from + column);
    return make_float2(from[column], column + 1 < call_.n ? from[column + 1] : 0.0f);
  }
  __device__ __forceinline__ void store(float* to, int column, float x, float y) const {
    if (call_.pairs) {
      *reinterpret_cast<float2*>(to + column) = make_float2(x, y);
    } else {
      to[column] = x;
      if (column + 1 < call_.n) to[column + 1] = y;
    }
  }

  __device__ void finish(int column, Sums& h) {
    if constexpr (kForm == Form::layer) {
      finish_layer(column, h);
    } else if constexpr (kForm == Form::input) {
      finish_input(column, h);
    } else {
      each(column, h, [&](int row, int at, float& x, float& y) {
        float* to = call_.out + part_ * call_.part_numbers + row * call_.out_stride;
        add_to(to, at, x, y);
        store(to, at, x, y);
      });
    }
  }
  __device__ __forceinline__ void add_to(const float* to, int column, float& x, float& y) const {
    if (!call_.accumulate) return;
    const float2 before = load(to, column);
    x += before.x;
    y += before.y;
  }

  __device__ void finish_layer(int column, Sums& h) {
    each(column, h, [&](int row, int at, float& x, float& y) {
      const std::int64_t place = row * call_.value_stride;
      const int image = call_.hoisted || call_.gate ? image_of(call_.images, row) : 0;
      if (call_.bias) {
        const float2 v = load(call_.bias, at);
        x += v.x;
        y += v.y;
      }
      if (call_.hoisted) {
        const float2 v = load(call_.hoisted + image * call_.hoisted_stride, at);
        x += v.x;
        y += v.y;
      }
      if (call_.before_gate) store(call_.before_gate + place, at, x, y);
      if (call_.gate) {
        const float2 v = load(call_.gate + image * call_.hoisted_stride, at);
        x = x / (1.0f + expf(-v.x));
        y = y / (1.0f + expf(-v.y));
      }
      if (call_.kept) {
        const float2 v = load(call_.kept + place, at);
        x += v.x;
        y += v.y;
      }
      if (call_.before_norm) store(call_.before_norm + place, at, x, y);
      if (call_.scale) {
        const float2 scale = load(call_.scale, at), shift = load(call_.shift, at);
        x = x * scale.x + shift.x;
        y = y * scale.y + shift.y;
      }
      if (call_.before_activation) store(call_.before_activation + place, at, x, y);
    });
    activate(h, call_.activation, call_.slope);
    each(column, h, [&](int row, int at, float& x, float& y) {
      store(call_.out + row * call_.out_stride, at, x, y);
    });
  }

  __device__ void finish_input(int column, Sums& h) {
    if (call_.derivative)
      with_derivative(call_.activation, call_.slope, [&](const auto& derivative) {
        each(column, h, [&](int row, int at, float& x, float& y) {
          const float2 v = load(call_.derivative + row * call_.value_stride, at);
          x *= derivative(v.x);
          y *= derivative(v.y);
        });
      });
    each(column, h, [&](int row, int at, float& x, float& y) {
      float* to = call_.out + row * call_.out_stride;
      if (call_.out_index) {
        to[call_.out_index[at]] += x;
        if (at + 1 < call_.n) to[call_.out_index[at + 1]] += y;
      } else {
        add_to(to, at, x, y);
        store(to, at, x, y);
      }
    });
  }

  const Gemm& call_;
  float* shared_;
  int warp_, lane_, column_, row_, part_, warp_row_, warp_column_, begin_, end_;
};

template <Form kForm, class P, class S>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Gemm call) {
  Product<kForm, P, S>(call).run();
}

template <Form kForm, class P, class S>
cudaError_t launch(const Gemm& call, int device, cudaStream_t stream) {
  const auto kernel = gemm_kernel<kForm, P, S>;
  static SharedMemory allowed;
  const int error = allowed.allow(reinterpret_cast<const void*>(kernel), device);
  if (error != cudaSuccess) return static_cast<cudaError_t>(error);
  const std::int64_t across = std::max((call.n + S::kColumns - 1) / S::kColumns, 1);
  const std::int64_t down = (call.m + S::kRows - 1) / S::kRows;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(across * down * call.parts));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Product<kForm, P, S>::kBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, call);
}

template <Form kForm, class P>
cudaError_t launch_shaped(const Gemm& call, int device, cudaStream_t stream) {
  const auto padded = [&](int columns) { return (call.n + columns - 1) / columns * columns; };
  // Broad tiles read each operand less often.
  if (padded(Broad::kColumns) * 8 <= padded(Tall::kColumns) * 9)
    return launch<kForm, P, Broad>(call, device, stream);
  return launch<kForm, P, Tall>(call, device, stream);
}

template <class P>
cudaError_t launch_form(Form form, const Gemm& call, int device, cudaStream_t stream) {
  switch (form) {
    case Form::layer:
      return launch_shaped<Form::layer, P>(call, device, stream);
    case Form::input:
      return launch_shaped<Form::input, P>(call, device, stream);
    case Form::weight:
      return launch_shaped<Form::weight, P>(call, device, stream);
  }
  return cudaErrorInvalidValue;
}

bool aligned(const void* p, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

}  // namespace

int launch_gemm(Form form, const Gemm& given, Precision precision, int device, void* stream) {
  if (given.m <= 0) return cudaSuccess;
  Gemm call = given;
  const auto wide = [](const Operand& o, int inner) {
    return !o.index && aligned(o.at, 16) && o.stride % 4 == 0 && inner % 4 == 0;
  };
  call.a_wide = wide(call.a, form == Form::weight ? call.m : call.k);
  call.b_wide = wide(call.b, form == Form::layer ? call.k : call.n);
  call.pairs = call.n % 2 == 0 && call.out_stride % 2 == 0 && call.value_stride % 2 == 0 &&
               call.hoisted_stride % 2 == 0 && call.part_numbers % 2 == 0;
  for (const float* p :
       {call.bias, call.hoisted, call.gate, call.kept, call.scale, call.shift, call.derivative,
        static_cast<const float*>(call.out), static_cast<const float*>(call.before_gate),
        static_cast<const float*>(call.before_norm),
        static_cast<const float*>(call.before_activation)})
    call.pairs = call.pairs && aligned(p, 8);
  const auto on = static_cast<cudaStream_t>(stream);
  return precision == Precision::tf32x3 ? launch_form<Tf32x3>(form, call, device, on)
                                        : launch_form<Tf32>(form, call, device, on);
}

}  // namespace fasthyp::coupling::cuda::training
