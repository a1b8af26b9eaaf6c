// Squared maximum mean discrepancies of many pairs of sample sets, with their gradients.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fasthyp::mmd {

enum class Kernel : int { inverse_multiquadric = 0, rbf = 1 };

inline constexpr int kMostBandwidths = 16;

// All arrays are contiguous and of one type, float or double, unless said.
struct Call {
  const void* x;  // (problems, n[0], dim)
  const void* y;  // (problems, n[1], dim)
  bool is_double;
  std::int64_t problems;
  std::int64_t n[2];
  int dim;
  // Weights of the samples of each set, (problems, n[i]), that sum to 1, and the sums of their
  // squares, doubles (problems, 2). All null: every sample weighs 1 / n[i].
  const void* weights[2];
  const double* squares;
  int bandwidths;
  double rates[kMostBandwidths];  // what a squared distance is multiplied with
  Kernel kernel;
  bool unbiased;
  void* value;    // (problems)
  void* grad[2];  // of the value, in the shapes of x and y; null: not wanted
};

void run(const Call& call, int threads);

// On the device that holds the arrays, on that stream (a cudaStream_t), without waiting for it.
void run_cuda(const Call& call, std::byte* workspace, int device, void* stream);
// Bytes of workspace, aligned to 16, for a call of these sizes.
std::int64_t workspace_bytes_cuda(bool is_double, std::int64_t problems, std::int64_t n,
                                  std::int64_t p, std::int64_t dim, bool gradient);

// --- what a SIMD level provides (cpu_kernels.cpp) ---

// Samples of one problem are packed in blocks: kBlock columns, a row for each coordinate and one of
// weights, those of y negative. A last block is filled up with samples of weight zero.
inline constexpr int kBlock = 64;

inline std::int64_t blocks_of(std::int64_t samples) { return (samples + kBlock - 1) / kBlock; }

// Where one problem is packed and added up; memory of whole cache lines.
struct Packed {
  void* samples;   // the blocks of x, then those of y
  void* sums;      // for the gradients: as the samples, without weights
  void* row_sums;  // of a thread: kRowSums bytes for each coordinate
};
inline constexpr int kRowSums = 4 * 64;

struct Functions {
  void (*pack)(const Call&, std::int64_t problem, std::int64_t block, const Packed&);
  // Adds up what one block takes part in: the value's share is returned, and the block's gradient
  // written where it is wanted. Blocks may run at the same time.
  double (*block)(const Call&, std::int64_t problem, std::int64_t block, const Packed&);
  // Packs and does all blocks, each pair of samples once.
  double (*whole)(const Call&, std::int64_t problem, const Packed&);
};
struct Kernels {
  Functions f32, f64;
};

}  // namespace fasthyp::mmd
