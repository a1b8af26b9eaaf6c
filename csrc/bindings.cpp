// The one file that knows Python: checks sizes, releases the GIL, hands pointers to the kernels.
// Tensors come as addresses; python/fasthyp/ops has checked dtype, device, shape and contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/cpu_features.h"
#include "common/cuda_device.h"
#include "common/philox.h"
#include "common/philox_cpu.h"
#include "common/thread_pool.h"
#include "coupling/coupling.h"
#include "coupling/cuda.h"
#include "coupling/cuda_training.h"
#include "coupling/training.h"
#include "gaussian_fit/gaussian_fit.h"
#include "heatmaps/heatmaps.h"
#include "mmd/mmd.h"
#include "procrustes/procrustes.h"
#include "skinning/skinning.h"

namespace py = pybind11;
using namespace fasthyp;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
std::span<const T> view(Address address, std::int64_t count) {
  return {pointer<const T>(address), static_cast<std::size_t>(count)};
}

// --- coupling ---

// The flow of a plan. A thread mostly runs the same flow again, so the last one is kept.
const coupling::Flow& parsed(std::span<const std::int64_t> plan) {
  thread_local std::vector<std::int64_t> numbers;
  thread_local coupling::Flow flow;
  if (!std::equal(plan.begin(), plan.end(), numbers.begin(), numbers.end())) {
    numbers.clear();  // stays empty if parsing throws
    flow = coupling::parse_plan(plan);
    numbers.assign(plan.begin(), plan.end());
  }
  return flow;
}

std::int64_t coupling_packed_bytes(const std::vector<std::int64_t>& plan) {
  return parsed(plan).packed_bytes;
}

// tensors: address and count of each, in the order of coupling::pack.
void coupling_pack(Address plan, std::int64_t plan_size,
                   const std::vector<std::pair<Address, std::int64_t>>& tensors, Address packed,
                   std::int64_t packed_bytes, int threads) {
  py::gil_scoped_release release;
  const coupling::Flow& flow = parsed(view<std::int64_t>(plan, plan_size));
  if (packed_bytes < flow.packed_bytes)
    throw std::invalid_argument("flow: packed weights too short");
  std::vector<coupling::Numbers> numbers;
  for (const auto& [address, count] : tensors)
    numbers.push_back({pointer<const void>(address), count});
  coupling::pack(flow, numbers, pointer<std::byte>(packed), threads);
}

void coupling_run(Address plan, std::int64_t plan_size, Address packed, std::int64_t packed_bytes,
                  bool inverse, std::int64_t images, std::int64_t per_image, Address input,
                  Address cond, Address output, Address log_det, int threads, std::uint64_t seed,
                  std::int64_t image_offset, std::int64_t first_sample, Address fixed,
                  int fixed_dims, bool include_mode) {
  py::gil_scoped_release release;
  const coupling::Flow& flow = parsed(view<std::int64_t>(plan, plan_size));
  if (packed_bytes < flow.packed_bytes)
    throw std::invalid_argument("flow: packed weights too short");
  if (fixed_dims < 0 || fixed_dims > flow.dim) throw std::invalid_argument("flow: fixed too wide");
  coupling::run({&flow, pointer<const std::byte>(packed), inverse, images, per_image,
                 pointer<const void>(input), pointer<const void>(cond), pointer<void>(output),
                 pointer<void>(log_det), threads, seed, image_offset, first_sample,
                 pointer<const void>(fixed), fixed_dims, include_mode});
}

void coupling_affine(Address state, std::int64_t rows, int dim, Address raw, bool is_double,
                     const std::vector<std::int64_t>& active, double clamp, int clamp_activation,
                     bool inverse, Address log_det, int threads) {
  py::gil_scoped_release release;
  const auto kind = static_cast<coupling::Clamp>(clamp_activation);
  if (is_double)
    coupling::affine(pointer<double>(state), rows, dim, pointer<const double>(raw), active, clamp,
                     kind, inverse, pointer<double>(log_det), threads);
  else
    coupling::affine(pointer<float>(state), rows, dim, pointer<const float>(raw), active, clamp,
                     kind, inverse, pointer<float>(log_det), threads);
}

