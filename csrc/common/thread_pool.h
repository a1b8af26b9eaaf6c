// Parallel regions.
//
// They run on the OpenMP threads that PyTorch has loaded, where it has: those spin for milliseconds
// after each PyTorch operator, and threads of our own would have to share the cores with them. No
// OpenMP runtime is linked or brought along. In a forked child, where OpenMP regions hang, and
// where no runtime is loaded, a small pool of our own does the work.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <type_traits>

namespace fasthyp {

namespace detail {
using Task = void (*)(void* context, int index, int size);
// Calls task(context, index, size) for all index in [0, size), at the same time; size <= threads.
void run_team(Task task, void* context, int threads);
void relax(int spins);  // waits a little inside a spinning loop
}  // namespace detail

// Calls f(index, size) for all index in [0, size) on a team of threads that run at the same time;
// size <= threads. Returns when all are done; then throws the first thing that one of them threw.
// Safe to call from several threads at once and in a forked child.
template <class F>
void parallel_team(int threads, F&& f) {
  struct Region {
    std::remove_reference_t<F>* f;
    std::atomic_flag thrown;
    std::exception_ptr exception;
  } region{&f, {}, {}};
  detail::run_team(
      [](void* context, int index, int size) {
        auto& r = *static_cast<Region*>(context);
        try {
          (*r.f)(index, size);
        } catch (...) {
          if (!r.thrown.test_and_set()) r.exception = std::current_exception();
        }
      },
      &region, threads);
  if (region.exception) std::rethrow_exception(region.exception);
}

// Calls f(shard, shards) for every shard in [0, shards), on as many threads.
template <class F>
void parallel(int shards, F&& f) {
  parallel_team(shards, [&](int index, int size) {
    for (int i = index; i < shards; i += size) f(i, shards);
  });
}

// Where the threads of a team wait for each other.
class Barrier {
 public:
  // Returns when all `size` threads have called it.
  void wait(int size) {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
      detail::relax(spins);
  }

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

// The part of [0, count) that belongs to a shard: contiguous, and as even as can be.
struct Range {
  std::int64_t begin, end;
};
inline Range shard_range(std::int64_t count, int shard, int shards) {
  return {count * shard / shards, count * (shard + 1) / shards};
}

}  // namespace fasthyp
