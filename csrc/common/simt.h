// What kernels write differently from plain CUDA C++, so that the tests can also compile them for
// the host: tests/simt has a cuda_runtime.h of its own, with an emulation of everything here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__
namespace fasthyp {

// The shared memory whose size the launch gives.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char fasthyp_dynamic_shared[];
  return reinterpret_cast<T*>(fasthyp_dynamic_shared);
}

namespace simt {

// Waits until `threads` threads of the block, whole warps, have come here; id is 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes, both addresses multiples of 16; zeros, and nothing read, if not valid.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) =
      valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// The same for 4 bytes, at multiples of 4.
__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 4 : 0)
               : "memory");
#else
  *static_cast<std::uint32_t*>(shared) = valid ? *static_cast<const std::uint32_t*>(global) : 0u;
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last N groups of this thread have arrived.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Loads four (two) 8 x 8 matrices of 16-bit elements. Lane 8 m + i gives the address of row i of
// matrix m, 16 bytes at a multiple of 16, and receives in r[m] elements 2 (lane % 4) and the next
// one of row lane / 4. x2 does not read the addresses of lanes 16 to 31.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(std::uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

// Rounded to 10 bits of mantissa, ties away from zero; NaN stays NaN.
__device__ __forceinline__ std::uint32_t to_tf32(float v) {
#if __CUDA_ARCH__ >= 800
  std::uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
#else
  return v != v ? 0x7fffffffu : (__float_as_uint(v) + 0x1000u) & ~0x1fffu;
#endif
}

// Two bfloat16 in one word, rounded to nearest even; NaN stays NaN.
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  const auto round = [](float v) {
    const std::uint32_t bits = __float_as_uint(v);
    return v != v ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
#endif
}

#if __CUDA_ARCH__ < 800
// The products of tensor cores that lack the type. Slot s of a row of a, or of a column of b, lies
// in lane s % 4 of its group of four lanes, in the registers of half s / 4. A call, or kernels
// would be made of little else.
template <bool kBf16>
__device__ __noinline__ float4 mma_by_shuffles(float4 c, uint4 a, uint2 b) {
  constexpr unsigned kAll = 0xffffffffu;
  const auto multiply = [](float sum, std::uint32_t x, std::uint32_t y) {
    if (!kBf16) return fmaf(__uint_as_float(x & ~0x1fffu), __uint_as_float(y & ~0x1fffu), sum);
    sum = fmaf(__uint_as_float(x << 16), __uint_as_float(y << 16), sum);
    return fmaf(__uint_as_float(x & 0xffff0000u), __uint_as_float(y & 0xffff0000u), sum);
  };
  unsigned lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  const unsigned row = lane / 4 * 4, column = lane % 4 * 8;  // first lanes of the groups
#pragma unroll
  for (int slot = 0; slot < 8; ++slot) {
    const int from = slot % 4;
    const std::uint32_t upper = __shfl_sync(kAll, slot < 4 ? a.x : a.z, row + from);
    const std::uint32_t lower = __shfl_sync(kAll, slot < 4 ? a.y : a.w, row + from);
    const std::uint32_t left = __shfl_sync(kAll, slot < 4 ? b.x : b.y, column + from);
    const std::uint32_t right = __shfl_sync(kAll, slot < 4 ? b.x : b.y, column + 4 + from);
    c = make_float4(multiply(c.x, upper, left), multiply(c.y, upper, right),
                    multiply(c.z, lower, left), multiply(c.w, lower, right));
  }
  return c;
}

template <bool kBf16>
__device__ __forceinline__ void mma_by_shuffles(float (&c)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[2]) {
  const float4 sum =
      mma_by_shuffles<kBf16>(make_float4(c[0], c[1], c[2], c[3]),
                             make_uint4(a[0], a[1], a[2], a[3]), make_uint2(b[0], b[1]));
  c[0] = sum.x;
  c[1] = sum.y;
  c[2] = sum.z;
  c[3] = sum.w;
}
#endif

// c (16 x 8) += a (16 x 16, rows) * b (16 x 8, columns), two bfloat16 a word, low half first.
// With g = lane / 4 and t = lane % 4: a[0], a[1] are elements 2 t, 2 t + 1 of rows g and g + 8,
// a[2], a[3] elements 2 t + 8, 2 t + 9; b[0], b[1] are elements 2 t, 2 t + 1 and 2 t + 8, 2 t + 9
// of column g; c[0], c[1] are columns 2 t, 2 t + 1 of row g, c[2], c[3] of row g + 8.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  mma_by_shuffles<true>(c, a, b);
#endif
}

// c (16 x 8) += a (16 x 8, rows) * b (8 x 8, columns), a float a word, without its low 13 bits.
// a[0], a[1] are element t of rows g and g + 8, a[2], a[3] element t + 4; b[0], b[1] are elements t
// and t + 4 of column g; c as above.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  mma_by_shuffles<false>(c, a, b);
#endif
}

// Clusters: blocks that run together and read each other's shared memory, on sm_90 and later.
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

// Waits for all threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;\n\tbarrier.cluster.wait;" ::: "memory");
#endif
}

// Where the same place of shared memory lies in another block of the cluster.
template <class T>
__device__ __forceinline__ T* cluster_peer(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  T* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
#else
  return shared;
#endif
}

}  // namespace simt
}  // namespace fasthyp
#endif