coupling::Keep keep_of(int keep_every, bool store) {
  if (keep_every < 0)
    throw std::invalid_argument("keep_every: expected >= 0, got " + std::to_string(keep_every));
  return {keep_every, store};
}

std::int64_t coupling_saved_width(const std::vector<std::int64_t>& plan, int keep_every,
                                  bool store) {
  return coupling::saved_width(parsed(plan), keep_of(keep_every, store));
}

void coupling_pass(const std::vector<std::int64_t>& plan, Address packed, std::int64_t packed_bytes,
                   bool inverse, std::int64_t images, std::int64_t per_image, Address x,
                   Address cond, Address out, Address log_det, Address saved, int keep_every,
                   bool store, int threads) {
  py::gil_scoped_release release;
  const coupling::Flow& flow = parsed(plan);
  if (packed_bytes < flow.packed_bytes)
    throw std::invalid_argument("flow: packed weights too short");
  coupling::Call call{&flow,
                      pointer<const std::byte>(packed),
                      inverse,
                      images,
                      per_image,
                      pointer<const void>(x),
                      pointer<const void>(cond),
                      pointer<void>(out),
                      pointer<void>(log_det),
                      threads};
  coupling::run(call, keep_of(keep_every, store), pointer<void>(saved));
}

// wanted: for each tensor of the plan, whether grad_weights has its gradient.
void coupling_backward(const std::vector<std::int64_t>& plan, Address packed,
                       std::int64_t packed_bytes, bool inverse, std::int64_t images,
                       std::int64_t per_image, Address out, Address saved, int keep_every,
                       bool store, Address cond, Address grad_out, Address grad_log_det,
                       Address grad_x, Address grad_cond, Address grad_weights,
                       const std::vector<bool>& wanted, int threads) {
  py::gil_scoped_release release;
  const coupling::Flow& flow = parsed(plan);
  if (packed_bytes < flow.packed_bytes)
    throw std::invalid_argument("flow: packed weights too short");
  coupling::backward({&flow, pointer<const std::byte>(packed), inverse, images, per_image,
                      pointer<const void>(out), pointer<const void>(saved),
                      keep_of(keep_every, store), pointer<const void>(cond),
                      pointer<const void>(grad_out), pointer<const void>(grad_log_det),
                      pointer<void>(grad_x), pointer<void>(grad_cond), pointer<void>(grad_weights),
                      wanted, threads});
}

// --- coupling on CUDA ---

#if defined(FASTHYP_WITH_CUDA)
const coupling::cuda::Plan& parsed_cuda(std::span<const std::int64_t> numbers) {
  thread_local std::vector<std::int64_t> before;
  thread_local coupling::cuda::Plan plan;
  if (!std::equal(numbers.begin(), numbers.end(), before.begin(), before.end())) {
    before.clear();  // stays empty if parsing throws
    plan = coupling::cuda::parse_plan(numbers);
    before.assign(numbers.begin(), numbers.end());
  }
  return plan;
}

std::int64_t coupling_cuda_workspace(Address plan, std::int64_t plan_size, std::int64_t images,
                                     std::int64_t per_image) {
  return coupling::cuda::workspace_bytes(parsed_cuda(view<std::int64_t>(plan, plan_size)), images,
                                         per_image);
}

bool coupling_cuda_fits(Address plan, std::int64_t plan_size, int device) {
  return coupling::cuda::fits(parsed_cuda(view<std::int64_t>(plan, plan_size)), device);
}

