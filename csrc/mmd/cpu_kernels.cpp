// Compiled once per SIMD level. Vectors run over the samples of a packed block; a tile of rows, of
// another block or the same, meets them at once.
#include "common/simd.h"
#include "common/vmath.h"
#include "mmd/math.h"
#include "mmd/mmd.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using namespace mmd;

constexpr int kRows = 4;  // of a tile; divides kBlock
static_assert(kRows * FASTHYP_SIMD_BYTES <= kRowSums);
template <class T>
constexpr int kVectors = kBlock / kLanes<T>;

// What is added up for the pairs of a tile and a block.
enum class Sums {
  value,    // no gradient
  rows,     // the gradient of the tile's samples
  columns,  // of both; each pair is met once
};

// 1 / t for t >= 1, to an ulp or two; 0 or next to it where t is infinite.
template <class T>
FASTHYP_INLINE Vec<T> reciprocal(Vec<T> t) {
#if FASTHYP_SIMD_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    // maskz: the plain intrinsics make GCC warn of something uninitialised
    const __m512 v = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(1e37f), (__m512)t);  // keeps NaN
    const __m512 r = _mm512_maskz_rcp14_ps(0xffff, v);
    return (Vec<T>)_mm512_fmadd_ps(_mm512_fnmadd_ps(v, r, _mm512_set1_ps(1)), r, r);
  }
#endif
  return splat<T>(1) / t;
}

// Added up in halves.
template <class T>
FASTHYP_INLINE T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
#pragma GCC unroll 8
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class T>
struct Problem {
  int dim, bandwidths;
  std::int64_t blocks[2];
  T* samples;
  T* sums;
  T rates[kMostBandwidths];
  double scale[2];

  Problem(const Call& call, std::int64_t problem, const Packed& packed)
      : dim(call.dim),
        bandwidths(call.bandwidths),
        blocks{blocks_of(call.n[0]), blocks_of(call.n[1])},
        samples(static_cast<T*>(packed.samples)),
        sums(static_cast<T*>(packed.sums)) {
    for (int i = 0; i < bandwidths; ++i) rates[i] = static_cast<T>(call.rates[i]);
    for (int set = 0; set < 2; ++set) scale[set] = scale_of(call, problem, set);
  }
  int set_of(std::int64_t block) const { return block >= blocks[0]; }
  T* block(std::int64_t i) const { return samples + i * (dim + 1) * kBlock; }
  T* sum(std::int64_t i) const { return sums + i * dim * kBlock; }
};

// The samples of a block that there are.
struct Samples {
  int set;
  std::int64_t first;
  int count;
  Samples(const Call& call, std::int64_t block) {
    const std::int64_t of_x = blocks_of(call.n[0]);
    set = block >= of_x;
    first = (block - (set ? of_x : 0)) * kBlock;
    const std::int64_t left = call.n[set] - first;
    count = static_cast<int>(left < kBlock ? left : kBlock);
  }
};

template <class T>
void pack(const Call& call, std::int64_t problem, std::int64_t block, const Packed& packed) {
  const Samples samples(call, block);
  const int dim = call.dim;
  const std::int64_t at = problem * call.n[samples.set] + samples.first;
  const T* in = static_cast<const T*>(samples.set ? call.y : call.x) + at * dim;
  const T* weights = static_cast<const T*>(call.weights[samples.set]);
  const T even = static_cast<T>(1.0 / static_cast<double>(call.n[samples.set]));
  T* out = static_cast<T*>(packed.samples) + block * (dim + 1) * kBlock;
  T* out_weights = out + static_cast<std::ptrdiff_t>(dim) * kBlock;
  for (int i = 0; i < kBlock; ++i) {
    const T weight = i >= samples.count ? 0 : weights ? weights[at + i] : even;
    out_weights[i] = samples.set ? -weight : weight;
    // What weighs nothing is not looked at: it may be NaN.
    for (int k = 0; k < dim; ++k)
      out[static_cast<std::ptrdiff_t>(k) * kBlock + i] =
          weight != 0 ? in[static_cast<std::ptrdiff_t>(i) * dim + k] : 0;
  }
}

template <class T>
void write_gradient(const Call& call, std::int64_t problem, std::int64_t block, const T* sums) {
  const Samples samples(call, block);
  T* out = static_cast<T*>(call.grad[samples.set]);
  if (!out) return;
  out += (problem * call.n[samples.set] + samples.first) * call.dim;
  for (int i = 0; i < samples.count; ++i)
    for (int k = 0; k < call.dim; ++k)
      *out++ = T(kGradientFactor) * sums[static_cast<std::ptrdiff_t>(k) * kBlock + i];
}

