// The alignment of one pose, shared by the CPU kernels (L: a pose in each SIMD lane) and the CUDA
// kernel (L: a pose in a thread). In double whatever the type of the poses.
//
// With both poses about their means, B = sum_j target_j source_j^T = U diag(s) V^T. The rotation
// is U V^T, the last column of U turned round where that makes it proper (Kabsch 1976, Umeyama
// 1991). The singular values come from one-sided Jacobi rotations (Hestenes 1958), which find small
// ones as well as large ones, so that flat, straight and mirrored poses need no path of their own.
// A lane that has converged is left as it is: no pose's result depends on its neighbours.
//
// Matrices are rows of three.
#pragma once

#include "common/host_device.h"

namespace fasthyp::procrustes {

constexpr int kMostSweeps = 20;          // five are usual
constexpr double kOrthogonal = 1e-29;    // squared cosine of columns that count as orthogonal
constexpr double kNothing = 1e-280;      // squared norm of a column that has no direction
constexpr double kOnePoint = 1e-28;      // variance, in squares of the mean, of a pose in one point
constexpr double kUndetermined = 1e-12;  // share of the largest, of a direction without a gradient

template <class L>
using Value = typename L::Value;

template <class L>
FASTHYP_HD Value<L> dot(const Value<L>* a, int step_a, const Value<L>* b, int step_b) {
  return L::fma(a[2 * step_a], b[2 * step_b], L::fma(a[step_a], b[step_b], a[0] * b[0]));
}

// out = m x, or m^T x.
template <class L, bool kTransposed>
FASTHYP_HD void multiply(const Value<L> (&m)[9], const Value<L>* x, Value<L> (&out)[3]) {
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i)
    out[i] = dot<L>(kTransposed ? m + i : m + 3 * i, kTransposed ? 3 : 1, x, 1);
}

template <class L>
FASTHYP_HD void cross(const Value<L> (&a)[3], const Value<L> (&b)[3], Value<L> (&out)[3]) {
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) {
    const int j = (i + 1) % 3, k = (i + 2) % 3;
    out[i] = L::fma(a[j], b[k], -(a[k] * b[j]));
  }
}

// Makes columns P and Q of b orthogonal; v turns along. Whether any lane had to.
template <class L, int P, int Q>
FASTHYP_HD bool turn_columns(Value<L> (&b)[9], Value<L> (&v)[9]) {
  using V = Value<L>;
  const V p = dot<L>(b + P, 3, b + P, 3), q = dot<L>(b + Q, 3, b + Q, 3);
  const V both = dot<L>(b + P, 3, b + Q, 3);
  const auto turns = both * both > L::splat(kOrthogonal) * p * q;
  if (!L::any(turns)) return false;
  const V one = L::splat(1), zero = L::splat(0);
  // tan of the smaller angle: t^2 + (q - p) / both t - 1 = 0
  const V difference = q - p, twice = both + both;
  const V root = L::sqrt(L::fma(difference, difference, twice * twice));
  V t = twice / (L::abs(difference) + root);
  t = L::select(difference < zero, -t, t);
  V c = one / L::sqrt(L::fma(t, t, one));
  const V s = L::select(turns, c * t, zero);
  c = L::select(turns, c, one);
  FASTHYP_UNROLL
  for (int i = 0; i < 9; i += 3) {
    V x = b[i + P], y = b[i + Q];
    b[i + P] = L::fma(c, x, -(s * y));
    b[i + Q] = L::fma(s, x, c * y);
    x = v[i + P], y = v[i + Q];
    v[i + P] = L::fma(c, x, -(s * y));
    v[i + Q] = L::fma(s, x, c * y);
  }
  return true;
}

// Column P becomes the longer one.
template <class L, int P, int Q>
FASTHYP_HD void sort_columns(Value<L> (&b)[9], Value<L> (&v)[9]) {
  using V = Value<L>;
  const auto swap = dot<L>(b + P, 3, b + P, 3) < dot<L>(b + Q, 3, b + Q, 3);
  FASTHYP_UNROLL
  for (int i = 0; i < 9; i += 3) {
    const V x = b[i + P], y = b[i + Q], z = v[i + P], w = v[i + Q];
    b[i + P] = L::select(swap, y, x);
    b[i + Q] = L::select(swap, x, y);
    v[i + P] = L::select(swap, w, z);
    v[i + Q] = L::select(swap, z, w);
  }
}

