// Parallel regions.
//
// They run on the OpenMP threads that PyTorch has loaded, where it has: those spin for milliseconds
// after each PyTorch operator, and threads of our own would have to share the cores with them. No
// OpenMP runtime is linked or brought along. In a forked child, where OpenMP regions hang, and
// where no runtime is loaded, a small pool of our own does the work.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fasthyp {

namespace detail {
using Task = void (*)(void* context, int shard, int shards);
void run_parallel(Task task, void* context, int shards);
}  // namespace detail

// Calls f(shard, shards) for every shard in [0, shards), on as many threads. Returns when all are
// done. Safe to call from several threads at once (a caller that finds the pool busy runs its
// shards itself) and in a forked child (which starts workers of its own). f must not throw.
template <class F>
void parallel(int shards, F&& f) {
  using Body = std::remove_reference_t<F>;
  detail::run_parallel(
      [](void* context, int shard, int n) { (*static_cast<Body*>(context))(shard, n); },
      const_cast<void*>(static_cast<const void*>(&f)), shards);
}

// The part of [0, count) that belongs to a shard: contiguous, and as even as `grain` allows.
struct Range {
  std::int64_t begin, end;
};
inline Range shard_range(std::int64_t count, int shard, int shards, std::int64_t grain = 1) {
  const std::int64_t grains = (count + grain - 1) / grain;
  const std::int64_t begin = grains * shard / shards * grain;
  const std::int64_t end = grains * (shard + 1) / shards * grain;
  return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace fasthyp
