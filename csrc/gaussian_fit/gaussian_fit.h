// Least-squares fits of one rotated Gaussian to each of many heatmaps.
#pragma once

#include <cstdint>

namespace fasthyp::gaussian_fit {

// All arrays are contiguous and of one type, float or double, unless said.
struct Call {
  const void* heatmaps;  // (N, H, W)
  bool is_double;
  std::int64_t count;  // N
  int height, width;   // H, W
  const void* init;    // (N, init_size) or null
  int init_size;       // 2: x, y. 6: amplitude, x, y, sigma_x, theta, sigma_y
  int max_iter;
  double tol;
  void* scalars;             // (5, N): amplitude, sigma_x, sigma_y, theta, rmse
  void* mean;                // (N, 2): x, y
  void* covariance;          // (N, 2, 2)
  bool* converged;           // (N,)
  std::int32_t* iterations;  // (N,)
};

void fit(const Call& call, int threads);

// On the device that holds the arrays, on that stream (a cudaStream_t), without waiting for it.
void fit_cuda(const Call& call, int device, void* stream);

// --- what a SIMD level provides (cpu_kernels.cpp) ---

struct Kernels {
  int lanes;  // doubles per vector
  // Fits one map. scratch: height * round_up(width, lanes) doubles, aligned to 64 bytes.
  void (*fit_f32)(const Call&, std::int64_t map, double* scratch);
  void (*fit_f64)(const Call&, std::int64_t map, double* scratch);
};

}  // namespace fasthyp::gaussian_fit
