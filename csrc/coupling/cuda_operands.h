// Operands of tensor-core products, and what is computed per element, on the device.
//
// A warp multiplies 16 rows (A) with 16 columns of weights (two B tiles) over a k-step of 16 (bf16)
// or 8 (tf32) inputs. Lane l holds rows g = l / 4 and g + 8; with t = l % 4, its inputs are 2t,
// 2t+1 (and 8 more of each for bf16). tf32 products take inputs 2t and 2t + 1 where the instruction
// says t and t + 4: the order of inputs is free as long as A and B agree, and this one makes a
// result tile an A operand as it lies in the registers.
#pragma once

#include <cmath>

#include "common/simt.h"
#include "coupling/coupling.h"
#include "coupling/cuda.h"

namespace fasthyp::coupling::cuda {

// Packed weights come in units: two B tiles of one k-step, 16 bytes for each lane.
inline constexpr int kUnitBytes = 32 * 16;
// In shared memory, rows of 64 bytes lie this far apart, which avoids bank conflicts.
inline constexpr int kRowBytes = 80;

template <int kParts_>
struct Fragment {
  std::uint32_t r[kParts_][4];
};

__device__ __forceinline__ float as_float(std::uint32_t bits) { return __uint_as_float(bits); }

struct Bf16 {
  using Element = std::uint16_t;
  static constexpr int kSteps = 1;  // k-steps per 16 inputs
  static constexpr int kParts = 1;
  using A = Fragment<1>;

  // v[j][i]: of inputs 8j + 2t + i % 2, row g + 8 (i / 2).
  static __device__ __forceinline__ void split(const float (&v)[2][4], A (&a)[1]) {
    a[0].r[0][0] = simt::pack_bf16(v[0][0], v[0][1]);
    a[0].r[0][1] = simt::pack_bf16(v[0][2], v[0][3]);
    a[0].r[0][2] = simt::pack_bf16(v[1][0], v[1][1]);
    a[0].r[0][3] = simt::pack_bf16(v[1][2], v[1][3]);
  }
  // The lane's numbers of 16 rows of 16 elements, `stride` bytes apart.
  static __device__ __forceinline__ void load(const std::byte* rows, int stride, int lane,
                                              A (&a)[1]) {
    simt::ldmatrix_x4(a[0].r[0], rows + lane % 16 * stride + lane / 16 * 16);
  }
  static __device__ __forceinline__ void store_pair(std::byte* p, float x, float y) {
    *reinterpret_cast<std::uint32_t*>(p) = simt::pack_bf16(x, y);
  }
  struct B {
    std::uint32_t r[2];
  };
  static __device__ __forceinline__ B weight(std::uint32_t r0, std::uint32_t r1) {
    return {{r0, r1}};
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) {
    simt::mma_bf16(c, a.r[0], b.r);
  }
};

template <bool kBoth>
struct Tf32Operands {
  using Element = float;
  static constexpr int kSteps = 2;
  static constexpr int kParts = kBoth ? 2 : 1;
  using A = Fragment<kParts>;

