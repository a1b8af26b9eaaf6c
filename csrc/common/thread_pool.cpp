#include "common/thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fasthyp::detail {
namespace {

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Waits until value differs from `old`: spins for some 10 us first, since the next region often
// follows at once, then sleeps.
template <class T>
T wait_change(std::atomic<T>& value, T old) {
  for (int i = 0; i < 2000; ++i) {
    const T now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    pause_cpu();
  }
  T now;
  while ((now = value.load(std::memory_order_acquire)) == old) value.wait(old);
  return now;
}

class Pool {
 public:
  void run(Task task, void* context, int shards) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock.owns_lock() || !grow(shards - 1)) {
      for (int i = 0; i < shards; ++i) task(context, i, shards);
      return;
    }
    task_ = task;
    context_ = context;
    shards_ = shards;
    pending_.store(workers_, std::memory_order_relaxed);
    region_.fetch_add(1, std::memory_order_release);
    region_.notify_all();
    task(context, 0, shards);
    for (int left = pending_.load(std::memory_order_acquire); left != 0;)
      left = wait_change(pending_, left);
  }

 private:
  bool grow(int wanted) {
    try {
      while (workers_ < wanted) {
        // The region number is read before the thread starts: read inside it, a fast first region
        // would be missed.
        std::thread(&Pool::work, this, workers_ + 1, region_.load()).detach();
        ++workers_;
      }
    } catch (const std::system_error&) {
      return false;
    }
    return true;
  }

  void work(int index, unsigned seen) {
    for (;;) {
      seen = wait_change(region_, seen);
      if (index < shards_) task_(context_, index, shards_);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
    }
  }

  std::mutex busy_;
  int workers_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int shards_ = 0;
  std::atomic<unsigned> region_{0};
  std::atomic<int> pending_{0};
};

// Never destroyed: workers may still wait on it while the process exits.
std::atomic<Pool*> g_pool{nullptr};

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_pool = new Pool;
    // A forked child has none of the parent's workers, perhaps a locked mutex: it gets a new pool.
    pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
  });
  return *g_pool.load();
}

}  // namespace

void run_parallel(Task task, void* context, int shards) {
  if (shards <= 1) {
    if (shards == 1) task(context, 0, 1);
    return;
  }
  pool().run(task, context, shards);
}

}  // namespace fasthyp::detail
