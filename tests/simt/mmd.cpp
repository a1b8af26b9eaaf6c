// mmd SEED INPUT OUTPUT: discrepancies of the samples in a raw file, by the CUDA kernels on the
// host. Input: 10 int64 (is_double, problems, n, p, dim, bandwidths, rbf, unbiased, wanted
// gradients: 1 x + 2 y, weighted), the rates (doubles), x, y, and where weighted, the weights of
// both and their squares (doubles). Output: values and gradients, as in csrc/mmd.
#include "mmd/mmd.h"

#include <algorithm>
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
  std::int64_t n[10];
  in.read(reinterpret_cast<char*>(n), sizeof n);
  double rates[fasthyp::mmd::kMostBandwidths] = {};
  in.read(reinterpret_cast<char*>(rates), n[5] * 8);
  const std::int64_t size = n[0] ? 8 : 4, x_bytes = n[1] * n[2] * n[4] * size,
                     y_bytes = n[1] * n[3] * n[4] * size;
  // Heap blocks of the exact size, so that AddressSanitizer sees any access beyond them.
  using Bytes = std::unique_ptr<char[]>;
  const auto read = [&](std::int64_t bytes) {
    Bytes data(new char[bytes]);
    in.read(data.get(), bytes);
    return data;
  };
  const Bytes x = read(x_bytes), y = read(y_bytes);
  const Bytes x_weights = read(n[9] ? n[1] * n[2] * size : 0);
  const Bytes y_weights = read(n[9] ? n[1] * n[3] * size : 0);
  const Bytes squares = read(n[9] ? n[1] * 2 * 8 : 0);
  if (!in) throw std::runtime_error("input too short");
  const Bytes value(new char[n[1] * size]), x_grad(new char[x_bytes]), y_grad(new char[y_bytes]);
  const std::int64_t workspace_bytes =
      fasthyp::mmd::workspace_bytes_cuda(n[0] != 0, n[1], n[2], n[3], n[4], n[8] != 0);
  const std::unique_ptr<std::byte[]> workspace(new std::byte[workspace_bytes]);
  std::fill_n(workspace.get(), workspace_bytes, std::byte{0xff});  // NaN
  fasthyp::mmd::Call call{
      x.get(),
      y.get(),
      n[0] != 0,
      n[1],
      {n[2], n[3]},
      static_cast<int>(n[4]),
      {n[9] ? x_weights.get() : nullptr, n[9] ? y_weights.get() : nullptr},
      n[9] ? reinterpret_cast<const double*>(squares.get()) : nullptr,
      static_cast<int>(n[5]),
      {},
      n[6] ? fasthyp::mmd::Kernel::rbf : fasthyp::mmd::Kernel::inverse_multiquadric,
      n[7] != 0,
      value.get(),
      {n[8] & 1 ? x_grad.get() : nullptr, n[8] & 2 ? y_grad.get() : nullptr}};
  std::copy(rates, rates + n[5], call.rates);
  fasthyp::mmd::run_cuda(call, workspace.get(), 0, nullptr);
  std::ofstream file(argv[3], std::ios::binary);
  file.write(value.get(), n[1] * size);
  if (n[8] & 1) file.write(x_grad.get(), x_bytes);
  if (n[8] & 2) file.write(y_grad.get(), y_bytes);
  return file.good() ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
