// heatmaps SEED INPUT OUTPUT: draws from the maps in a raw file with the CUDA kernel on the host.
// Input: 8 int64 (is_double, images, joints, height, width, samples, seed, image_offset), 3 doubles
// (threshold, temperature, flat_value), the maps. Output: points, values, as in csrc/heatmaps.
#include "heatmaps/heatmaps.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>

#include "cuda_runtime.h"

int main(int argc, char** argv) try {
  if (argc != 4) return 2;
  simt::set_seed(std::strtoull(argv[1], nullptr, 10));
  std::ifstream in(argv[2], std::ios::binary);
  std::int64_t n[8];
  double numbers[3];
  in.read(reinterpret_cast<char*>(n), sizeof n);
  in.read(reinterpret_cast<char*>(numbers), sizeof numbers);
  const std::int64_t size = n[0] ? 8 : 4, maps = n[1] * n[2];
  const std::int64_t bytes = maps * n[3] * n[4] * size, out_bytes = maps * n[5] * size;
  // Heap blocks of the exact size, so that AddressSanitizer sees any access beyond them.
  const std::unique_ptr<char[]> heatmaps(new char[bytes]), points(new char[2 * out_bytes]),
      values(new char[out_bytes]);
  in.read(heatmaps.get(), bytes);
  if (!in) throw std::runtime_error("input too short");
  fasthyp::heatmaps::sample_cuda(
      {heatmaps.get(), n[0] != 0, n[1], n[2], static_cast<int>(n[3]), static_cast<int>(n[4]), n[5],
       numbers[0], numbers[1], numbers[2], static_cast<std::uint64_t>(n[6]), n[7], points.get(),
       values.get()},
      0, nullptr);
  std::ofstream file(argv[3], std::ios::binary);
  file.write(points.get(), 2 * out_bytes);
  file.write(values.get(), out_bytes);
  return file.good() ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
