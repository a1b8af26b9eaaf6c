// Cells drawn from heatmaps, each with a probability proportional to its weight.
#pragma once

#include <cstdint>

namespace fasthyp::heatmaps {

// All arrays are contiguous and of one type, float or double.
struct Call {
  const void* maps;  // (images, joints, height, width)
  bool is_double;
  std::int64_t images, joints;
  int height, width;
  std::int64_t samples;
  double threshold;    // cells below this, or not above zero, are never drawn
  double temperature;  // the weight is the cell's value to this power
  double flat_value;   // stands for the value of a cell in a map without weights
  std::uint64_t seed;
  std::int64_t image_offset;
  void* points;  // (images, samples, joints, 2): x, y
  void* values;  // (images, samples, joints): of the cells
};

void sample(const Call& call, int threads);

// On the device that holds the arrays, on that stream (a cudaStream_t), without waiting for it.
void sample_cuda(const Call& call, int device, void* stream);

// --- what a SIMD level provides (cpu_kernels.cpp) ---

struct Kernels {
  // Draws from one map. scratch: height * width numbers.
  void (*sample_f32)(const Call&, std::int64_t map, std::uint64_t* scratch);
  void (*sample_f64)(const Call&, std::int64_t map, std::uint64_t* scratch);
};

}  // namespace fasthyp::heatmaps
