// gaussian_fit SEED INPUT OUTPUT: fits the maps in a raw file with the CUDA kernel on the host.
// Input: 6 int64 (is_double, count, height, width, init_size, max_iter), a double (tol), the maps,
// the starts. Output: scalars, mean, covariance, converged, iterations, as in csrc/gaussian_fit.
#include "gaussian_fit/gaussian_fit.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>

#include "cuda_runtime.h"

namespace {

// Heap blocks of the exact size, so that AddressSanitizer sees any access beyond them.
using Array = std::unique_ptr<char[]>;

Array read(std::ifstream& in, std::size_t bytes) {
  Array a(new char[bytes]);
  in.read(a.get(), static_cast<std::streamsize>(bytes));
  if (!in) throw std::runtime_error("input too short");
  return a;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) return 2;
  simt::set_seed(std::strtoull(argv[1], nullptr, 10));
  std::ifstream in(argv[2], std::ios::binary);
  const Array numbers = read(in, 7 * 8);
  const auto* head = reinterpret_cast<const std::int64_t*>(numbers.get());
  const double tol = reinterpret_cast<const double*>(numbers.get())[6];
  const std::size_t size = head[0] ? 8 : 4, count = head[1];
  const Array maps = read(in, count * head[2] * head[3] * size);
  const Array init = read(in, count * head[4] * size);
  const std::size_t bytes[5] = {5 * count * size, 2 * count * size, 4 * count * size, count,
                                4 * count};
  Array out[5];
  for (int i = 0; i < 5; ++i) out[i].reset(new char[bytes[i]]);
  fasthyp::gaussian_fit::fit_cuda(
      {maps.get(), head[0] != 0, head[1], static_cast<int>(head[2]), static_cast<int>(head[3]),
       head[4] ? init.get() : nullptr, static_cast<int>(head[4]), static_cast<int>(head[5]), tol,
       out[0].get(), out[1].get(), out[2].get(), reinterpret_cast<bool*>(out[3].get()),
       reinterpret_cast<std::int32_t*>(out[4].get())},
      0, nullptr);
  std::ofstream file(argv[3], std::ios::binary);
  for (int i = 0; i < 5; ++i) file.write(out[i].get(), static_cast<std::streamsize>(bytes[i]));
  return file.good() ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
