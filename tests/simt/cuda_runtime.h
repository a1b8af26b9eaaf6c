// Runs CUDA kernels on the host: enough of CUDA C++ and its runtime to compile the .cu files as
// C++.
//
// A block's threads are fibers of one OS thread. They switch only where CUDA would make them wait:
// at barriers and where a warp's lanes exchange something. Which thread goes on is drawn from a
// seed, so that a missing barrier makes results depend on the seed, or wrong. Shared memory starts
// as noise, and what cp.async copies arrives only when it is waited for, until when the destination
// is NaN. Dynamic shared memory is a heap block of the size asked for, so AddressSanitizer sees
// accesses beyond it. Waiting for threads that never come is reported, and ends the program.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
// Blocks run one after the other, so one is enough. Thread-local, for the emulation to find these
// variables: there are no others of that kind.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fasthyp::simt {

[[noreturn]] void fail(const char* what);
void set_seed(std::uint64_t seed);

// Waits for `threads` threads of the block at barrier `id`, or for all that have not ended where
// threads is 0. How many of them voted yes.
int barrier(int id, int threads, bool vote = false);

// Waits until all lanes of the mask are here; the last one then calls `complete` with what each
// lane brought, null for lanes that are not in the mask or in the block.
using Complete = void (*)(void* const (&lanes)[32]);
void meet(unsigned mask, void* mine, Complete complete);

int lane_index();
void* dynamic_shared();

int set_shared_limit(const void* kernel, int bytes);
int run(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, unsigned cluster_size,
        const std::function<void()>& thread);

template <class T>
T shuffle(unsigned mask, T value, int from) {
  static_assert(std::is_trivially_copyable_v<T>);
  struct Lane {
    T give, take;
    int from;
  } lane{value, value, from};
  meet(mask, &lane, [](void* const(&lanes)[32]) {
    for (void* p : lanes) {
      if (!p) continue;
      Lane& to = *static_cast<Lane*>(p);
      if (!lanes[to.from]) fail("shuffle from a lane that takes no part");
      to.take = static_cast<Lane*>(lanes[to.from])->give;
    }
  });
  return lane.take;
}

}  // namespace fasthyp::simt

namespace simt = fasthyp::simt;

// --- the language ---

inline void __syncthreads() { simt::barrier(0, 0); }
inline int __syncthreads_count(int vote) { return simt::barrier(0, 0, vote != 0); }
inline int __syncthreads_or(int vote) { return simt::barrier(0, 0, vote != 0) > 0; }
inline int __syncthreads_and(int vote) { return simt::barrier(0, 0, vote == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::meet(mask, &mask, [](void* const(&)[32]) {});
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  struct Lane {
    bool yes;
    unsigned votes;
  } lane{vote != 0, 0};
  simt::meet(mask, &lane, [](void* const(&lanes)[32]) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i)
      if (lanes[i] && static_cast<Lane*>(lanes[i])->yes) votes |= 1u << i;
    for (void* p : lanes)
      if (p) static_cast<Lane*>(p)->votes = votes;
  });
  return lane.votes;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, !vote) == 0; }

// Lanes of one group of `width` only; a lane outside it gives a lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = simt::lane_index();
  return simt::shuffle(mask, value, lane / width * width + (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = simt::lane_index(), from = lane ^ bits;
  return simt::shuffle(mask, value, from / width > lane / width ? lane : from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset, int width = 32) {
  const int lane = simt::lane_index(), from = lane - static_cast<int>(offset);
  return simt::shuffle(mask, value, from < lane / width * width ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, int width = 32) {
  const int lane = simt::lane_index(), from = lane + static_cast<int>(offset);
  return simt::shuffle(mask, value, from >= (lane / width + 1) * width ? lane : from);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = std::max(old, v);
  return old;
}

using std::max;
using std::min;
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
inline double rsqrt(double a) { return 1 / std::sqrt(a); }
inline unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }
inline int __float_as_int(float a) { return std::bit_cast<int>(a); }
inline float __int_as_float(int a) { return std::bit_cast<float>(a); }
inline int __popc(unsigned a) { return std::popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return std::countl_zero(static_cast<unsigned>(a)); }

#define SIMT_VECTORS(T, name)                                                   \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                    \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
#undef SIMT_VECTORS

// --- what csrc/common/simt.h writes in PTX, and describes ---

namespace fasthyp {

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared());
}

namespace simt {

void named_barrier(int id, int threads);
int cluster_rank();
void cluster_sync();
void* cluster_peer_address(void* shared, int rank);
template <class T>
T* cluster_peer(T* shared, int rank) {
  return static_cast<T*>(cluster_peer_address(shared, rank));
}
void cp_async16(void* shared, const void* global, bool valid);
void cp_async4(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait_groups(int left);
template <int N>
void cp_async_wait() {
  cp_async_wait_groups(N);
}
void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row);
void ldmatrix_x2(std::uint32_t (&r)[2], const void* shared_row);
void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
std::uint32_t to_tf32(float v);
std::uint32_t pack_bf16(float low, float high);

}  // namespace simt
}  // namespace fasthyp

// --- the runtime: one device ---

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
using cudaStream_t = void*;
struct cudaDeviceProp {
  char name[256];
  int major, minor;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaFree(void* p);
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);

template <class T>
cudaError_t cudaMallocManaged(T** p, std::size_t bytes) {
  *p = static_cast<T*>(::operator new(bytes));
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  return static_cast<cudaError_t>(simt::set_shared_limit(kernel, value));
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  return static_cast<cudaError_t>(simt::run(reinterpret_cast<const void*>(kernel), config->gridDim,
                                            config->blockDim, config->dynamicSmemBytes, cluster,
                                            [=] { kernel(Parameters(arguments)...); }));
}