void coupling_cuda_run(Address plan, std::int64_t plan_size, Address packed,
                       std::int64_t packed_bytes, bool inverse, std::int64_t images,
                       std::int64_t per_image, Address input, Address cond, Address output,
                       Address log_det, Address workspace, std::int64_t workspace_bytes,
                       std::uint64_t seed, std::int64_t image_offset, std::int64_t first_sample,
                       Address counter, Address fixed, int fixed_dims, bool include_mode,
                       int device, Address stream) {
  py::gil_scoped_release release;
  const auto& flow = parsed_cuda(view<std::int64_t>(plan, plan_size));
  if (packed_bytes < flow.packed_bytes)
    throw std::invalid_argument("CUDA flow: packed weights too short");
  if (fixed_dims < 0 || fixed_dims > flow.dim)
    throw std::invalid_argument("CUDA flow: fixed too wide");
  coupling::cuda::run(
      {&flow, pointer<const std::byte>(packed), inverse, images, per_image,
       pointer<const float>(input), pointer<const float>(cond), pointer<float>(output),
       pointer<float>(log_det), pointer<std::byte>(workspace), workspace_bytes, seed, image_offset,
       first_sample, pointer<const std::int64_t>(counter), pointer<const float>(fixed), fixed_dims,
       include_mode},
      device, pointer<void>(stream));
}

// --- coupling on CUDA, in training ---

namespace training = coupling::cuda::training;

const training::Plan& parsed_training(const std::vector<std::int64_t>& numbers) {
  thread_local std::vector<std::int64_t> before;
  thread_local training::Plan plan;
  if (numbers != before) {
    before.clear();  // stays empty if parsing throws
    plan = training::parse_plan(numbers);
    before = numbers;
  }
  return plan;
}

std::int64_t coupling_cuda_saved_width(const std::vector<std::int64_t>& plan, int keep_every,
                                       bool store) {
  return training::saved_width(parsed_training(plan), {keep_every, store});
}

std::int64_t coupling_cuda_pass_workspace(const std::vector<std::int64_t>& plan,
                                          std::int64_t images, std::int64_t per_image,
                                          int keep_every, bool store, bool gradient,
                                          std::int64_t scratch) {
  return training::workspace_bytes(parsed_training(plan), images, per_image, {keep_every, store},
                                   gradient, scratch);
}

// weights: address and count of each tensor, in the order of the plan.
using Weights = std::vector<std::pair<Address, std::int64_t>>;

// What a pass and its gradient have in common.
struct TrainingCall {
  std::vector<training::Weight> weights;
  training::Call call;

  TrainingCall(const std::vector<std::int64_t>& plan, const Weights& tensors, bool inverse,
               std::int64_t images, std::int64_t per_image, Address cond, int keep_every,
               bool store, int precision, Address workspace, std::int64_t workspace_bytes,
               std::int64_t scratch) {
    for (const auto& [address, count] : tensors)
      weights.push_back({pointer<const float>(address), count});
    call = {&parsed_training(plan),
            weights,
            inverse,
            images,
            per_image,
            pointer<const float>(cond),
            {keep_every, store},
            static_cast<coupling::cuda::Precision>(precision),
            pointer<std::byte>(workspace),
            workspace_bytes,
            scratch};
  }
};

void coupling_cuda_pass(const std::vector<std::int64_t>& plan, const Weights& weights, bool inverse,
                        std::int64_t images, std::int64_t per_image, Address cond, int keep_every,
                        bool store, int precision, Address workspace, std::int64_t workspace_bytes,
                        std::int64_t scratch, Address input, Address output, Address log_det,
                        Address saved, int device, Address stream) {
  py::gil_scoped_release release;
  const TrainingCall given(plan, weights, inverse, images, per_image, cond, keep_every, store,
                           precision, workspace, workspace_bytes, scratch);
  training::run(given.call,
                training::Pass{pointer<const float>(input), pointer<float>(output),
                               pointer<float>(log_det), pointer<float>(saved)},
                device, pointer<void>(stream));
}

