// Compiled once per SIMD level. One pose in each lane: coordinates are transposed on the way in.
#include "common/simd.h"
#include "procrustes/math.h"
#include "procrustes/procrustes.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using namespace procrustes;
using V = Vec<double>;
constexpr int kWidth = kLanes<double>;

struct Lanes {
  using Value = V;
  using Mask = IntVec<double>;
  static FASTHYP_INLINE V splat(double v) { return FASTHYP_SIMD::splat(v); }
  static FASTHYP_INLINE V select(Mask mask, V yes, V no) {
    return FASTHYP_SIMD::select<double>(mask, yes, no);
  }
  static FASTHYP_INLINE V fma(V a, V b, V c) { return FASTHYP_SIMD::fma(a, b, c); }
  static FASTHYP_INLINE V sqrt(V v) { return FASTHYP_SIMD::sqrt(v); }
  static FASTHYP_INLINE V abs(V v) {
    return bits_as<V>(bits_as<Mask>(v) & ~(std::int64_t{1} << 63));
  }
  static FASTHYP_INLINE bool any(Mask mask) {
    std::int64_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= mask[i];
    return bits != 0;
  }
};

// The poses of a block: the last ones again where there are fewer.
struct Block {
  std::int64_t first;
  int valid;
  std::int64_t at(int lane) const { return first + (lane < valid ? lane : valid - 1); }
};

struct Places {
  std::int64_t row[kWidth] = {};
  bool operator==(const Places&) const = default;

  Places() = default;
  Places(const Rows& rows, const Block& block) {
    for (int lane = 0; lane < kWidth; ++lane) row[lane] = block.at(lane) / rows.inner % rows.count;
  }
};

V weight_of(const V* weights, int joint) { return weights ? weights[joint] : splat(1.0); }

// Points (joints, 3) about the mean of those that count, which it gives; zero where one does not.
template <class T>
void load_centred(const Rows& rows, const Places& places, const V* weights, V count, int joints,
                  V* points, V (&mean)[3]) {
  const T* from[kWidth];
  for (int lane = 0; lane < kWidth; ++lane)
    from[lane] = static_cast<const T*>(rows.data) + places.row[lane] * joints * 3;
  V sum[3] = {splat(0.0), splat(0.0), splat(0.0)};
  for (int j = 0; j < joints; ++j) {
    for (int c = 0; c < 3; ++c) {
      V v;
      for (int lane = 0; lane < kWidth; ++lane)
        v[lane] = static_cast<double>(from[lane][3 * j + c]);
      if (weights) v = select<double>(weights[j] > splat(0.0), v, splat(0.0));
      points[3 * j + c] = v;
      sum[c] += v;
    }
  }
  for (int c = 0; c < 3; ++c) mean[c] = sum[c] / count;
  for (int j = 0; j < joints; ++j)
    for (int c = 0; c < 3; ++c) {
      V v = points[3 * j + c] - mean[c];
      if (weights) v = select<double>(weights[j] > splat(0.0), v, splat(0.0));
      points[3 * j + c] = v;
    }
}

template <class T>
FASTHYP_INLINE void put(void* out, const Block& block, std::int64_t width, std::int64_t place,
                        V value) {
  T* to = static_cast<T*>(out) + block.first * width + place;
  for (int lane = 0; lane < block.valid; ++lane) to[lane * width] = static_cast<T>(value[lane]);
}

