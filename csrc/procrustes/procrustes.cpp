#include "procrustes/procrustes.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "common/cpu_features.h"
#include "common/thread_pool.h"

namespace fasthyp {

FASTHYP_PER_SIMD_LEVEL(procrustes::Kernels, procrustes_kernels)

namespace procrustes {
namespace {

struct AlignedDelete {
  void operator()(double* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<double[], AlignedDelete>;

constexpr std::int64_t kLeastWork = 1 << 13;  // joints that are worth a thread

}  // namespace

void align(const Call& call, int threads) {
  const Kernels& level = procrustes_kernels();
  const auto align_range = call.is_double ? level.align_f64 : level.align_f32;
  const std::int64_t blocks = (call.poses + level.lanes - 1) / level.lanes;
  const std::int64_t work = call.poses * call.joints / kLeastWork + 1;
  const int shards = static_cast<int>(std::min<std::int64_t>({threads, blocks, work}));
  const std::size_t doubles = std::size_t{7} * call.joints * level.lanes;
  std::vector<Scratch> scratch(std::max(shards, 0));
  for (Scratch& s : scratch) s.reset(new (std::align_val_t{64}) double[doubles]);
  parallel(shards, [&](int shard, int) {
    const Range range = shard_range(blocks, shard, shards);
    align_range(call, range.begin * level.lanes, std::min(range.end * level.lanes, call.poses),
                scratch[shard].get());
  });
}

}  // namespace procrustes
}  // namespace fasthyp