void coupling_cuda_pass_gradient(const std::vector<std::int64_t>& plan, const Weights& weights,
                                 bool inverse, std::int64_t images, std::int64_t per_image,
                                 Address cond, int keep_every, bool store, int precision,
                                 Address workspace, std::int64_t workspace_bytes,
                                 std::int64_t scratch, Address output, Address saved,
                                 Address grad_output, Address grad_log_det, Address grad_input,
                                 Address grad_cond, Address grad_weights,
                                 const std::vector<bool>& wanted, int device, Address stream) {
  py::gil_scoped_release release;
  const TrainingCall given(plan, weights, inverse, images, per_image, cond, keep_every, store,
                           precision, workspace, workspace_bytes, scratch);
  const std::vector<std::uint8_t> flags(wanted.begin(), wanted.end());
  training::run(given.call,
                training::Gradient{pointer<const float>(output), pointer<const float>(saved),
                                   pointer<const float>(grad_output),
                                   pointer<const float>(grad_log_det), pointer<float>(grad_input),
                                   pointer<float>(grad_cond), pointer<float>(grad_weights), flags},
                device, pointer<void>(stream));
}
#endif

// --- gaussian_fit ---

// device < 0: the CPU, on `threads_or_stream` threads; else that CUDA device, on that stream.
void gaussian_fit_run(Address heatmaps, bool is_double, std::int64_t count, std::int64_t height,
                      std::int64_t width, Address init, int init_size, int max_iter, double tol,
                      Address scalars, Address mean, Address covariance, Address converged,
                      Address iterations, int device, std::uintptr_t threads_or_stream) {
  constexpr std::int64_t kMaxSide = 1 << 15;
  if (count < 0 || height < 1 || width < 1 || height > kMaxSide || width > kMaxSide)
    throw std::invalid_argument("gaussian_fit: expected maps of 1 to " + std::to_string(kMaxSide) +
                                " cells a side, got " + std::to_string(height) + " x " +
                                std::to_string(width));
  if (init_size != 0 && init_size != 2 && init_size != 6)
    throw std::invalid_argument("gaussian_fit: init must have 2 or 6 columns");
  if (count == 0) return;
  const gaussian_fit::Call call{pointer<const void>(heatmaps),
                                is_double,
                                count,
                                static_cast<int>(height),
                                static_cast<int>(width),
                                pointer<const void>(init),
                                init_size,
                                max_iter,
                                tol,
                                pointer<void>(scalars),
                                pointer<void>(mean),
                                pointer<void>(covariance),
                                pointer<bool>(converged),
                                pointer<std::int32_t>(iterations)};
  py::gil_scoped_release release;
  if (device < 0) return gaussian_fit::fit(call, static_cast<int>(threads_or_stream));
#if defined(FASTHYP_WITH_CUDA)
  gaussian_fit::fit_cuda(call, device, pointer<void>(threads_or_stream));
#else
  throw std::invalid_argument("gaussian_fit: built without CUDA");
#endif
}

// --- heatmaps ---

// device < 0: the CPU, on `threads_or_stream` threads; else that CUDA device, on that stream.
void heatmaps_sample(Address maps, bool is_double, std::int64_t images, std::int64_t joints,
                     std::int64_t height, std::int64_t width, std::int64_t samples,
                     double threshold, double temperature, double flat_value, std::uint64_t seed,
                     std::int64_t image_offset, Address points, Address values, int device,
                     std::uintptr_t threads_or_stream) {
  constexpr std::int64_t kMaxSide = 1 << 15;
  if (images < 0 || joints < 0 || samples < 0 || height < 1 || width < 1 || height > kMaxSide ||
      width > kMaxSide)
    throw std::invalid_argument("heatmaps: expected maps of 1 to " + std::to_string(kMaxSide) +
                                " cells a side, got " + std::to_string(height) + " x " +
                                std::to_string(width));
  if (images == 0 || joints == 0 || samples == 0) return;
  const heatmaps::Call call{pointer<const void>(maps),
                            is_double,
                            images,
                            joints,
                            static_cast<int>(height),
                            static_cast<int>(width),
                            samples,
                            is_double ? threshold : static_cast<float>(threshold),
                            temperature,
                            flat_value,
                            seed,
                            image_offset,
                            pointer<void>(points),
                            pointer<void>(values)};
  py::gil_scoped_release release;
  if (device < 0) return heatmaps::sample(call, static_cast<int>(threads_or_stream));
#if defined(FASTHYP_WITH_CUDA)
  heatmaps::sample_cuda(call, device, pointer<void>(threads_or_stream));
#else
  throw std::invalid_argument("heatmaps: built without CUDA");
#endif
}

