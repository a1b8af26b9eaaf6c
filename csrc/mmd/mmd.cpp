#include "mmd/mmd.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "common/cpu_features.h"
#include "common/thread_pool.h"
#include "mmd/math.h"

namespace fasthyp {

FASTHYP_PER_SIMD_LEVEL(mmd::Kernels, mmd_kernels)

namespace mmd {
namespace {

// Problems of up to this many blocks are done by one thread, which meets each pair once.
constexpr std::int64_t kWholeBlocks = 8;

struct AlignedDelete {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Memory = std::unique_ptr<std::byte[], AlignedDelete>;

Memory allocate(std::int64_t bytes) {
  return Memory(new (std::align_val_t{64}) std::byte[static_cast<std::size_t>(bytes)]);
}

void store_value(const Call& call, std::int64_t problem, double sum) {
  const double value = sum + diagonal_of(call, problem);
  if (call.is_double)
    static_cast<double*>(call.value)[problem] = value;
  else
    static_cast<float*>(call.value)[problem] = static_cast<float>(value);
}

}  // namespace

void run(const Call& call, int threads) {
  const Functions& level = call.is_double ? mmd_kernels().f64 : mmd_kernels().f32;
  const std::int64_t blocks = blocks_of(call.n[0]) + blocks_of(call.n[1]);
  const std::int64_t row = blocks * kBlock * (call.is_double ? 8 : 4);  // of all blocks, in bytes
  const std::int64_t samples = row * (call.dim + 1);
  const std::int64_t sums = call.grad[0] || call.grad[1] ? row * call.dim : 0;
  const std::int64_t row_sums = std::int64_t{kRowSums} * call.dim;
  const auto packed_in = [&](std::byte* p, std::byte* of_thread) {
    return Packed{p, p + samples, of_thread};
  };

  if (blocks <= kWholeBlocks)
    return parallel(static_cast<int>(std::min<std::int64_t>(threads, call.problems)),
                    [&](int shard, int shards) {
                      const Memory memory = allocate(samples + sums + row_sums);
                      const Packed packed = packed_in(memory.get(), memory.get() + samples + sums);
                      const Range range = shard_range(call.problems, shard, shards);
                      for (std::int64_t i = range.begin; i < range.end; ++i)
                        store_value(call, i, level.whole(call, i, packed));
                    });

  // Larger ones one after the other, with all threads on the blocks of each.
  const int team = static_cast<int>(std::min<std::int64_t>(threads, blocks));
  const Memory memory = allocate(samples + sums + team * row_sums);
  std::vector<double> totals(static_cast<std::size_t>(blocks));
  std::atomic<std::int64_t> next{0};  // of the blocks of all problems
  Barrier barrier;
  parallel_team(team, [&](int index, int size) {
    const Packed packed = packed_in(memory.get(), memory.get() + samples + sums + index * row_sums);
    std::int64_t mine = next.fetch_add(1, std::memory_order_relaxed);
    for (std::int64_t i = 0; i < call.problems; ++i) {
      const Range range = shard_range(blocks, index, size);
      for (std::int64_t block = range.begin; block < range.end; ++block)
        level.pack(call, i, block, packed);
      barrier.wait(size);
      for (; mine < (i + 1) * blocks; mine = next.fetch_add(1, std::memory_order_relaxed))
        totals[mine - i * blocks] = level.block(call, i, mine - i * blocks, packed);
      barrier.wait(size);
      if (index > 0) continue;
      double sum = 0;
      for (const double total : totals) sum += total;
      store_value(call, i, sum);
    }
  });
}

}  // namespace mmd
}  // namespace fasthyp
