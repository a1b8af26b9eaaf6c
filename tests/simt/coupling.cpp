// coupling SEED INPUT OUTPUT: runs a flow with the CUDA kernels on the host.
// Input: int64 numbers of plan numbers, packed bytes, inverse, images, per_image, has input, has
// condition, seed, image offset, first sample, fixed dims, include mode, whether seed and offsets
// come from the device; then plan, packed weights, input, condition, fixed. Output: output,
// log_det.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>

#include "coupling/cuda.h"
#include "cuda_runtime.h"

namespace {

// Heap blocks of the exact size, so that AddressSanitizer sees any access beyond them.
struct Aligned {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{256}); }
};
using Array = std::unique_ptr<std::byte[], Aligned>;
Array allocate(std::int64_t bytes) {
  return Array(static_cast<std::byte*>(
      ::operator new[](static_cast<std::size_t>(bytes), std::align_val_t{256})));
}

Array read(std::ifstream& in, std::int64_t bytes) {
  Array a = allocate(bytes);
  in.read(reinterpret_cast<char*>(a.get()), bytes);
  if (!in) throw std::runtime_error("input too short");
  return a;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) return 2;
  simt::set_seed(std::strtoull(argv[1], nullptr, 10));
  std::ifstream in(argv[2], std::ios::binary);
  const Array head = read(in, 13 * 8);
  const auto* n = reinterpret_cast<const std::int64_t*>(head.get());
  const Array numbers = read(in, n[0] * 8);
  using namespace fasthyp::coupling::cuda;
  const Plan plan = parse_plan(
      {reinterpret_cast<const std::int64_t*>(numbers.get()), static_cast<std::size_t>(n[0])});
  const Array packed = read(in, n[1]);
  const std::int64_t rows = n[3] * n[4];
  const Array input = read(in, n[5] ? rows * plan.dim * 4 : 0);
  const Array cond = read(in, n[6] ? n[3] * plan.cond_stride * 4 : 0);
  const Array fixed = read(in, n[3] * n[10] * 4);
  const std::int64_t workspace_size = workspace_bytes(plan, n[3], n[4]);
  const Array workspace = allocate(workspace_size);
  const Array output = allocate(rows * plan.dim * 4), log_det = allocate(rows * 4);
  Call call{};
  call.plan = &plan;
  call.packed = packed.get();
  call.inverse = n[2] != 0;
  call.images = n[3];
  call.per_image = n[4];
  call.input = n[5] ? reinterpret_cast<const float*>(input.get()) : nullptr;
  call.cond = n[6] ? reinterpret_cast<const float*>(cond.get()) : nullptr;
  call.output = reinterpret_cast<float*>(output.get());
  call.log_det = reinterpret_cast<float*>(log_det.get());
  call.workspace = workspace.get();
  call.workspace_bytes = workspace_size;
  const Array counter = allocate(3 * 8);
  std::copy_n(n + 7, 3, reinterpret_cast<std::int64_t*>(counter.get()));
  if (n[12]) {
    call.counter = reinterpret_cast<const std::int64_t*>(counter.get());
  } else {
    call.seed = static_cast<std::uint64_t>(n[7]);
    call.image_offset = n[8];
    call.first_sample = n[9];
  }
  call.fixed = n[10] ? reinterpret_cast<const float*>(fixed.get()) : nullptr;
  call.fixed_dims = static_cast<int>(n[10]);
  call.include_mode = n[11] != 0;
  run(call, 0, nullptr);
  std::ofstream file(argv[3], std::ios::binary);
  file.write(reinterpret_cast<const char*>(output.get()), rows * plan.dim * 4);
  file.write(reinterpret_cast<const char*>(log_det.get()), rows * 4);
  return file.good() ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