// --- mmd ---

// device < 0: the CPU, on `threads_or_stream` threads; else that CUDA device, on that stream.
void mmd_run(Address x, Address y, bool is_double, std::int64_t problems, std::int64_t n,
             std::int64_t p, std::int64_t dim, Address x_weights, Address y_weights,
             Address squares, const std::vector<double>& rates, bool rbf, bool unbiased,
             Address value, Address x_grad, Address y_grad, Address workspace, int device,
             std::uintptr_t threads_or_stream) {
  constexpr std::int64_t kMostDims = 1 << 20;
  if (problems < 0 || n < 1 || p < 1 || dim < 1 || dim > kMostDims)
    throw std::invalid_argument("mmd: expected samples of 1 to " + std::to_string(kMostDims) +
                                " numbers, got " + std::to_string(n) + " and " + std::to_string(p) +
                                " of " + std::to_string(dim));
  if (rates.empty() || rates.size() > mmd::kMostBandwidths)
    throw std::invalid_argument("mmd: expected 1 to " + std::to_string(mmd::kMostBandwidths) +
                                " bandwidths, got " + std::to_string(rates.size()));
  if (!x_weights != !y_weights || !x_weights != !squares)
    throw std::invalid_argument("mmd: expected weights of both sets, and their squares, or none");
  mmd::Call call{pointer<const void>(x),
                 pointer<const void>(y),
                 is_double,
                 problems,
                 {n, p},
                 static_cast<int>(dim),
                 {pointer<const void>(x_weights), pointer<const void>(y_weights)},
                 pointer<const double>(squares),
                 static_cast<int>(rates.size()),
                 {},
                 rbf ? mmd::Kernel::rbf : mmd::Kernel::inverse_multiquadric,
                 unbiased,
                 pointer<void>(value),
                 {pointer<void>(x_grad), pointer<void>(y_grad)}};
  std::copy(rates.begin(), rates.end(), call.rates);
  if (problems == 0) return;
  py::gil_scoped_release release;
  if (device < 0) return mmd::run(call, static_cast<int>(threads_or_stream));
#if defined(FASTHYP_WITH_CUDA)
  mmd::run_cuda(call, pointer<std::byte>(workspace), device, pointer<void>(threads_or_stream));
#else
  static_cast<void>(workspace);
  throw std::invalid_argument("mmd: built without CUDA");
#endif
}

// --- procrustes ---

// Operands: address, inner, count of procrustes::Rows. Results: addresses, 0 where not wanted, in
// the order of procrustes::Call. device < 0: the CPU, on `threads_or_stream` threads; else that
// CUDA device, on that stream.
using RowsNumbers = std::array<std::int64_t, 3>;
void procrustes_align(const RowsNumbers& source, const RowsNumbers& target, const RowsNumbers& mask,
                      bool is_double, std::int64_t poses, std::int64_t joints,
                      const std::array<Address, 7>& results, int device,
                      std::uintptr_t threads_or_stream) {
  constexpr std::int64_t kMostJoints = 1 << 24;
  if (poses < 0 || joints < 1 || joints > kMostJoints)
    throw std::invalid_argument("procrustes: expected poses of 1 to " +
                                std::to_string(kMostJoints) + " joints, got " +
                                std::to_string(joints));
  if (poses == 0) return;
  const auto rows = [](const RowsNumbers& n) {
    if (n[1] < 1 || n[2] < 1) throw std::invalid_argument("procrustes: expected rows");
    return procrustes::Rows{pointer<const void>(static_cast<Address>(n[0])), n[1], n[2]};
  };
  const procrustes::Call call{rows(source),
                              rows(target),
                              rows(mask),
                              is_double,
                              poses,
                              static_cast<int>(joints),
                              pointer<void>(results[0]),
                              pointer<void>(results[1]),
                              pointer<void>(results[2]),
                              pointer<void>(results[3]),
                              pointer<void>(results[4]),
                              pointer<void>(results[5]),
                              pointer<void>(results[6])};
  py::gil_scoped_release release;
  if (device < 0) return procrustes::align(call, static_cast<int>(threads_or_stream));
#if defined(FASTHYP_WITH_CUDA)
  procrustes::align_cuda(call, device, pointer<void>(threads_or_stream));
#else
  throw std::invalid_argument("procrustes: built without CUDA");
#endif
}

