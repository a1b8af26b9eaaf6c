#include "coupling/cuda.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

#include "common/cuda_device.h"
#include "common/simt.h"

namespace fasthyp::coupling::cuda {
namespace {

class Reader {
 public:
  explicit Reader(std::span<const std::int64_t> numbers) : numbers_(numbers) {}
  std::int64_t raw() {
    if (at_ >= numbers_.size()) throw std::invalid_argument("CUDA flow plan: too short");
    return numbers_[at_++];
  }
  std::int64_t number(std::int64_t low, std::int64_t high) {
    const std::int64_t v = raw();
    if (v < low || v > high)
      throw std::invalid_argument("CUDA flow plan: number " + std::to_string(at_ - 1) +
                                  " must be in [" + std::to_string(low) + ", " +
                                  std::to_string(high) + "], got " + std::to_string(v));
    return v;
  }
  bool done() const { return at_ == numbers_.size(); }

 private:
  std::span<const std::int64_t> numbers_;
  std::size_t at_ = 0;
};

constexpr std::int64_t kMostWidth = 1 << 20;
constexpr std::int64_t kMostBytes = std::int64_t(1) << 35;  // offsets in 16 bytes fit an int

Launch read_launch(Reader& in, const Plan& plan) {
  const auto offset = [&](std::int64_t low = 0) { return in.number(low, plan.packed_bytes); };
  if (in.number(0, 1) == 0) {
    RowsLaunch launch;
    launch.ops = offset();
    launch.op_ints = in.number(0, kMostWidth);
    launch.op_count = in.number(0, launch.op_ints / kOpInts);
    return launch;
  }
  ProductLaunch launch;
  launch.weight = offset();
  launch.bias = offset();
  launch.steps = in.number(0, kMostWidth);
  launch.columns = in.number(16, plan.hidden);
  launch.depth = in.number(0, plan.hidden);
  launch.from = in.number(0, plan.hidden_count - 1);
  launch.to = in.number(0, plan.hidden_count - 1);
  launch.kept = in.number(-1, plan.kept_count - 1);
  launch.add = in.number(0, launch.kept >= 0);
  launch.keep = in.number(0, launch.kept >= 0);
  launch.norm = offset(-1);
  launch.gate = in.number(-1, plan.hoisted);
  launch.activation = in.number(-1, 5);
  launch.slope = in.raw();
  return launch;
}

std::int64_t element_bytes(const Plan& plan) {
  return plan.precision == Precision::bf16 ? 2 : static_cast<std::int64_t>(sizeof(float));
}

// How rows are taken in rounds, and what one round needs.
struct Rounds {
  std::int64_t rows, images;  // of a round, at most
  std::int64_t hoisted, state, log_scale, log_noise, hidden, hidden_bytes, kept, kept_bytes, total;

