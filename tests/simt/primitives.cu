// primitives [SEED]: does what csrc/common/simt.h and the intrinsics promise, on the host or, built
// with nvcc, on a GPU; each against the plain computation. Prints what is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <random>

#include "common/simt.h"

namespace {

using namespace fasthyp;

constexpr int kWarps = 3, kThreads = 32 * kWarps;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kRows = 16, kColumns = 8;  // of a product of matrices, one a warp

// a: kRows x kDepth, b: kDepth x kColumns, by the formulas in simt.h.
__global__ void product_bf16(const float* a, const float* b, float* c) {
  constexpr int kDepth = 16;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  a += warp * kRows * kDepth;
  b += warp * kDepth * kColumns;
  c += warp * kRows * kColumns;
  const auto a_pair = [=](int row, int k) {
    return simt::pack_bf16(a[row * kDepth + k], a[row * kDepth + k + 1]);
  };
  const auto b_pair = [=](int k, int column) {
    return simt::pack_bf16(b[k * kColumns + column], b[(k + 1) * kColumns + column]);
  };
  const std::uint32_t fragment_a[4] = {a_pair(g, 2 * t), a_pair(g + 8, 2 * t), a_pair(g, 2 * t + 8),
                                       a_pair(g + 8, 2 * t + 8)};
  const std::uint32_t fragment_b[2] = {b_pair(2 * t, g), b_pair(2 * t + 8, g)};
  float sum[4] = {1, 1, 1, 1};
  simt::mma_bf16(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * kColumns + 2 * t + i % 2] = sum[i];
}

// The operands are not rounded, so that the hardware drops their low bits.
__global__ void product_tf32(const float* a, const float* b, float* c) {
  constexpr int kDepth = 8;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  a += warp * kRows * kDepth;
  b += warp * kDepth * kColumns;
  c += warp * kRows * kColumns;
  const auto a_word = [=](int row, int k) { return __float_as_uint(a[row * kDepth + k]); };
  const auto b_word = [=](int k, int column) { return __float_as_uint(b[k * kColumns + column]); };
  const std::uint32_t fragment_a[4] = {a_word(g, t), a_word(g + 8, t), a_word(g, t + 4),
                                       a_word(g + 8, t + 4)};
  const std::uint32_t fragment_b[2] = {b_word(t, g), b_word(t + 4, g)};
  float sum[4] = {1, 1, 1, 1};
  simt::mma_tf32(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * kColumns + 2 * t + i % 2] = sum[i];
}

// A product of `depth` that steps through tiles of 16: cp.async in two stages, ldmatrix, mma. The
// first warp does it all. a: kRows x depth, b: kColumns x depth, bfloat16; depth a multiple of 8.
__global__ void product_staged(const std::uint32_t* a, const std::uint32_t* b, float* c,
                               int depth) {
  constexpr int kPad = 12;                          // words a row: 16-byte rows, no bank twice
  constexpr int kTile = (kRows + kColumns) * kPad;  // words a stage
  std::uint32_t* stages = dynamic_shared<std::uint32_t>();
  const int lane = threadIdx.x, row = lane % 16, part = lane / 16;
  if (lane >= 32) return;
  const auto fetch = [=](int k) {
    std::uint32_t* stage = stages + k / 16 % 2 * kTile;
    const int at = k + 8 * part;
    const bool valid = at < depth;  // the rest of the last tile is zero
    simt::cp_async16(stage + row * kPad + 4 * part, a + (row * depth + at) / 2, valid);
    if (row < kColumns)
      simt::cp_async16(stage + (kRows + row) * kPad + 4 * part, b + (row * depth + at) / 2, valid);
    simt::cp_async_commit();
  };
  float sum[4] = {};
  fetch(0);
  for (int k = 0; k < depth; k += 16) {
    if (k + 16 < depth) {
      fetch(k + 16);
      simt::cp_async_wait<1>();
    } else {
      simt::cp_async_wait<0>();
    }
    __syncwarp();
    const std::uint32_t* stage = stages + k / 16 % 2 * kTile;
    std::uint32_t fragment_a[4], fragment_b[2];
    simt::ldmatrix_x4(fragment_a, stage + row * kPad + 4 * part);
    simt::ldmatrix_x2(fragment_b, stage + (kRows + lane % 8) * kPad + lane / 8 % 2 * 4);
    simt::mma_bf16(sum, fragment_a, fragment_b);
    __syncwarp();
  }
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * kColumns + lane % 4 * 2 + i % 2] = sum[i];
}