  static __device__ __forceinline__ void set(A& a, int i, float v) {
    a.r[0][i] = simt::to_tf32(v);
    if constexpr (kBoth) a.r[1][i] = simt::to_tf32(v - as_float(a.r[0][i]));
  }
  static __device__ __forceinline__ void split(const float (&v)[2][4], A (&a)[2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      set(a[j], 0, v[j][0]);
      set(a[j], 1, v[j][2]);
      set(a[j], 2, v[j][1]);
      set(a[j], 3, v[j][3]);
    }
  }
  static __device__ __forceinline__ void load(const std::byte* rows, int stride, int lane,
                                              A (&a)[2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const std::byte* p = rows + lane / 4 * stride + j * 32 + lane % 4 * 8;
      const float2 low = *reinterpret_cast<const float2*>(p);
      const float2 high = *reinterpret_cast<const float2*>(p + 8 * stride);
      set(a[j], 0, low.x);
      set(a[j], 1, high.x);
      set(a[j], 2, low.y);
      set(a[j], 3, high.y);
    }
  }
  static __device__ __forceinline__ void store_pair(std::byte* p, float x, float y) {
    *reinterpret_cast<float2*>(p) = make_float2(x, y);
  }
  struct B {
    std::uint32_t r[kParts][2];
  };
  static __device__ __forceinline__ B weight(std::uint32_t r0, std::uint32_t r1) {
    B b;
    if constexpr (kBoth) {
      const float v[2] = {as_float(r0), as_float(r1)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b.r[0][i] = simt::to_tf32(v[i]);
        b.r[1][i] = simt::to_tf32(v[i] - as_float(b.r[0][i]));
      }
    } else {
      b.r[0][0] = r0;  // rounded when they were packed
      b.r[0][1] = r1;
    }
    return b;
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) {
    if constexpr (kBoth) {
      simt::mma_tf32(c, a.r[1], b.r[0]);
      simt::mma_tf32(c, a.r[0], b.r[1]);
    }
    simt::mma_tf32(c, a.r[0], b.r[0]);
  }
};
using Tf32 = Tf32Operands<false>;
using Tf32x3 = Tf32Operands<true>;

// Tensor cores cut what they add to a large sum; for tf32x3 short sums start from zero and are
// added in float32.
template <class P>
inline constexpr bool kShortSums = P::kParts > 1;

// --- per element ---

template <int kCount, class F>
__device__ __forceinline__ void apply(float (&x)[kCount][2][4], const F& f) {
#pragma unroll
  for (int m = 0; m < kCount; ++m)
#pragma unroll
    for (int i = 0; i < 8; ++i) x[m][i / 4][i % 4] = f(x[m][i / 4][i % 4]);
}

// Result tiles, activated; kind -1: as they are.
template <int kCount>
__device__ __forceinline__ void activate(float (&x)[kCount][2][4], int kind, float slope) {
  switch (kind) {
    case static_cast<int>(Activation::relu):
      return apply(x, [](float v) { return v < 0.0f ? 0.0f : v; });  // keeps NaN
    case static_cast<int>(Activation::leaky_relu):
      return apply(x, [=](float v) { return v < 0.0f ? v * slope : v; });
    case static_cast<int>(Activation::silu):
      return apply(x, [](float v) { return v / (1.0f + expf(-v)); });
    case static_cast<int>(Activation::tanh):
      return apply(x, [](float v) { return tanhf(v); });
    case static_cast<int>(Activation::gelu):
      return apply(x, [](float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678f)); });
    case static_cast<int>(Activation::gelu_tanh):
      return apply(x, [](float v) {
        return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
      });
    default:
      return;
  }
}

// Calls f(row, column, x, y) for the pairs that a lane holds of 16 columns, of rows that exist.
template <int kCount, class F>
__device__ __forceinline__ void each_pair(std::int64_t first_row, std::int64_t rows, int column,
                                          int lane, float (&h)[kCount][2][4], const F& f) {
#pragma unroll
  for (int m = 0; m < kCount; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = first_row + m * 16 + half * 8 + lane / 4;
      if (row < rows)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          f(row, column + j * 8 + lane % 4 * 2, h[m][j][2 * half], h[m][j][2 * half + 1]);
    }
}

// The soft clamp of a raw log-scale. 0.636, not 2/pi: FrEIA's constant.
__device__ __forceinline__ float soft_clamp(float raw, float clamp, int kind) {
  switch (kind) {
    case static_cast<int>(Clamp::atan):
      return clamp * (0.636f * atanf(raw));
    case static_cast<int>(Clamp::atan_scaled):
      return clamp * (0.636f * atanf(raw / clamp));
    case static_cast<int>(Clamp::tanh):
      return clamp * tanhf(raw);
    case static_cast<int>(Clamp::tanh_scaled):
      return clamp * tanhf(raw / clamp);
    case static_cast<int>(Clamp::sigmoid):
      return clamp * tanhf(0.5f * raw);
    default:
      return raw;
  }
}

}  // namespace fasthyp::coupling::cuda
