// What kernels write differently from plain CUDA C++, so that the tests can also compile them for
// the host: tests/simt has a cuda_runtime.h of its own, with its own dynamic_shared.
#pragma once

#include <cuda_runtime.h>

#ifdef __CUDACC__
namespace fasthyp {

// The shared memory whose size the launch gives.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ double fasthyp_dynamic_shared[];
  return reinterpret_cast<T*>(fasthyp_dynamic_shared);
}

}  // namespace fasthyp
#endif