__global__ void convert(const float* in, std::uint32_t* tf32, std::uint32_t* bf16) {
  tf32[threadIdx.x] = simt::to_tf32(in[threadIdx.x]);
  bf16[threadIdx.x] = simt::pack_bf16(in[threadIdx.x], 1.0f);
}

constexpr int kChecks = 16;

// out[threadIdx.x * kChecks + ...]: what the host can tell in advance.
__global__ void intrinsics(int* out, int* counters) {
  __shared__ int handed[32], row[kThreads];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int* mine = out + thread * kChecks;
  mine[0] = __shfl_sync(kAll, thread, lane / 2);
  mine[1] = __shfl_xor_sync(kAll, thread, 5);
  mine[2] = __shfl_up_sync(kAll, thread, 3);
  mine[3] = __shfl_down_sync(kAll, thread, 3);
  mine[4] = __shfl_down_sync(kAll, thread, 3, 8);
  mine[5] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  mine[6] = __any_sync(kAll, thread == 40) + 2 * __all_sync(kAll, thread < 40);
  mine[7] = __syncthreads_or(thread == 77) + 2 * __syncthreads_or(0);
  // the first warp waits for the second, not for the third
  if (warp == 1) handed[lane] = thread;
  if (warp < 2) simt::named_barrier(1, 64);
  mine[8] = warp == 0 ? handed[31 - lane] : 0;
  if (lane < 16) mine[9] = __shfl_sync(0xffffu, thread, 15 - lane);
  mine[9] = lane < 16 ? mine[9] : 0;
  row[thread] = 3 * thread;
  __syncthreads();
  mine[10] = row[kThreads - 1 - thread];
  atomicAdd(&counters[0], thread);
  atomicMax(&counters[1], thread);
  mine[11] = static_cast<int>(__float_as_uint(__fmaf_rn(1 + 1e-7f * lane, 1 - 1e-7f, -1.0f)));
}

int failures = 0;

void check(bool right, const char* what, int place) {
  if (!right && ++failures < 20) std::printf("%s is wrong at %d\n", what, place);
}

template <class T>
T* array(int count) {
  T* p = nullptr;
  if (cudaMallocManaged(&p, count * sizeof(T)) != cudaSuccess) std::exit(3);
  return p;
}

template <class... Parameters, class... Arguments>
void launch(std::size_t shared_bytes, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.gridDim = dim3(1);
  config.dynamicSmemBytes = shared_bytes;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(3);
}