// The best rotation for B, and what its derivative needs.
template <class L>
struct Rotation {
  Value<L> matrix[9];
  // Rows: the eigenvectors of trace(S) - S with S = matrix^T B; one over its eigenvalues, or zero.
  Value<L> axes[3][3];
  Value<L> inverse[3];
  Value<L> trace;  // of matrix^T B

  FASTHYP_HD explicit Rotation(const Value<L> (&products)[9]) {
    using V = Value<L>;
    const V one = L::splat(1), zero = L::splat(0);
    V largest = zero;
    FASTHYP_UNROLL
    for (int i = 0; i < 9; ++i) {
      const V size = L::abs(products[i]);
      largest = L::select(size > largest, size, largest);
    }
    largest = L::select(largest == zero, one, largest);
    V b[9], v[9], poison = zero;  // NaN where anything is not finite
    FASTHYP_UNROLL
    for (int i = 0; i < 9; ++i) {
      b[i] = products[i] / largest;  // squares neither vanish nor overflow
      v[i] = i % 4 == 0 ? one : zero;
      poison = L::fma(b[i], zero, poison);
    }
    for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
      bool turned = turn_columns<L, 0, 1>(b, v);
      turned = turn_columns<L, 0, 2>(b, v) || turned;
      turned = turn_columns<L, 1, 2>(b, v) || turned;
      if (!turned) break;
    }
    sort_columns<L, 0, 1>(b, v);
    sort_columns<L, 0, 2>(b, v);
    sort_columns<L, 1, 2>(b, v);

    // Directions of the two longest columns, or any where they have none; the third follows.
    V u[3][3], s[3];
    V square = dot<L>(b, 3, b, 3);
    auto none = square <= L::splat(kNothing);
    s[0] = L::sqrt(square);
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) u[0][i] = L::select(none, i == 0 ? one : zero, b[3 * i] / s[0]);
    V c[3];
    const V along = dot<L>(b + 1, 3, u[0], 1);
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) c[i] = L::fma(-along, u[0][i], b[3 * i + 1]);
    square = dot<L>(c, 1, c, 1);
    none = square <= L::splat(kNothing);
    s[1] = L::sqrt(square);
    // Perpendicular to (x, y, z): the longer one of (-y, x, 0) and (0, z, -y).
    const auto flat = L::abs(u[0][0]) > L::abs(u[0][2]);
    c[0] = L::select(none, L::select(flat, -u[0][1], zero), c[0]);
    c[1] = L::select(none, L::select(flat, u[0][0], u[0][2]), c[1]);
    c[2] = L::select(none, L::select(flat, zero, -u[0][1]), c[2]);
    const V length = L::sqrt(dot<L>(c, 1, c, 1));
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) {
      u[1][i] = c[i] / length;
      axes[0][i] = v[3 * i];
      axes[1][i] = v[3 * i + 1];
    }
    cross<L>(u[0], u[1], u[2]);
    cross<L>(axes[0], axes[1], axes[2]);
    FASTHYP_UNROLL
    for (int i = 0; i < 9; ++i)
      matrix[i] =
          L::fma(u[2][i / 3], axes[2][i % 3],
                 L::fma(u[1][i / 3], axes[1][i % 3], L::fma(u[0][i / 3], axes[0][i % 3], poison)));

    // trace(R^T B) = s[0] + s[1] + s[2], the last with the sign of det B.
    s[2] = dot<L>(b + 2, 3, u[2], 1) * dot<L>(v + 2, 3, axes[2], 1);
    trace = (s[0] + s[1] + s[2]) * largest;
    const V floor = L::splat(kUndetermined) * (s[0] + s[1]);
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) {
      const V sum = s[(i + 1) % 3] + s[(i + 2) % 3];
      inverse[i] = L::select(sum > floor, one / (sum * largest), zero);
    }
  }
};

// A pose's similarity, from sums over its joints that count.
template <class L>
struct Similarity {
  Rotation<L> rotation;
  Value<L> scale, inverse_variance;  // zero where the source is one point
  Value<L> scaled[9];                // scale * rotation
  Value<L> translation[3];

