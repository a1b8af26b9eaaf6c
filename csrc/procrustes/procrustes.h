// The similarities that bring poses closest to their targets, and the distances that remain.
#pragma once

#include <cstdint>

namespace fasthyp::procrustes {

// Rows that all poses look at in turn: pose i at row i / inner % count.
struct Rows {
  const void* data;
  std::int64_t inner, count;
};

// All arrays are contiguous and of one type, float or double, unless said. A result is null where
// it is not wanted.
struct Call {
  Rows source, target;  // (count, joints, 3)
  Rows mask;            // (count, joints) bool: the joints that count; null: all
  bool is_double;
  std::int64_t poses;
  int joints;
  void* rotation;     // (poses, 3, 3)
  void* scale;        // (poses)
  void* translation;  // (poses, 3)
  void* error;        // (poses): mean distance of the joints that count
  void* distances;    // (poses, joints): 0 where a joint does not count
  void* grad_source;  // (poses, joints, 3): of the error
  void* grad_target;  // (poses, joints, 3)
};

void align(const Call& call, int threads);

// On the device that holds the arrays, on that stream (a cudaStream_t), without waiting for it.
void align_cuda(const Call& call, int device, void* stream);

// --- what a SIMD level provides (cpu_kernels.cpp) ---

struct Kernels {
  int lanes;  // poses at a time
  // Poses [begin, end). scratch: 7 * joints * lanes doubles, at a multiple of 64 bytes.
  void (*align_f32)(const Call&, std::int64_t begin, std::int64_t end, double* scratch);
  void (*align_f64)(const Call&, std::int64_t begin, std::int64_t end, double* scratch);
};

}  // namespace fasthyp::procrustes