// Kernel values, and minus their derivatives by the squared distance.
template <class T, Kernel kKernel>
FASTHYP_INLINE void kernel_of(const Problem<T>& p, const Vec<T> (&distance)[kRows],
                              Vec<T> (&value)[kRows], Vec<T> (&slope)[kRows]) {
  for (int r = 0; r < kRows; ++r) value[r] = slope[r] = splat<T>(0);
  for (int b = 0; b < p.bandwidths; ++b) {
    const Vec<T> rate = splat<T>(p.rates[b]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kKernel == Kernel::rbf) {
        const Vec<T> k = exp<T>(-(distance[r] * rate));
        value[r] = value[r] + k;
        slope[r] = fma(k, rate, slope[r]);
      } else {
        const Vec<T> k = reciprocal<T>(fma(distance[r], rate, splat<T>(1)));
        value[r] = value[r] + k;
        slope[r] = fma(k * rate, k, slope[r]);
      }
    }
  }
}

// Squared distances of the tile's rows to kCount vectors of samples.
template <class T, int kCount>
FASTHYP_INLINE void distances_of(const T* rows, const T* columns, int dim,
                                 Vec<T> (&distance)[kCount][kRows]) {
  for (auto& of_vector : distance)
    for (Vec<T>& d : of_vector) d = splat<T>(0);
  for (int k = 0; k < dim; ++k, rows += kBlock, columns += kBlock) {
    Vec<T> column[kCount];
#pragma GCC unroll 2
    for (int v = 0; v < kCount; ++v) column[v] = load(columns + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> mine = splat<T>(rows[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kCount; ++v) {
        const Vec<T> difference = column[v] - mine;
        distance[v][r] = fma(difference, difference, distance[v][r]);
      }
    }
  }
}

// The rows [row, row + kRows) of block `own` against the vectors [first, last) of block `other`:
// the sum of c k is returned. row_weights are those of the rows, times the scale.
template <class T, Kernel kKernel, Sums kSums>
FASTHYP_INLINE T meet(const Problem<T>& p, std::int64_t own, int row, const T (&row_weights)[kRows],
                      std::int64_t other, int first, int last, Vec<T>* row_sums) {
  using V = Vec<T>;
  constexpr int kWidth = kLanes<T>;
  const int dim = p.dim;
  const T* rows = p.block(own) + row;
  const T* columns = p.block(other);
  const T* column_weights = columns + static_cast<std::ptrdiff_t>(dim) * kBlock;
  V total = splat<T>(0);
  V c[kVectors<T>][kRows];
  const auto add = [&](int v, const V(&distance)[kRows]) __attribute__((always_inline)) {
    V value[kRows], slope[kRows];
    kernel_of<T, kKernel>(p, distance, value, slope);
    const V weights = load(column_weights + v * kWidth);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      V weight = weights * splat<T>(row_weights[r]);
      if (own == other) {  // not with itself, and where pairs are met once, with those after it
        const auto column = lane_index<T>() + v * kWidth;
        weight = select<T>(kSums == Sums::rows ? column != row + r : column > row + r, weight,
                           splat<T>(0));
      }
      total = fma(weight, value[r], total);
      c[v][r] = weight * slope[r];
    }
  };
  int v = first;
  for (; v + 2 <= last; v += 2) {
    V distance[2][kRows];
    distances_of<T>(rows, columns + v * kWidth, dim, distance);
    add(v, distance[0]);
    add(v + 1, distance[1]);
  }
  if (v < last) {
    V distance[1][kRows];
    distances_of<T>(rows, columns + v * kWidth, dim, distance);
    add(v, distance[0]);
  }
  if constexpr (kSums != Sums::value) {
    for (int k = 0; k < dim; ++k) {
      V sums[kRows], mine[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        sums[r] = row_sums[k * kRows + r];
        mine[r] = splat<T>(rows[k * kBlock + r]);
      }
      for (int i = first; i < last; ++i) {
        const V column = load(columns + k * kBlock + i * kWidth);
        T* column_sums = p.sum(other) + k * kBlock + i * kWidth;
        V column_sum = kSums == Sums::columns ? load(column_sums) : splat<T>(0);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const V difference = mine[r] - column;
          sums[r] = fma(c[i][r], difference, sums[r]);
          if constexpr (kSums == Sums::columns) column_sum = fma(-c[i][r], difference, column_sum);
        }
        if constexpr (kSums == Sums::columns) store(column_sums, column_sum);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) row_sums[k * kRows + r] = sums[r];
    }
  }
  return sum_lanes<T>(total);
}