  // variance: sum of squares of the source about its mean; count: joints.
  FASTHYP_HD Similarity(const Value<L> (&products)[9], Value<L> variance, Value<L> count,
                        const Value<L> (&source_mean)[3], const Value<L> (&target_mean)[3])
      : rotation(products) {
    using V = Value<L>;
    const V one = L::splat(1), zero = L::splat(0);
    // But for the rounding of the mean.
    const auto point =
        variance <= L::splat(kOnePoint) * count * dot<L>(source_mean, 1, source_mean, 1);
    inverse_variance = L::select(point, zero, one / variance);
    scale = L::select(point, zero, rotation.trace / variance);
    FASTHYP_UNROLL
    for (int i = 0; i < 9; ++i) scaled[i] = scale * rotation.matrix[i];
    V moved[3];
    multiply<L, false>(scaled, source_mean, moved);
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) translation[i] = target_mean[i] - moved[i];
  }

  // From the aligned source to the target, both about their means.
  FASTHYP_HD Value<L> distance(const Value<L> (&source)[3], const Value<L> (&target)[3],
                               Value<L> (&difference)[3]) const {
    multiply<L, false>(scaled, source, difference);
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) difference[i] = difference[i] - target[i];
    return L::sqrt(dot<L>(difference, 1, difference, 1));
  }
};

// The derivative of the mean distance by source and target.
template <class L>
struct Gradient {
  Value<L> by_products[9];  // dE / dB
  Value<L> shrink;          // of the source about its mean
  Value<L> mean_pull[3];

  // pull of joint j: its unit difference over the number of joints, or zero where that is zero.
  // outer: sum of pull source^T; pulls: sum of pull.
  FASTHYP_HD Gradient(const Similarity<L>& fit, const Value<L> (&outer)[9],
                      const Value<L> (&pulls)[3], Value<L> count) {
    using V = Value<L>;
    const auto& r = fit.rotation.matrix;
    // The scale is trace(R^T B) / variance, in which R is at a maximum.
    V by_scale = L::splat(0);
    FASTHYP_UNROLL
    for (int i = 0; i < 9; ++i) by_scale = L::fma(outer[i], r[i], by_scale);
    shrink = by_scale * fit.scale * fit.inverse_variance;
    shrink = shrink + shrink;
    // S = R^T B is symmetric at the maximum. With dR = R [w]x that gives (trace(S) - S) w =
    // axis(R^T dB), axis(X) = (X21 - X12, X02 - X20, X10 - X01).
    V turn[9], axis[3], w[3];
    FASTHYP_UNROLL
    for (int i = 0; i < 9; ++i) turn[i] = fit.scale * dot<L>(r + i / 3, 3, outer + i % 3, 3);
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) {
      const int j = (i + 1) % 3, k = (i + 2) % 3;
      axis[i] = turn[3 * k + j] - turn[3 * j + k];
      w[i] = L::splat(0);
    }
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) {
      const auto& along = fit.rotation.axes[i];
      const V part = dot<L>(along, 1, axis, 1) * fit.rotation.inverse[i];
      FASTHYP_UNROLL
      for (int j = 0; j < 3; ++j) w[j] = L::fma(part, along[j], w[j]);
    }
    // R ([w]x + by_scale / variance)
    const V grow = by_scale * fit.inverse_variance;
    FASTHYP_UNROLL
    for (int i = 0; i < 9; i += 3) {
      FASTHYP_UNROLL
      for (int j = 0; j < 3; ++j) {
        const int k = (j + 1) % 3, l = (j + 2) % 3;
        by_products[i + j] = L::fma(r[i + j], grow, L::fma(r[i + k], w[l], -(r[i + l] * w[k])));
      }
    }
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) mean_pull[i] = pulls[i] / count;
  }

  // Of one joint, both poses about their means.
  FASTHYP_HD void joint(const Similarity<L>& fit, const Value<L> (&source)[3],
                        const Value<L> (&target)[3], const Value<L> (&pull)[3],
                        Value<L> (&by_source)[3], Value<L> (&by_target)[3]) const {
    Value<L> free[3], turned[3];
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) free[i] = pull[i] - mean_pull[i];
    multiply<L, true>(fit.scaled, free, by_source);
    multiply<L, true>(by_products, target, turned);
    multiply<L, false>(by_products, source, by_target);
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) {
      by_source[i] = L::fma(-shrink, source[i], by_source[i] + turned[i]);
      by_target[i] = by_target[i] - free[i];
    }
  }
};

}  // namespace fasthyp::procrustes
