#include "common/thread_pool.h"

#include <dlfcn.h>
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

// Our own workers: one region at a time; a caller that finds them busy runs its shards itself.
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
std::atomic<Pool*> g_pool{new Pool};
std::atomic<bool> g_forked{false};

// A forked child has none of the parent's threads, perhaps a locked mutex: it gets a new pool.
// Registered when the module is loaded, since the first fork may come before the first region.
[[maybe_unused]] const int g_at_fork = pthread_atfork(nullptr, nullptr, [] {
  g_pool = new Pool;
  g_forked = true;
});

// libgomp's entry points; LLVM's and Intel's runtimes have them too.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
  int (*in_parallel)();
};

template <class F>
void look_up(F& function, const char* name) {
  function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
}

// Looked up at the first region, when PyTorch is certainly loaded.
const OpenMp& openmp() {
  static const OpenMp found = [] {
    OpenMp o;
    look_up(o.parallel, "GOMP_parallel");
    look_up(o.in_parallel, "omp_in_parallel");
    return o;
  }();
  return found;
}

struct Region {
  Task task;
  void* context;
  int shards;
  std::atomic<int> next{0};
};

}  // namespace

void run_parallel(Task task, void* context, int shards) {
  if (shards <= 1) {
    if (shards == 1) task(context, 0, 1);
    return;
  }
  const OpenMp& omp = openmp();
  if (g_forked.load(std::memory_order_relaxed) || !omp.parallel || !omp.in_parallel ||
      omp.in_parallel())
    return g_pool.load()->run(task, context, shards);
  // The runtime may grant fewer threads than asked for, so shards are handed out, not assigned.
  Region region{task, context, shards};
  omp.parallel(
      [](void* given) {
        auto& r = *static_cast<Region*>(given);
        for (int i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.shards;)
          r.task(r.context, i, r.shards);
      },
      &region, static_cast<unsigned>(shards), 0);
}

}  // namespace fasthyp::detail
