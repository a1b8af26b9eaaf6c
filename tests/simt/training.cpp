// training SEED INPUT OUTPUT: a pass of a flow and its gradient with the CUDA kernels on the host.
// Input: int64 numbers of plan numbers, tensors, inverse, images, per_image, condition columns, has
// grad_log_det, keep_every, store, precision, scratch bytes, wants the condition's gradient; then
// the plan, of each tensor its count and whether its gradient is wanted; then as floats tensors,
// input, condition, gradients of output and log_det.
// Output: output, log_det, gradients of input, condition and wanted tensors.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <vector>

#include "coupling/cuda_training.h"
#include "cuda_runtime.h"

namespace {

// Heap blocks of the exact size, so that AddressSanitizer sees any access beyond them.
struct Aligned {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{256}); }
};
class Array {
 public:
  explicit Array(std::int64_t bytes)
      : size_(bytes),
        data_(static_cast<std::byte*>(
            ::operator new[](static_cast<std::size_t>(bytes), std::align_val_t{256}))) {
    // NaN, so that what is not written shows
    for (std::int64_t i = 0; i < bytes; ++i) data_[i] = std::byte{0xff};
  }
  Array(std::ifstream& in, std::int64_t bytes) : Array(bytes) {
    in.read(reinterpret_cast<char*>(data_.get()), bytes);
    if (!in) throw std::runtime_error("input too short");
  }
  template <class T = float>
  T* at() const {
    return size_ ? reinterpret_cast<T*>(data_.get()) : nullptr;
  }
  void write(std::ofstream& out) const {
    out.write(reinterpret_cast<const char*>(data_.get()), size_);
  }

 private:
  std::int64_t size_;
  std::unique_ptr<std::byte[], Aligned> data_;
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) return 2;
  simt::set_seed(std::strtoull(argv[1], nullptr, 10));
  std::ifstream in(argv[2], std::ios::binary);
  const Array head(in, 12 * 8);
  const auto* n = head.at<std::int64_t>();
  const Array numbers(in, n[0] * 8);
  using namespace fasthyp::coupling::cuda;
  const training::Plan plan =
      training::parse_plan({numbers.at<std::int64_t>(), static_cast<std::size_t>(n[0])});
  const Array table(in, n[1] * 16);
  std::vector<Array> tensors;
  std::vector<training::Weight> weights;
  std::vector<std::uint8_t> wanted;
  std::int64_t wanted_numbers = 0;
  for (std::int64_t i = 0; i < n[1]; ++i) {
    const std::int64_t count = table.at<std::int64_t>()[2 * i];
    wanted.push_back(table.at<std::int64_t>()[2 * i + 1] != 0);
    if (wanted.back()) wanted_numbers += count;
    tensors.emplace_back(in, count * 4);
    weights.push_back({tensors.back().at(), count});
  }
  const std::int64_t rows = n[3] * n[4];
  const Array input(in, rows * plan.dim * 4), cond(in, n[3] * n[5] * 4);
  const Array grad_output(in, rows * plan.dim * 4), grad_log_det(in, n[6] ? rows * 4 : 0);

  const training::Keep keep{static_cast<int>(n[7]), n[8] != 0};
  training::Call call{};
  call.plan = &plan;
  call.weights = weights;
  call.inverse = n[2] != 0;
  call.images = n[3];
  call.per_image = n[4];
  call.cond = cond.at();
  call.keep = keep;
  call.precision = static_cast<Precision>(n[9]);
  call.scratch = n[10];
  const Array output(rows * plan.dim * 4), log_det(rows * 4);
  const Array saved(rows * training::saved_width(plan, keep) * 4);
  {
    call.workspace_bytes =
        training::workspace_bytes(plan, call.images, call.per_image, keep, false, call.scratch);
    const Array workspace(call.workspace_bytes);
    call.workspace = workspace.at<std::byte>();
    training::run(call, training::Pass{input.at(), output.at(), log_det.at(), saved.at()}, 0,
                  nullptr);
  }
  const Array grad_input(rows * plan.dim * 4), grad_weights(wanted_numbers * 4);
  const Array grad_cond(n[11] ? n[3] * n[5] * 4 : 0);
  {
    call.workspace_bytes =
        training::workspace_bytes(plan, call.images, call.per_image, keep, true, call.scratch);
    const Array workspace(call.workspace_bytes);
    call.workspace = workspace.at<std::byte>();
    training::Gradient gradient{};
    gradient.output = output.at();
    gradient.saved = saved.at();
    gradient.grad_output = grad_output.at();
    gradient.grad_log_det = grad_log_det.at();
    gradient.grad_input = grad_input.at();
    gradient.grad_cond = grad_cond.at();
    gradient.grad_weights = grad_weights.at();
    gradient.wanted = wanted;
    training::run(call, gradient, 0, nullptr);
  }
  std::ofstream file(argv[3], std::ios::binary);
  for (const Array* array : {&output, &log_det, &grad_input, &grad_cond, &grad_weights})
    array->write(file);
  return file.good() ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
