// planted KIND SEED: kernels with known mistakes; prints what they compute, or dies of them.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/simt.h"

namespace {

constexpr int kThreads = 96;

// Reverses a row through shared memory; without the barrier some threads read before the write.
template <bool kBarrier>
__global__ void reverse(const int* in, int* out) {
  int* row = fasthyp::dynamic_shared<int>();
  row[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

template <bool kBarrier>
__global__ void reverse_static(const int* in, int* out) {
  __shared__ int row[kThreads];
  row[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

__global__ void beyond(const int* in, int* out) {
  int* row = fasthyp::dynamic_shared<int>();
  row[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x + 1];
}

__global__ void divergent(const int* in, int* out) {
  if (threadIdx.x < 64) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x < 32) __shfl_down_sync(0xffffffffu, out[threadIdx.x], 1);
  if (threadIdx.x != 0) __shfl_down_sync(0xffffffffu, out[threadIdx.x], 1);
}

// The sum over each warp, by shuffles.
__global__ void warp_sum(const int* in, int* out) {
  int v = in[threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  out[threadIdx.x] = v;
}

// Threads 32 to 95 read what thread 0 writes.
template <int kCount>
__global__ void named(const int* in, int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = in[7];
  fasthyp::simt::named_barrier(3, kCount);
  out[threadIdx.x] = value;
}

// --- cp.async, ldmatrix and mma; `reverse` by 16 bytes, and products of matrices of ones ---

enum class Fault { none, wait, barrier, reuse, aligned, bounds };

template <Fault kFault>
__global__ void async_reverse(const int* in, int* out) {
  using namespace fasthyp::simt;
  constexpr int kPieces = kThreads / 4;
  int* row = fasthyp::dynamic_shared<int>();
  const int piece = threadIdx.x, other = kThreads - 1 - threadIdx.x;
  const int shift = kFault == Fault::aligned ? 1 : kFault == Fault::bounds ? 4 : 0;
  if (piece < kPieces) cp_async16(row + 4 * piece, in + 4 * piece + shift, true);
  cp_async_commit();
  if (kFault != Fault::wait) cp_async_wait<0>();
  if (kFault != Fault::barrier) __syncthreads();
  const int value = row[other];
  // the next copy into the same place must not start before all have read it
  if (kFault != Fault::reuse) __syncthreads();
  if (piece < kPieces) cp_async16(row + 4 * piece, nullptr, false);
  cp_async_commit();
  out[threadIdx.x] = value;
}

enum class Part { all, half, wrong_row, not_shared };

// Row i of a is i everywhere, b is the identity: column n of the product is column n of a.
template <Part kPart>
__global__ void product(const int*, int* out) {
  using namespace fasthyp::simt;
  __shared__ __align__(16) std::uint32_t a[16 * 12];
  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  const float value = static_cast<float>(lane % 16);
  for (int i = 0; i < 4; ++i)
    if (threadIdx.x < 32) a[lane % 16 * 12 + lane / 16 * 4 + i] = pack_bf16(value, value);
  __syncthreads();
  std::uint32_t fragment_a[4], fragment_b[2];
  const int row = kPart == Part::wrong_row ? (lane + 8) % 16 : lane % 16;
  const std::uint32_t* address = a + row * 12 + lane / 16 * 4;
  ldmatrix_x4(fragment_a, kPart == Part::not_shared ? fragment_a : address);
  fragment_b[0] = pack_bf16(group == 2 * t ? 1 : 0, group == 2 * t + 1 ? 1 : 0);
  fragment_b[1] = 0;
  float c[4] = {};
  if (kPart != Part::half || lane < 16) mma_bf16(c, fragment_a, fragment_b);
  out[threadIdx.x] = static_cast<int>(c[0] + c[1] + 100 * (c[2] + c[3])) / 2;
}

// Each block of a cluster of two gives the other one's row.
template <bool kBefore, bool kAfter>
__global__ void swap_blocks(const int* in, int* out) {
  using namespace fasthyp::simt;
  int* row = fasthyp::dynamic_shared<int>();
  const int other = 1 - cluster_rank(), half = kThreads / 2;
  if (threadIdx.x < half) row[threadIdx.x] = in[cluster_rank() * half + threadIdx.x];
  if (kBefore) cluster_sync();
  int value = -1;
  if (threadIdx.x < half) value = cluster_peer(row, other)[threadIdx.x];
  if (kAfter) cluster_sync();
  row[threadIdx.x] = 0;
  if (threadIdx.x < half) out[cluster_rank() * half + threadIdx.x] = value;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  simt::set_seed(std::strtoull(argv[2], nullptr, 10));
  const auto is = [&](const char* kind) { return std::strcmp(argv[1], kind) == 0; };
  alignas(16) int in[kThreads], out[kThreads] = {};
  for (int i = 0; i < kThreads; ++i) in[i] = i;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof in;
  struct Named {
    const char* name;
    void (*kernel)(const int*, int*);
  };
  constexpr Named kernels[] = {
      {"correct", reverse<true>},
      {"barrier", reverse<false>},
      {"static", reverse_static<true>},
      {"static, no barrier", reverse_static<false>},
      {"bounds", beyond},
      {"divergent", divergent},
      {"shuffle", warp_sum},
      {"configuration", warp_sum},
      {"shared", warp_sum},
      {"named", named<96>},
      {"named, too few", named<64>},
      {"named, too many", named<128>},
      {"named, half a warp", named<80>},
      {"async", async_reverse<Fault::none>},
      {"async, no wait", async_reverse<Fault::wait>},
      {"async, no barrier", async_reverse<Fault::barrier>},
      {"async, reused at once", async_reverse<Fault::reuse>},
      {"async, not aligned", async_reverse<Fault::aligned>},
      {"async, bounds", async_reverse<Fault::bounds>},
      {"product", product<Part::all>},
      {"product, half a warp", product<Part::half>},
      {"product, wrong row", product<Part::wrong_row>},
      {"product, not shared", product<Part::not_shared>},
      {"cluster", swap_blocks<true, true>},
      {"cluster, read too early", swap_blocks<false, true>},
      {"cluster, changed too early", swap_blocks<true, false>},
  };
  void (*kernel)(const int*, int*) = nullptr;
  for (const Named& k : kernels)
    if (is(k.name)) kernel = k.kernel;
  if (!kernel) return 2;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  if (std::strncmp(argv[1], "cluster", 7) == 0) {
    config.gridDim = dim3(2);
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  if (is("configuration")) config.blockDim = dim3(2048);
  if (is("shared")) config.dynamicSmemBytes = 48 * 1024 + 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, in, out);
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error));
  for (int i = 0; i < kThreads; ++i) std::printf("%d ", out[i]);
}
