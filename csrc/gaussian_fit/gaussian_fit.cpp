#include "gaussian_fit/gaussian_fit.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "common/cpu_features.h"
#include "common/thread_pool.h"

namespace fasthyp {

FASTHYP_PER_SIMD_LEVEL(gaussian_fit::Kernels, gaussian_fit_kernels)

namespace gaussian_fit {
namespace {

struct AlignedDelete {
  void operator()(double* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<double[], AlignedDelete>;

}  // namespace

void fit(const Call& call, int threads) {
  const Kernels& level = gaussian_fit_kernels();
  const auto fit_map = call.is_double ? level.fit_f64 : level.fit_f32;
  const int shards = static_cast<int>(std::min<std::int64_t>(threads, call.count));
  const std::size_t stride = (call.width + level.lanes - 1) / level.lanes * level.lanes;
  const std::size_t doubles = stride * call.height;
  std::vector<Scratch> scratch(std::max(shards, 0));
  for (Scratch& s : scratch) s.reset(new (std::align_val_t{64}) double[doubles]);
  // Maps take from a few to a hundred iterations, so each thread takes the next one that is left.
  std::atomic<std::int64_t> next{0};
  parallel(shards, [&](int shard, int) {
    for (std::int64_t map; (map = next.fetch_add(1, std::memory_order_relaxed)) < call.count;)
      fit_map(call, map, scratch[shard].get());
  });
}

}  // namespace gaussian_fit
}  // namespace fasthyp