float bits_as_float(std::uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
std::uint32_t float_as_bits(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

// To the nearest number whose lowest bits are zero; in double, so that nothing is rounded twice.
float rounded(float v, int bits, bool ties_to_even) {
  if (!std::isfinite(v) || v == 0) return v;
  const double unit = std::ldexp(1.0, std::ilogb(v) - 23 + bits), q = std::fabs(v) / unit;
  const double n = ties_to_even ? std::nearbyint(q) : std::floor(q + 0.5);
  return static_cast<float>(std::copysign(n * unit, v));
}
float cut(float v) { return bits_as_float(float_as_bits(v) & ~0x1fffu); }
float as_bf16(float v) { return rounded(v, 16, true); }

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
#ifndef __CUDACC__
  simt::set_seed(seed);
#endif
  std::mt19937 random(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  const auto fill = [&](float* p, int count) {
    for (int i = 0; i < count; ++i) p[i] = normal(random);
  };

  float *a = array<float>(kWarps * kRows * 16), *b = array<float>(kWarps * 16 * kColumns),
        *c = array<float>(kWarps * kRows * kColumns);
  const auto compare = [&](const char* what, int depth, float (*operand)(float)) {
    for (int i = 0; i < kWarps * kRows * kColumns; ++i) {
      const int warp = i / (kRows * kColumns), row = i / kColumns % kRows, column = i % kColumns;
      double sum = 1;
      for (int k = 0; k < depth; ++k)
        sum += static_cast<double>(operand(a[(warp * kRows + row) * depth + k])) *
               operand(b[(warp * depth + k) * kColumns + column]);
      check(std::fabs(c[i] - sum) < 1e-5, what, i);
    }
  };
  fill(a, kWarps * kRows * 16);
  fill(b, kWarps * 16 * kColumns);
  launch(0, product_bf16, a, b, c);
  compare("mma_bf16", 16, as_bf16);
  launch(0, product_tf32, a, b, c);
  compare("mma_tf32", 8, cut);

  for (const int depth : {16, 48, 40}) {
    std::uint32_t *left = array<std::uint32_t>(kRows * depth / 2),
                  *right = array<std::uint32_t>(kColumns * depth / 2);
    const auto elements = [&](std::uint32_t* words, int rows) {
      for (int i = 0; i < rows * depth / 2; ++i)
        words[i] = float_as_bits(as_bf16(normal(random))) >> 16 |
                   (float_as_bits(as_bf16(normal(random))) & 0xffff0000u);
    };
    const auto element = [&](const std::uint32_t* words, int row, int k) {
      const std::uint32_t word = words[(row * depth + k) / 2];
      return static_cast<double>(bits_as_float(k % 2 ? word & 0xffff0000u : word << 16));
    };
    elements(left, kRows);
    elements(right, kColumns);
    launch(2 * (kRows + kColumns) * 12 * 4, product_staged, left, right, c, depth);
    for (int i = 0; i < kRows * kColumns; ++i) {
      double sum = 0;
      for (int k = 0; k < depth; ++k)
        sum += element(left, i / kColumns, k) * element(right, i % kColumns, k);
      check(std::fabs(c[i] - sum) < 1e-4, "cp.async, ldmatrix and mma_bf16", i);
    }
    cudaFree(left);
    cudaFree(right);
  }

  std::uint32_t *tf32 = array<std::uint32_t>(kThreads), *bf16 = array<std::uint32_t>(kThreads);
  fill(a, kThreads);
  const float special[] = {
      0.0f,          -0.0f,          1 + 0x1p-11f,    1 + 0x3p-11f, 1 + 0x1p-8f,
      1 + 0x3p-8f,   -(1 + 0x1p-8f), HUGE_VALF,       -HUGE_VALF,   NAN,
      3.4028235e38f, 1 + 0x1.2p-8f,  -(1 + 0x1p-11f), 1e-30f};
  std::copy(std::begin(special), std::end(special), a);
  launch(0, convert, a, tf32, bf16);
  for (int i = 0; i < kThreads; ++i) {
    const float as_tf32 = bits_as_float(tf32[i] & ~0x1fffu), low = bits_as_float(bf16[i] << 16);
    const bool nan = std::isnan(a[i]);
    check(nan ? std::isnan(as_tf32)
              : float_as_bits(as_tf32) == float_as_bits(rounded(a[i], 13, false)),
          "to_tf32", i);
    check(nan ? std::isnan(low) : float_as_bits(low) == float_as_bits(as_bf16(a[i])), "pack_bf16",
          i);
    check(bf16[i] >> 16 == 0x3f80, "pack_bf16, the high half", i);
  }

  int *out = array<int>(kThreads * kChecks), *counters = array<int>(2);
  counters[0] = counters[1] = 0;
  launch(0, intrinsics, out, counters);
  for (int i = 0; i < kThreads; ++i) {
    const int lane = i % 32, base = i - lane;
    const int expected[] = {
        base + lane / 2,
        base + (lane ^ 5),
        lane < 3 ? i : i - 3,
        lane > 28 ? i : i + 3,
        lane % 8 > 4 ? i : i + 3,
        0x49249249,
        (base == 32) + 2 * (base == 0),
        1,
        base == 0 ? 63 - lane : 0,
        lane < 16 ? base + 15 - lane : 0,
        3 * (kThreads - 1 - i),
        static_cast<int>(float_as_bits(std::fma(1 + 1e-7f * lane, 1 - 1e-7f, -1.0f)))};
    for (int k = 0; k < 12; ++k) check(out[i * kChecks + k] == expected[k], "intrinsic", k);
  }
  check(counters[0] == kThreads * (kThreads - 1) / 2, "atomicAdd", 0);
  check(counters[1] == kThreads - 1, "atomicMax", 0);
  for (void* p : {static_cast<void*>(a), static_cast<void*>(b), static_cast<void*>(c),
                  static_cast<void*>(tf32), static_cast<void*>(bf16), static_cast<void*>(out),
                  static_cast<void*>(counters)})
    cudaFree(p);
  if (failures == 0) std::printf("all primitives are right\n");
  return failures == 0 ? 0 : 1;
}
