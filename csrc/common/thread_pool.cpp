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

// Our own workers: one region at a time; a caller that finds them busy is a team of one.
class Pool {
 public:
  void run(Task task, void* context, int threads) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock.owns_lock() || !grow(threads - 1)) {
      task(context, 0, 1);
      return;
    }
    task_ = task;
    context_ = context;
    threads_ = threads;
    pending_.store(workers_, std::memory_order_relaxed);
    region_.fetch_add(1, std::memory_order_release);
    region_.notify_all();
    task(context, 0, threads);
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
      if (index < threads_) task_(context_, index, threads_);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
    }
  }

  std::mutex busy_;
  int workers_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int threads_ = 0;
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
  int (*thread_num)();
  int (*num_threads)();
  bool complete() const { return parallel && in_parallel && thread_num && num_threads; }
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
    look_up(o.thread_num, "omp_get_thread_num");
    look_up(o.num_threads, "omp_get_num_threads");
    return o;
  }();
  return found;
}

struct Region {
  Task task;
  void* context;
};

}  // namespace

void relax(int spins) {
  if (spins < 4000)
    pause_cpu();
  else
    std::this_thread::yield();  // the thread waited for may need this core
}

void run_team(Task task, void* context, int threads) {
  if (threads <= 1) {
    if (threads == 1) task(context, 0, 1);
    return;
  }
  const OpenMp& omp = openmp();
  if (g_forked.load(std::memory_order_relaxed) || !omp.complete() || omp.in_parallel())
    return g_pool.load()->run(task, context, threads);
  Region region{task, context};
  omp.parallel(
      [](void* given) {
        auto& r = *static_cast<Region*>(given);
        // The runtime may grant fewer threads than asked for.
        r.task(r.context, openmp().thread_num(), openmp().num_threads());
      },
      &region, static_cast<unsigned>(threads), 0);
}

}  // namespace fasthyp::detail
