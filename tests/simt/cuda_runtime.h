// Runs CUDA kernels on the host: enough of CUDA C++ and its runtime to compile the .cu files as
// C++.
//
// A block's threads are fibers of one OS thread. They switch only where CUDA would make them wait,
// at
// __syncthreads and at warp shuffles; which thread goes on is drawn from a seed, so that a missing
// barrier makes results depend on the seed, or wrong. Dynamic shared memory is a heap block of the
// size asked for, so AddressSanitizer sees accesses beyond it; it and the order of blocks change
// with the seed too. A barrier that not all threads reach is reported, and ends the program.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

void set_seed(std::uint64_t seed);
void block_barrier();
// Hands `bytes` of data to the warp, waits for the lanes of the mask, and copies those of `lane`.
void exchange(unsigned mask, const void* give, void* take, int lane, std::size_t bytes);
int lane_index();
void* dynamic_shared();
int run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread);

}  // namespace simt

inline void __syncthreads() { simt::block_barrier(); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  static_assert(std::is_trivially_copyable_v<T>);
  const int lane = simt::lane_index() + offset;
  T other = value;
  simt::exchange(mask, &value, &other, lane < 32 ? lane : simt::lane_index(), sizeof(T));
  return other;
}

namespace fasthyp {
template <class T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared());
}
}  // namespace fasthyp

// --- runtime: one device ---

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
};
using cudaStream_t = void*;
struct cudaDeviceProp {
  char name[256];
  int major, minor;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
const char* cudaGetErrorString(cudaError_t error);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return static_cast<cudaError_t>(simt::run(config->gridDim, config->blockDim,
                                            config->dynamicSmemBytes,
                                            [=] { kernel(Parameters(arguments)...); }));
}