// One block with all that it meets. Within its set it meets the blocks from itself on, or all of
// them where only its own gradient is added up; samples of x meet those of y, and those of y meet
// the samples of x for their gradient only.
template <class T, Kernel kKernel, Sums kSums>
double block_sums(const Call& call, const Problem<T>& p, std::int64_t own, Vec<T>* row_sums) {
  const int set = p.set_of(own);
  const int dim = p.dim, count = Samples(call, own).count;
  const T* weights = p.block(own) + static_cast<std::ptrdiff_t>(dim) * kBlock;
  double total = 0;
  for (int row = 0; row < count; row += kRows) {
    if (kSums != Sums::value)
      for (int i = 0; i < dim * kRows; ++i) row_sums[i] = splat<T>(0);
    for (int with = 0; with < 2; ++with) {
      const bool same = with == set;
      if (!same && set == 1 && kSums != Sums::rows) continue;
      T row_weights[kRows];
      for (int r = 0; r < kRows; ++r)
        row_weights[r] = same ? static_cast<T>(weights[row + r] * p.scale[set]) : weights[row + r];
      double sum = 0;
      const std::int64_t end = p.blocks[0] + (with ? p.blocks[1] : 0);
      const std::int64_t begin = same && kSums != Sums::rows ? own : with ? p.blocks[0] : 0;
      for (std::int64_t other = begin; other < end; ++other) {
        const int first = other == own && kSums != Sums::rows ? row / kLanes<T> : 0;
        const int last = (Samples(call, other).count + kLanes<T> - 1) / kLanes<T>;
        sum += static_cast<double>(
            meet<T, kKernel, kSums>(p, own, row, row_weights, other, first, last, row_sums));
      }
      if (same)
        total += kSums == Sums::rows ? sum : 2 * sum;
      else if (set == 0)
        total += 2 * sum;
    }
    if constexpr (kSums != Sums::value) {
      T* sums = p.sum(own) + row;
      for (int k = 0; k < dim; ++k)
        for (int r = 0; r < kRows; ++r)
          sums[k * kBlock + r] += sum_lanes<T>(row_sums[k * kRows + r]);
    }
  }
  return total;
}

template <class T>
void clear(T* sums, std::int64_t blocks, int dim) {
  for (std::int64_t i = 0; i < blocks * dim * kBlock; ++i) sums[i] = 0;
}

template <class T, Kernel kKernel>
double block(const Call& call, std::int64_t problem, std::int64_t own, const Packed& packed) {
  const Problem<T> p(call, problem, packed);
  auto* row_sums = static_cast<Vec<T>*>(packed.row_sums);
  if (!call.grad[p.set_of(own)]) return block_sums<T, kKernel, Sums::value>(call, p, own, row_sums);
  clear(p.sum(own), 1, p.dim);
  const double total = block_sums<T, kKernel, Sums::rows>(call, p, own, row_sums);
  write_gradient(call, problem, own, p.sum(own));
  return total;
}

template <class T, Kernel kKernel>
double whole(const Call& call, std::int64_t problem, const Packed& packed) {
  const Problem<T> p(call, problem, packed);
  auto* row_sums = static_cast<Vec<T>*>(packed.row_sums);
  const std::int64_t blocks = p.blocks[0] + p.blocks[1];
  for (std::int64_t i = 0; i < blocks; ++i) pack<T>(call, problem, i, packed);
  const bool gradient = call.grad[0] || call.grad[1];
  if (gradient) clear(p.sums, blocks, p.dim);
  double total = 0;
  for (std::int64_t i = 0; i < blocks; ++i)
    total += gradient ? block_sums<T, kKernel, Sums::columns>(call, p, i, row_sums)
                      : block_sums<T, kKernel, Sums::value>(call, p, i, row_sums);
  if (gradient)
    for (std::int64_t i = 0; i < blocks; ++i) write_gradient(call, problem, i, p.sum(i));
  return total;
}

template <class T>
double any_block(const Call& call, std::int64_t problem, std::int64_t own, const Packed& packed) {
  return call.kernel == Kernel::rbf
             ? block<T, Kernel::rbf>(call, problem, own, packed)
             : block<T, Kernel::inverse_multiquadric>(call, problem, own, packed);
}

template <class T>
double any_whole(const Call& call, std::int64_t problem, const Packed& packed) {
  return call.kernel == Kernel::rbf ? whole<T, Kernel::rbf>(call, problem, packed)
                                    : whole<T, Kernel::inverse_multiquadric>(call, problem, packed);
}

template <class T>
constexpr Functions kFunctions = {pack<T>, any_block<T>, any_whole<T>};

}  // namespace

extern const mmd::Kernels mmd_kernels;
const mmd::Kernels mmd_kernels = {kFunctions<float>, kFunctions<double>};

}  // namespace fasthyp::FASTHYP_SIMD
