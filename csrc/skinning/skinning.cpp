#include "skinning/skinning.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

#include "common/cpu_features.h"
#include "common/thread_pool.h"
#include "skinning/math.h"

namespace fasthyp {

FASTHYP_PER_SIMD_LEVEL(skinning::Kernels, skinning_kernels)

namespace skinning {
namespace {

constexpr std::int64_t kBlock = 4;  // groups that meet a tile while it is in the cache
constexpr std::int64_t kPart = 64;  // tiles whose gradients are added up apart
constexpr std::int64_t kLine = 64;  // bytes

struct AlignedDelete {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{kLine}); }
};
using Bytes = std::unique_ptr<std::byte[], AlignedDelete>;

Bytes allocate(std::int64_t bytes) {
  return Bytes(new (std::align_val_t{kLine}) std::byte[static_cast<std::size_t>(bytes)]);
}

std::int64_t parts_of(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

struct Sizes {
  const Functions& level;
  std::int64_t lane;  // bytes of one number of every body of a group
  std::int64_t groups, group, work, grads;

  explicit Sizes(const Call& call)
      : level(call.model.is_double ? skinning_kernels().f64 : skinning_kernels().f32),
        lane(level.lanes * (call.model.is_double ? 8 : 4)),
        groups(parts_of(call.bodies, level.lanes)),
        group(lane * GroupSizes(call.model).total),
        work(lane * work_numbers(call.model)),
        grads(lane * GradSizes(call.model).total) {}
};

// Runs f(task, thread's work memory) for all tasks, on as many threads as there are tasks for.
template <class F>
void each(std::int64_t tasks, int threads, std::int64_t work, const F& f) {
  std::atomic<std::int64_t> next{0};
  parallel(static_cast<int>(std::min<std::int64_t>(threads, tasks)), [&](int, int) {
    const Bytes memory = allocate(work);
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      f(i, memory.get());
  });
}

template <class T>
void add(std::byte* to, const std::byte* from, std::int64_t bytes) {
  auto* sums = reinterpret_cast<T*>(to);
  const auto* more = reinterpret_cast<const T*>(from);
  for (std::int64_t i = 0; i < bytes / static_cast<std::int64_t>(sizeof(T)); ++i)
    sums[i] += more[i];
}

// --- projection: outputs have been written, body after body ---

template <class T>
struct One {
  using Number = T;
  static T of(double v) { return static_cast<T>(v); }
  static T fma(T a, T b, T c) { return a * b + c; }
};

template <class T>
void project_bodies(const Call& call, std::int64_t begin, std::int64_t end) {
  for (std::int64_t b = begin; b < end; ++b) {
    const T* camera = static_cast<const T*>(call.camera) + b * call.camera_stride;
    const T* from = static_cast<const T*>(call.out) + b * call.model.outputs * 3;
    T* to = static_cast<T*>(call.projected) + b * call.model.outputs * 2;
    for (std::int64_t o = 0; o < call.model.outputs; ++o)
      project<One<T>>(call.camera_numbers, camera, from + 3 * o, to + 2 * o);
  }
}

// out_grad (bodies, outputs, 3): with what comes through the projection.
template <class T>
void project_bodies_backward(const Call& call, std::int64_t begin, std::int64_t end,
                             void* out_grad) {
  const std::int64_t outputs = call.model.outputs;
  for (std::int64_t b = begin; b < end; ++b) {
    const T* camera = static_cast<const T*>(call.camera) + b * call.camera_stride;
    const T* from = static_cast<const T*>(call.out) + b * outputs * 3;
    const T* by_projected = static_cast<const T*>(call.projected_grad) + b * outputs * 2;
    T* to = static_cast<T*>(out_grad) + b * outputs * 3;
    if (call.out_grad)
      std::copy_n(static_cast<const T*>(call.out_grad) + b * outputs * 3, outputs * 3, to);
    else
      std::fill_n(to, outputs * 3, T(0));
    T by_camera[kPerspective] = {};
    for (std::int64_t o = 0; o < outputs; ++o)
      project_backward<One<T>>(call.camera_numbers, camera, from + 3 * o, by_projected + 2 * o,
                               to + 3 * o, by_camera);
    if (call.camera_grad)
      std::copy_n(by_camera, call.camera_numbers,
                  static_cast<T*>(call.camera_grad) + b * call.camera_numbers);
  }
}

}  // namespace

void forward(const Call& call, int threads) {
  if (call.bodies == 0) return;
  const Sizes sizes(call);
  const Bytes groups = allocate(sizes.groups * sizes.group);
  each(sizes.groups, threads, sizes.work, [&](std::int64_t i, void* work) {
    sizes.level.pose(call, i, {groups.get(), work, nullptr});
    if (call.out && call.model.targets)
      sizes.level.points(call, i, 1, 0, call.model.tiles(), {groups.get(), work, nullptr});
    if (call.projected)
      (call.model.is_double
           ? project_bodies<double>
           : project_bodies<float>)(call, i * sizes.level.lanes,
                                    std::min(call.bodies, (i + 1) * sizes.level.lanes));
  });
  if (!call.out || call.model.targets) return;
  // A few bodies: smaller parts, so that all threads are busy to the end.
  const std::int64_t tiles = call.model.tiles(), blocks = parts_of(sizes.groups, kBlock);
  const std::int64_t even = parts_of(tiles, std::max<std::int64_t>(4 * threads / blocks, 1));
  const std::int64_t part = std::clamp<std::int64_t>((even + 3) / 4 * 4, 8, kPart);
  const std::int64_t parts = parts_of(tiles, part);
  each(blocks * parts, threads, sizes.work, [&](std::int64_t i, void* work) {
    const std::int64_t group = i / parts * kBlock, tile = i % parts * part;
    sizes.level.points(call, group, static_cast<int>(std::min(kBlock, sizes.groups - group)), tile,
                       std::min(part, tiles - tile), {groups.get(), work, nullptr});
  });
}

void backward(const Call& given, int threads) {
  if (given.bodies == 0) return;
  const Sizes sizes(given);
  Call call = given;
  Bytes out_grad;
  if (given.projected_grad) {
    const std::int64_t body = 3 * given.model.outputs * (given.model.is_double ? 8 : 4);
    out_grad = allocate(given.bodies * body);
    call.out_grad = out_grad.get();
  }
  const Bytes groups = allocate(sizes.groups * sizes.group);
  each(sizes.groups, threads, sizes.work, [&](std::int64_t i, void* work) {
    Call posed = call;
    posed.joints = nullptr;
    sizes.level.pose(posed, i, {groups.get(), work, nullptr});
    if (given.projected_grad)
      (given.model.is_double
           ? project_bodies_backward<double>
           : project_bodies_backward<float>)(given, i * sizes.level.lanes,
                                             std::min(given.bodies, (i + 1) * sizes.level.lanes),
                                             out_grad.get());
  });
  const bool sums = call.model.targets != nullptr;
  const std::int64_t block = sums ? 1 : std::min(kBlock, sizes.groups);
  const std::int64_t blocks = parts_of(sizes.groups, block);
  const std::int64_t part = sums ? std::max<std::int64_t>(call.model.tiles(), 1) : kPart;
  const std::int64_t parts = call.out_grad ? parts_of(call.model.tiles(), part) : 0;
  const auto groups_in = [&](std::int64_t b) { return std::min(block, sizes.groups - b * block); };
  // Gradients of a block, by the tiles of one part.
  const auto of_part = [&](std::int64_t b, std::int64_t p, void* work, std::byte* grads) {
    std::memset(grads, 0, block * sizes.grads);
    sizes.level.points_backward(call, b * block, static_cast<int>(groups_in(b)), p * part,
                                std::min(part, call.model.tiles() - p * part),
                                {groups.get(), work, grads});
  };
  // Always in the same order.
  const auto add_part = [&](std::byte* to, const std::byte* from) {
    (call.model.is_double ? add<double> : add<float>)(to, from, block * sizes.grads);
  };
  const auto finish = [&](std::int64_t b, void* work, std::byte* grads) {
    for (std::int64_t g = 0; g < groups_in(b); ++g)
      sizes.level.pose_backward(call, b * block + g, {groups.get(), work, grads + g * sizes.grads});
  };

  const std::int64_t grads = block * sizes.grads;
  if (parts <= 1 || blocks >= 2 * threads) {  // one thread for all parts of a block
    each(blocks, threads, sizes.work + 2 * grads, [&](std::int64_t b, std::byte* memory) {
      std::byte *work = memory + 2 * grads, *sum = memory, *of_one = memory + grads;
      std::memset(sum, 0, grads);
      for (std::int64_t p = 0; p < parts; ++p) {
        of_part(b, p, work, of_one);
        add_part(sum, of_one);
      }
      finish(b, work, sum);
    });
    return;
  }
  const Bytes kept = allocate(blocks * parts * grads);
  each(blocks * parts, threads, sizes.work, [&](std::int64_t i, void* work) {
    of_part(i / parts, i % parts, work, kept.get() + i * grads);
  });
  each(blocks, threads, sizes.work + grads, [&](std::int64_t b, std::byte* memory) {
    std::memset(memory, 0, grads);
    for (std::int64_t p = 0; p < parts; ++p) add_part(memory, kept.get() + (b * parts + p) * grads);
    finish(b, memory + grads, memory);
  });
}

}  // namespace skinning
}  // namespace fasthyp
