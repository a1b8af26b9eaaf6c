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

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  simt::set_seed(std::strtoull(argv[2], nullptr, 10));
  const auto is = [&](const char* kind) { return std::strcmp(argv[1], kind) == 0; };
  int in[kThreads], out[kThreads] = {};
  for (int i = 0; i < kThreads; ++i) in[i] = i;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof in;
  const auto kernel = is("correct")     ? reverse<true>
                      : is("barrier")   ? reverse<false>
                      : is("bounds")    ? beyond
                      : is("divergent") ? divergent
                                        : warp_sum;
  if (is("configuration")) config.blockDim = dim3(2048);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, in, out);
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error));
  for (int i = 0; i < kThreads; ++i) std::printf("%d ", out[i]);
}
