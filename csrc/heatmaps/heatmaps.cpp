#include "heatmaps/heatmaps.h"

#include <algorithm>
#include <memory>

#include "common/cpu_features.h"
#include "common/thread_pool.h"

namespace fasthyp {

FASTHYP_PER_SIMD_LEVEL(heatmaps::Kernels, heatmaps_kernels)

namespace heatmaps {

void sample(const Call& call, int threads) {
  const Kernels& level = heatmaps_kernels();
  const auto sample_map = call.is_double ? level.sample_f64 : level.sample_f32;
  const std::int64_t maps = call.images * call.joints;
  const std::size_t cells = static_cast<std::size_t>(call.height) * call.width;
  parallel(static_cast<int>(std::min<std::int64_t>(threads, maps)), [&](int shard, int shards) {
    const std::unique_ptr<std::uint64_t[]> scratch(new std::uint64_t[cells]);
    const Range range = shard_range(maps, shard, shards);
    for (std::int64_t map = range.begin; map < range.end; ++map)
      sample_map(call, map, scratch.get());
  });
}

}  // namespace heatmaps
}  // namespace fasthyp
