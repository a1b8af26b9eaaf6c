// Compiled once per SIMD level. One call draws from one map.
#include "common/simd.h"
#include "heatmaps/heatmaps.h"
#include "heatmaps/math.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using namespace heatmaps;

// The greatest cell, not less than zero; NaN if a cell is NaN or positive infinity.
template <class T>
double highest_of(const T* map, int cells) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> high = splat<T>(0), bad = splat<T>(0);
  int i = 0;
  for (; i + kWidth <= cells; i += kWidth) {
    const Vec<T> v = load(map + i);
    high = select<T>(v > high, v, high);
    bad = select<T>(v <= splat(kMost<T>), bad, splat<T>(1));
  }
  T highest = 0;
  bool finite = true;
  for (int lane = 0; lane < kWidth; ++lane) {
    highest = high[lane] > highest ? high[lane] : highest;
    finite = finite && bad[lane] == 0;
  }
  for (; i < cells; ++i) {
    highest = map[i] > highest ? map[i] : highest;
    finite = finite && map[i] <= kMost<T>;
  }
  return finite ? static_cast<double>(highest) : kNaN<double>;
}

// Sums of the weights up to and with each cell.
template <bool kPower, class T>
void add_up(const Weights& weights, const T* map, int cells, std::uint64_t* sums) {
  for (int i = 0; i < cells; ++i) sums[i] = weights.of<kPower>(static_cast<double>(map[i]));
  std::uint64_t sum = 0;
  for (int i = 0; i < cells; ++i) sums[i] = sum += sums[i];
}

// The first cell whose sum is above the number.
int find(const std::uint64_t* sums, int cells, std::uint64_t number) {
  int first = 0;
  for (int size = cells; size > 1;) {
    const int half = size / 2;
    first += sums[first + half - 1] <= number ? half : 0;
    size -= half;
  }
  return first;
}

template <class T>
void sample(const Call& call, std::int64_t map, std::uint64_t* sums) {
  const int cells = call.height * call.width;
  const T* in = static_cast<const T*>(call.maps) + map * cells;
  const double highest = highest_of(in, cells);
  if (highest != highest) {
    for (std::int64_t i = 0; i < call.samples; ++i)
      store<T>(call, map, i, kNaN<T>, kNaN<T>, kNaN<T>);
    return;
  }
  std::uint64_t total = 0;
  if (highest >= Weights::lowest(call)) {
    const Weights weights(call, highest);
    if (call.temperature == 1)
      add_up<false>(weights, in, cells, sums);
    else
      add_up<true>(weights, in, cells, sums);
    total = sums[cells - 1];
  }
  for (std::int64_t i = 0; i < call.samples; ++i) {
    const std::uint64_t random = random_bits(call, map, i);
    const int cell = total == 0 ? static_cast<int>(below(cells, random))
                                : find(sums, cells, below(total, random));
    store<T>(call, map, i, static_cast<T>(cell % call.width), static_cast<T>(cell / call.width),
             total == 0 ? static_cast<T>(call.flat_value) : in[cell]);
  }
}

}  // namespace

extern const heatmaps::Kernels heatmaps_kernels;
const heatmaps::Kernels heatmaps_kernels = {sample<float>, sample<double>};

}  // namespace fasthyp::FASTHYP_SIMD