// --- skinning ---

// sizes: is_double, shapes, joints, pose_blend, points, outputs. arrays: parents, rest,
// rest_shapes, columns, base, starts, bones, weights, targets, lift.
skinning::Model skinning_model(const std::array<std::int64_t, 6>& sizes,
                               const std::array<Address, 12>& arrays) {
  constexpr std::int64_t kMost = 1 << 20;
  const auto [is_double, shapes, joints, pose_blend, points, outputs] = sizes;
  if (shapes < 0 || shapes > kMost || joints < 1 || joints > kMost || points < 0 || outputs < 0 ||
      outputs > kMost * 1024)
    throw std::invalid_argument("skinning: expected 1 to " + std::to_string(kMost) +
                                " joints and at most as many shapes, got " +
                                std::to_string(joints) + " and " + std::to_string(shapes));
  return {is_double != 0,
          static_cast<int>(shapes),
          static_cast<int>(joints),
          pose_blend != 0,
          pointer<const std::int32_t>(arrays[0]),
          pointer<const void>(arrays[1]),
          pointer<const void>(arrays[2]),
          points,
          pointer<const std::int32_t>(arrays[3]),
          pointer<const std::int32_t>(arrays[4]),
          pointer<const void>(arrays[5]),
          pointer<const void>(arrays[6]),
          pointer<const std::int32_t>(arrays[7]),
          pointer<const std::int32_t>(arrays[8]),
          pointer<const void>(arrays[9]),
          pointer<const std::int32_t>(arrays[10]),
          outputs,
          pointer<const void>(arrays[11])};
}

// inputs: betas, pose, transl, and how far one body lies from the next. results: out, joints, or
// backward their gradients. grads: by betas, pose and transl; given in the backward pass alone.
// device < 0: the CPU, on `threads_or_stream` threads; else that CUDA device, on that stream.
void skinning_run(const std::array<std::int64_t, 6>& sizes, const std::array<Address, 12>& arrays,
                  std::int64_t bodies, const std::array<Address, 3>& inputs,
                  const std::array<std::int64_t, 3>& strides, int rotation,
                  const std::array<Address, 2>& results, bool backward,
                  const std::array<Address, 3>& grads, Address workspace, int device,
                  std::uintptr_t threads_or_stream) {
  if (rotation < 0 || rotation >= skinning::kRotations)
    throw std::invalid_argument("skinning: unknown rotations");
  if (bodies < 0) throw std::invalid_argument("skinning: negative number of bodies");
  skinning::Call call{};
  call.model = skinning_model(sizes, arrays);
  call.bodies = bodies;
  call.betas = pointer<const void>(inputs[0]);
  call.pose = pointer<const void>(inputs[1]);
  call.transl = pointer<const void>(inputs[2]);
  call.betas_stride = strides[0];
  call.pose_stride = strides[1];
  call.transl_stride = strides[2];
  call.rotation = static_cast<skinning::Rotation>(rotation);
  if (backward) {
    call.out_grad = pointer<const void>(results[0]);
    call.joints_grad = pointer<const void>(results[1]);
    call.betas_grad = pointer<void>(grads[0]);
    call.pose_grad = pointer<void>(grads[1]);
    call.transl_grad = pointer<void>(grads[2]);
  } else {
    call.out = pointer<void>(results[0]);
    call.joints = pointer<void>(results[1]);
  }
  py::gil_scoped_release release;
  if (device < 0) {
    const auto run = backward ? skinning::backward : skinning::forward;
    return run(call, static_cast<int>(threads_or_stream));
  }
#if defined(FASTHYP_WITH_CUDA)
  (backward ? skinning::backward_cuda : skinning::forward_cuda)(
      call, pointer<std::byte>(workspace), device, pointer<void>(threads_or_stream));
#else
  static_cast<void>(workspace);
  throw std::invalid_argument("skinning: built without CUDA");
#endif
}