  Rounds(const Plan& plan, std::int64_t images_in_all, std::int64_t per_image) {
    const std::int64_t all = images_in_all * per_image;
    const std::int64_t row =
        plan.hidden * (plan.hidden_count * element_bytes(plan) + plan.kept_count * 4) +
        (plan.dim + 2) * 4;
    const std::int64_t image = plan.cond_dim > 0 ? plan.hoisted * 4 : 0;
    constexpr std::int64_t kLeast = 64;
    rows = std::min(all, std::max(kLeast, plan.scratch / (row + image / per_image + 1)));
    images = std::min(images_in_all, (rows + per_image - 2) / per_image + 1);
    std::int64_t at = 0;
    const auto take = [&](std::int64_t bytes) {
      const std::int64_t from = at;
      at += (bytes + 255) / 256 * 256;
      return from;
    };
    hoisted = take(images * image);
    state = take(rows * plan.dim * 4);
    log_scale = take(rows * 4);
    log_noise = take(rows * 4);
    hidden_bytes = rows * plan.hidden * element_bytes(plan);
    hidden = take(plan.hidden_count * hidden_bytes);
    kept_bytes = rows * plan.hidden * 4;
    kept = take(plan.kept_count * kept_bytes);
    total = at;
  }
};

template <class T>
T* at(std::byte* base, std::int64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}
template <class T>
const T* at(const std::byte* base, std::int64_t offset) {
  return reinterpret_cast<const T*>(base + offset);
}

float float_of(std::int64_t bits) { return std::bit_cast<float>(static_cast<std::int32_t>(bits)); }

}  // namespace

Plan parse_plan(std::span<const std::int64_t> numbers) {
  Reader in(numbers);
  Plan plan;
  plan.packed_bytes = in.number(0, kMostBytes);
  plan.dim = in.number(1, kMostWidth);
  plan.cond_dim = in.number(0, kMostWidth);
  plan.cond_stride = in.number(plan.cond_dim, plan.cond_dim + 3);
  plan.precision = static_cast<Precision>(in.number(0, 2));
  plan.hoisted = in.number(0, std::int64_t(1) << 31);
  plan.hoist_weight = in.number(0, plan.packed_bytes);
  plan.hoist_bias = in.number(0, plan.packed_bytes);
  plan.hidden = in.number(0, kMostWidth);
  plan.hidden_count = in.number(0, 16);
  plan.kept_count = in.number(0, 16);
  plan.raw = in.number(0, kMostWidth);
  plan.steps = in.number(0, kMostWidth);
  plan.units = in.number(0, kMostWidth);
  plan.linear = in.number(0, 1);
  plan.output_index = in.number(0, plan.packed_bytes);
  plan.scratch = in.number(0, kMostBytes);
  plan.log_det = std::bit_cast<double>(in.raw());
  for (auto& launches : plan.launches) {
    const std::int64_t count = in.number(1, 1 << 16);
    for (std::int64_t i = 0; i < count; ++i) launches.push_back(read_launch(in, plan));
    // the first takes the rows in, the last gives them out
    if (!std::holds_alternative<RowsLaunch>(launches.front()) ||
        !std::holds_alternative<RowsLaunch>(launches.back()))
      throw std::invalid_argument("CUDA flow plan: must begin and end with rows");
  }
  if (!in.done()) throw std::invalid_argument("CUDA flow plan: too long");
  return plan;
}

std::int64_t workspace_bytes(const Plan& plan, std::int64_t images, std::int64_t per_image) {
  return images * per_image > 0 ? Rounds(plan, images, per_image).total : 0;
}

void run(const Call& call, int device, void* stream) {
  const Plan& plan = *call.plan;
  const std::int64_t all = call.images * call.per_image;
  if (all == 0) return;
  const Rounds rounds(plan, call.images, call.per_image);
  if (call.workspace_bytes < rounds.total)
    throw std::invalid_argument("CUDA flow: workspace too small");
  const DeviceGuard guard(device);
  const auto check = [&](int error) {
    check_cuda(error,
               "coupling flow of " + std::to_string(plan.dim) + " dims, " +
                   std::to_string(call.images) + " images, " + std::to_string(call.per_image) +
                   " rows each",
               device);
  };
  std::byte* scratch = call.workspace;
  RowsCall rows{};
  rows.packed = call.packed;
  rows.dim = static_cast<int>(plan.dim);
  rows.inverse = call.inverse;
  rows.per_image = call.per_image;
  rows.output_index = at<int>(call.packed, plan.output_index);
  rows.input = call.input;
  rows.seed = call.seed;
  rows.image_offset = call.image_offset;
  rows.first_sample = call.first_sample;
  rows.counter = call.counter;
  rows.fixed = call.fixed;
  rows.fixed_dims = call.fixed_dims;
  rows.include_mode = call.include_mode;
  rows.state = at<float>(scratch, rounds.state);
  rows.log_scale = at<float>(scratch, rounds.log_scale);
  rows.log_noise = at<float>(scratch, rounds.log_noise);
  rows.hidden = scratch + rounds.hidden;
  rows.hidden_columns = plan.hidden;
  rows.hidden_bytes = rounds.hidden_bytes;
  rows.kept = at<float>(scratch, rounds.kept);
  rows.kept_numbers = rounds.kept_bytes / 4;
  rows.output = call.output;
  rows.log_det = call.log_det;
  rows.constant = static_cast<float>(plan.log_det);
  const auto& launches = plan.launches[call.inverse ? 1 : 0];

  for (std::int64_t first = 0; first < all; first += rounds.rows) {
    rows.first_row = first;
    rows.rows = std::min(rounds.rows, all - first);
    rows.first_image = first / call.per_image;
    // Without a condition the biases alone, the same for all images.
    rows.hoisted = at<float>(call.packed, plan.hoist_bias);
    rows.hoisted_stride = 0;
    if (plan.cond_dim > 0 && plan.hoisted > 0) {
      ProductCall hoist{};
      hoist.a = call.cond + rows.first_image * plan.cond_stride;
      hoist.a_stride = plan.cond_stride;
      hoist.depth = static_cast<int>(plan.cond_stride);
      hoist.steps = static_cast<int>((plan.cond_stride + 15) / 16);
      hoist.weight = call.packed + plan.hoist_weight;
      hoist.rows = (first + rows.rows - 1) / call.per_image - rows.first_image + 1;
      hoist.columns = static_cast<int>(plan.hoisted);
      hoist.bias = at<float>(call.packed, plan.hoist_bias);
      hoist.per_image = 1;
      hoist.activation = -1;
      hoist.out = at<float>(scratch, rounds.hoisted);
      hoist.out_stride = plan.hoisted;
      rows.hoisted = at<float>(scratch, rounds.hoisted);
      rows.hoisted_stride = plan.hoisted;
      check(launch_product(hoist,
                           plan.precision == Precision::bf16 ? Precision::tf32 : plan.precision,
                           device, stream));
    }
    for (const Launch& launch : launches) {
      if (const auto* r = std::get_if<RowsLaunch>(&launch)) {
        rows.ops = at<int>(call.packed, r->ops);
        rows.op_ints = static_cast<int>(r->op_ints);
        rows.op_count = static_cast<int>(r->op_count);
        rows.first = &launch == &launches.front();
        rows.last = &launch == &launches.back();
        check(launch_rows(rows, plan, device, stream));
        continue;
      }
      const auto& p = std::get<ProductLaunch>(launch);
      ProductCall product{};
      product.a = rows.hidden + p.from * rounds.hidden_bytes;
      product.a_stride = plan.hidden;
      product.depth = static_cast<int>(p.depth);
      product.steps = static_cast<int>(p.steps);
      product.weight = call.packed + p.weight;
      product.rows = rows.rows;
      product.columns = static_cast<int>(p.columns);
      product.bias = at<float>(call.packed, p.bias);
      product.gate = p.gate >= 0 ? rows.hoisted + p.gate : nullptr;
      product.gate_stride = rows.hoisted_stride;
      product.first_row = first;
      product.per_image = call.per_image;
      product.first_image = rows.first_image;
      product.kept = p.kept >= 0 ? rows.kept + p.kept * rows.kept_numbers : nullptr;
      product.add = p.add != 0;
      product.keep = p.keep != 0;
      product.norm = p.norm >= 0 ? at<float>(call.packed, p.norm) : nullptr;
      product.activation = static_cast<int>(p.activation);
      product.slope = float_of(p.slope);
      product.out = rows.hidden + p.to * rounds.hidden_bytes;
      product.out_stride = plan.hidden;
      product.narrow = plan.precision == Precision::bf16;
      check(launch_product(product, plan.precision, device, stream));
    }
  }
}

}  // namespace fasthyp::coupling::cuda
