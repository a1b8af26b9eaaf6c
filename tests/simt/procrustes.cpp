// procrustes SEED INPUT OUTPUT: aligns the poses in a raw file with the CUDA kernel on the host.
// Input: 9 int64 (is_double, poses, joints; inner and count of source, target and mask, the last
// count 0 for no mask), source, target, mask. Output: rotation, scale, translation, error,
// distances, grad_source, grad_target, as in csrc/procrustes.
#include "procrustes/procrustes.h"

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
  std::int64_t n[9];
  in.read(reinterpret_cast<char*>(n), sizeof n);
  const std::int64_t size = n[0] ? 8 : 4, poses = n[1], joints = n[2];
  // Heap blocks of the exact size, so that AddressSanitizer sees any access beyond them.
  const std::int64_t in_bytes[3] = {n[4] * joints * 3 * size, n[6] * joints * 3 * size,
                                    n[8] * joints};
  std::unique_ptr<char[]> operands[3];
  for (int i = 0; i < 3; ++i) {
    operands[i].reset(new char[in_bytes[i]]);
    in.read(operands[i].get(), in_bytes[i]);
  }
  if (!in) throw std::runtime_error("input too short");
  const std::int64_t widths[7] = {9, 1, 3, 1, joints, 3 * joints, 3 * joints};
  std::unique_ptr<char[]> results[7];
  for (int i = 0; i < 7; ++i) results[i].reset(new char[poses * widths[i] * size]);
  fasthyp::procrustes::align_cuda({{operands[0].get(), n[3], n[4]},
                                   {operands[1].get(), n[5], n[6]},
                                   {n[8] ? operands[2].get() : nullptr, n[7], n[8] ? n[8] : 1},
                                   n[0] != 0,
                                   poses,
                                   static_cast<int>(joints),
                                   results[0].get(),
                                   results[1].get(),
                                   results[2].get(),
                                   results[3].get(),
                                   results[4].get(),
                                   results[5].get(),
                                   results[6].get()},
                                  0, nullptr);
  std::ofstream file(argv[3], std::ios::binary);
  for (int i = 0; i < 7; ++i) file.write(results[i].get(), poses * widths[i] * size);
  return file.good() ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