#if defined(FASTHYP_WITH_CUDA)
std::int64_t skinning_cuda_workspace(const std::array<std::int64_t, 6>& sizes,
                                     const std::array<Address, 12>& arrays, std::int64_t bodies,
                                     bool backward) {
  return skinning::workspace_bytes_cuda(skinning_model(sizes, arrays), bodies, backward);
}
#endif

void philox_normal(Address out, std::int64_t images, std::int64_t per_image, int dim,
                   std::uint64_t seed, std::int64_t image_offset, std::int64_t first_sample,
                   int threads) {
  py::gil_scoped_release release;
  parallel(threads, [&](int shard, int shards) {
    const Range r = shard_range(images * per_image, shard, shards);
    for (std::int64_t row = r.begin; row < r.end; ++row)
      philox_normal_row(seed, static_cast<std::uint32_t>(image_offset + row / per_image),
                        static_cast<std::uint32_t>(first_sample + row % per_image), dim,
                        pointer<float>(out) + row * dim);
  });
}

std::array<std::uint32_t, 4> philox4x32(const std::array<std::uint32_t, 4>& counter,
                                        std::uint32_t key0, std::uint32_t key1) {
  const philox::Words w =
      philox::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key0, key1);
  return {w.w[0], w.w[1], w.w[2], w.w[3]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of fasthyp; use fasthyp.ops.";
  m.attr("version") = FASTHYP_VERSION;
#if defined(FASTHYP_WITH_CUDA)
  m.attr("cuda_archs") = FASTHYP_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = py::none();
#endif
  m.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const Simd level : simd_levels()) names.emplace_back(simd_name(level));
    return names;
  });
  m.def("simd_level", [] { return std::string(simd_name(simd_level())); });
  m.def("set_simd_level", &set_simd_level);

  m.def("coupling_packed_bytes", &coupling_packed_bytes);
  m.def("coupling_lanes",
        [](int element) { return coupling::lanes(static_cast<coupling::Element>(element)); });
  m.def("coupling_pack", &coupling_pack);
  m.def("coupling_run", &coupling_run);
  m.def("coupling_affine", &coupling_affine);
  m.def("coupling_saved_width", &coupling_saved_width);
  m.def("coupling_pass", &coupling_pass);
  m.def("coupling_backward", &coupling_backward);
#if defined(FASTHYP_WITH_CUDA)
  m.def("coupling_cuda_fits", &coupling_cuda_fits);
  m.def("coupling_cuda_workspace", &coupling_cuda_workspace);
  m.def("coupling_cuda_run", &coupling_cuda_run);
  m.def("coupling_cuda_saved_width", &coupling_cuda_saved_width);
  m.def("coupling_cuda_pass_workspace", &coupling_cuda_pass_workspace);
  m.def("coupling_cuda_pass", &coupling_cuda_pass);
  m.def("coupling_cuda_pass_gradient", &coupling_cuda_pass_gradient);
#endif
  m.def("gaussian_fit_run", &gaussian_fit_run);
  m.def("heatmaps_sample", &heatmaps_sample);
  m.def("mmd_run", &mmd_run);
#if defined(FASTHYP_WITH_CUDA)
  m.def("mmd_cuda_workspace", &mmd::workspace_bytes_cuda);
#endif
  m.def("procrustes_align", &procrustes_align);
  m.def("skinning_run", &skinning_run);
#if defined(FASTHYP_WITH_CUDA)
  m.def("skinning_cuda_workspace", &skinning_cuda_workspace);
#endif
  m.def("cuda_device_count", [] {
#if defined(FASTHYP_WITH_CUDA)
    return cuda_device_count();
#else
    return 0;
#endif
  });
  m.def("philox_normal", &philox_normal);
  m.def("philox4x32", &philox4x32);
}
