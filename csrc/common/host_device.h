// Functions that the CPU kernels and the CUDA kernels share. FASTHYP_UNROLL before a loop keeps
// what it indexes in registers on a GPU.
#pragma once

#ifdef __CUDACC__
#define FASTHYP_HD __host__ __device__ __forceinline__
#define FASTHYP_UNROLL _Pragma("unroll")
#else
#define FASTHYP_HD inline __attribute__((always_inline))
#define FASTHYP_UNROLL
#endif