// source, target: centred, of one block.
template <class T>
void align_block(const Call& call, const Block& block, const V* source, const V* target,
                 const V* weights, V count, const V (&source_mean)[3], const V (&target_mean)[3]) {
  const int joints = call.joints;
  V products[9], variance = splat(0.0);
  for (V& p : products) p = splat(0.0);
  for (int j = 0; j < joints; ++j) {
    const V* s = source + 3 * j;
    const V* t = target + 3 * j;
    for (int i = 0; i < 9; ++i) products[i] = fma(t[i / 3], s[i % 3], products[i]);
    for (int c = 0; c < 3; ++c) variance = fma(s[c], s[c], variance);
  }
  if (weights) {  // NaN where no joint counts
    const V nothing = (source_mean[0] + target_mean[0]) * splat(0.0);
    products[0] += nothing;
  }
  const Similarity<Lanes> fit(products, variance, count, source_mean, target_mean);
  if (call.rotation)
    for (int i = 0; i < 9; ++i) put<T>(call.rotation, block, 9, i, fit.rotation.matrix[i]);
  if (call.scale) put<T>(call.scale, block, 1, 0, fit.scale);
  if (call.translation)
    for (int i = 0; i < 3; ++i) put<T>(call.translation, block, 3, i, fit.translation[i]);

  const bool gradient = call.grad_source || call.grad_target;
  if (!call.error && !call.distances && !gradient) return;
  V error = splat(0.0), outer[9], pulls[3], pull[3];
  for (V& o : outer) o = splat(0.0);
  for (V& p : pulls) p = splat(0.0);
  const auto pull_of = [&](int j, V distance) {
    const auto at_target = distance == splat(0.0);
    const V by = select<double>(at_target, splat(0.0), weight_of(weights, j) / (distance * count));
    for (V& p : pull) p *= by;
  };
  for (int j = 0; j < joints; ++j) {
    const V s[3] = {source[3 * j], source[3 * j + 1], source[3 * j + 2]};
    const V t[3] = {target[3 * j], target[3 * j + 1], target[3 * j + 2]};
    V distance = fit.distance(s, t, pull);
    if (weights) distance = select<double>(weights[j] > splat(0.0), distance, splat(0.0));
    error += distance;
    if (call.distances) put<T>(call.distances, block, joints, j, distance);
    if (gradient) {
      pull_of(j, distance);
      for (int i = 0; i < 9; ++i) outer[i] = fma(pull[i / 3], s[i % 3], outer[i]);
      for (int c = 0; c < 3; ++c) pulls[c] += pull[c];
    }
  }
  if (call.error) put<T>(call.error, block, 1, 0, error / count);
  if (!gradient) return;

  const Gradient<Lanes> derivative(fit, outer, pulls, count);
  for (int j = 0; j < joints; ++j) {
    const V s[3] = {source[3 * j], source[3 * j + 1], source[3 * j + 2]};
    const V t[3] = {target[3 * j], target[3 * j + 1], target[3 * j + 2]};
    V by_source[3], by_target[3];
    pull_of(j, fit.distance(s, t, pull));
    derivative.joint(fit, s, t, pull, by_source, by_target);
    for (int c = 0; c < 3; ++c) {
      if (weights) {
        const auto counts = weights[j] > splat(0.0);
        by_source[c] = select<double>(counts, by_source[c], splat(0.0));
        by_target[c] = select<double>(counts, by_target[c], splat(0.0));
      }
      if (call.grad_source) put<T>(call.grad_source, block, 3 * joints, 3 * j + c, by_source[c]);
      if (call.grad_target) put<T>(call.grad_target, block, 3 * joints, 3 * j + c, by_target[c]);
    }
  }
}

template <class T>
void align(const Call& call, std::int64_t begin, std::int64_t end, double* scratch) {
  const int joints = call.joints;
  V* source = reinterpret_cast<V*>(scratch);
  V* target = source + 3 * joints;
  V* weights = call.mask.data ? target + 3 * joints : nullptr;
  V count = splat(static_cast<double>(joints)), source_mean[3], target_mean[3];
  Places targets;
  for (std::int64_t first = begin; first < end; first += kWidth) {
    const Block block{first, static_cast<int>(end - first < kWidth ? end - first : kWidth)};
    if (weights) {
      const Places masks(call.mask, block);
      count = splat(0.0);
      for (int j = 0; j < joints; ++j) {
        V w;
        for (int lane = 0; lane < kWidth; ++lane)
          w[lane] = static_cast<const bool*>(call.mask.data)[masks.row[lane] * joints + j];
        weights[j] = w;
        count += w;
      }
    }
    const Places sources(call.source, block), next(call.target, block);
    load_centred<T>(call.source, sources, weights, count, joints, source, source_mean);
    // Hypotheses of one image share their target.
    if (first == begin || weights || next != targets)
      load_centred<T>(call.target, next, weights, count, joints, target, target_mean);
    targets = next;
    align_block<T>(call, block, source, target, weights, count, source_mean, target_mean);
  }
}

}  // namespace

extern const procrustes::Kernels procrustes_kernels;
const procrustes::Kernels procrustes_kernels = {kWidth, align<float>, align<double>};

}  // namespace fasthyp::FASTHYP_SIMD
