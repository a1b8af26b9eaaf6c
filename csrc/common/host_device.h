// Functions that the CPU kernels and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define FASTHYP_HD __host__ __device__ __forceinline__
#else
#define FASTHYP_HD inline __attribute__((always_inline))
#endif
