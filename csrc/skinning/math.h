// Rotations and rigid motions, and how gradients pass through them. O says how to compute with
// O::Number, a number or a vector of them: of(double), fma, sqrt, sincos, where_positive.
#pragma once

#include "skinning/skinning.h"

namespace fasthyp::skinning {

template <class O>
using Number = typename O::Number;

template <class O>
FASTHYP_HD Number<O> dot(const Number<O>* a, const Number<O>* b) {
  return O::fma(a[0], b[0], O::fma(a[1], b[1], a[2] * b[2]));
}

// out = a x b
template <class O>
FASTHYP_HD void cross(const Number<O>* a, const Number<O>* b, Number<O>* out) {
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) {
    const int j = (i + 1) % 3, k = (i + 2) % 3;
    out[i] = O::fma(a[j], b[k], -(a[k] * b[j]));
  }
}

// out = add + m v
template <class O>
FASTHYP_HD void rotate(const Number<O>* m, const Number<O>* v, const Number<O>* add,
                       Number<O>* out) {
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i)
    out[i] = O::fma(m[3 * i], v[0], O::fma(m[3 * i + 1], v[1], O::fma(m[3 * i + 2], v[2], add[i])));
}

// out = m^T v
template <class O>
FASTHYP_HD void rotate_back(const Number<O>* m, const Number<O>* v, Number<O>* out) {
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) out[i] = O::fma(m[i], v[0], O::fma(m[3 + i], v[1], m[6 + i] * v[2]));
}

// out = a b
template <class O>
FASTHYP_HD void multiply(const Number<O>* a, const Number<O>* b, Number<O>* out) {
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) FASTHYP_UNROLL
  for (int k = 0; k < 3; ++k)
    out[3 * i + k] =
        O::fma(a[3 * i], b[k], O::fma(a[3 * i + 1], b[3 + k], a[3 * i + 2] * b[6 + k]));
}

// out = a^T b
template <class O>
FASTHYP_HD void multiply_back(const Number<O>* a, const Number<O>* b, Number<O>* out) {
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) FASTHYP_UNROLL
  for (int k = 0; k < 3; ++k)
    out[3 * i + k] = O::fma(a[i], b[k], O::fma(a[3 + i], b[3 + k], a[6 + i] * b[6 + k]));
}

// out += a b^T
template <class O>
FASTHYP_HD void add_multiply_turned(const Number<O>* a, const Number<O>* b, Number<O>* out) {
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) FASTHYP_UNROLL
  for (int k = 0; k < 3; ++k)
    out[3 * i + k] = O::fma(
        a[3 * i], b[3 * k],
        O::fma(a[3 * i + 1], b[3 * k + 1], O::fma(a[3 * i + 2], b[3 * k + 2], out[3 * i + k])));
}

// out += s a b^T for vectors, s = 1 or -1
template <class O>
FASTHYP_HD void add_outer(const Number<O>* a, const Number<O>* b, bool minus, Number<O>* out) {
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) FASTHYP_UNROLL
  for (int k = 0; k < 3; ++k) out[3 * i + k] = O::fma(minus ? -a[i] : a[i], b[k], out[3 * i + k]);
}

// --- axis-angle: I + a K + b K^2 with K v = r x v, a = sin(t) / t, b = (1 - cos(t)) / t^2 and,
// as smplx has it, t = |r + 1e-8| ---

template <class O>
struct Angle {
  Number<O> shifted[3];  // r + 1e-8
  Number<O> inverse;     // 1 / t
  Number<O> a, b, cosine;

  FASTHYP_HD explicit Angle(const Number<O>* r) {
    const Number<O> one = O::of(1);
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) shifted[i] = r[i] + O::of(1e-8);
    const Number<O> angle = O::sqrt(dot<O>(shifted, shifted));
    // r = -1e-8 exactly: any number will do
    inverse = one / O::where_positive(angle, angle, one);
    Number<O> s, c;
    O::sincos(angle * O::of(0.5), s, c);
    const Number<O> twice = s + s;
    cosine = O::fma(-twice, s, one);
    a = twice * c * inverse;
    b = twice * s * inverse * inverse;
  }
};

template <class O>
FASTHYP_HD void rodrigues(const Number<O>* r, Number<O>* m) {
  const Angle<O> t(r);
  // K^2 = r r^T - |r|^2
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) {
    const int j = (i + 1) % 3, k = (i + 2) % 3;
    m[3 * i + i] = O::fma(-t.b, O::fma(r[j], r[j], r[k] * r[k]), O::of(1));
    const Number<O> product = t.b * (r[i] * r[j]), turn = t.a * r[k];
    m[3 * i + j] = product - turn;
    m[3 * j + i] = product + turn;
  }
}

// g: the gradient by m. out: by r.
template <class O>
FASTHYP_HD void rodrigues_backward(const Number<O>* r, const Number<O>* g, Number<O>* out) {
  const Angle<O> t(r);
  Number<O> by_a = O::of(0), by_b = O::of(0);
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) {
    const int j = (i + 1) % 3, k = (i + 2) % 3;
    const Number<O> both = g[3 * i + j] + g[3 * j + i], turn = g[3 * j + i] - g[3 * i + j];
    by_a = O::fma(r[k], turn, by_a);
    by_b = O::fma(both, r[i] * r[j], by_b);
    by_b = O::fma(-g[3 * i + i], O::fma(r[j], r[j], r[k] * r[k]), by_b);
  }
  // By t, over t.
  const Number<O> two = O::of(2);
  const Number<O> rate =
      O::fma(by_a, t.cosine - t.a, by_b * O::fma(-two, t.b, t.a)) * t.inverse * t.inverse;
  FASTHYP_UNROLL
  for (int k = 0; k < 3; ++k) {
    const int i = (k + 1) % 3, j = (k + 2) % 3;
    const Number<O> turn = g[3 * j + i] - g[3 * i + j];
    const Number<O> with_i = g[3 * i + k] + g[3 * k + i], with_j = g[3 * j + k] + g[3 * k + j];
    const Number<O> square = -(g[3 * i + i] + g[3 * j + j]) * (two * r[k]);
    out[k] = O::fma(
        t.a, turn,
        O::fma(t.b, O::fma(with_i, r[i], O::fma(with_j, r[j], square)), rate * t.shifted[k]));
  }
}

// --- two vectors, by Gram and Schmidt (Zhou et al., CVPR 2019) ---

// Where coordinate i of vector v lies among the six numbers.
FASTHYP_HD int place_of(Rotation rotation, int v, int i) {
  return rotation == Rotation::interleaved ? 2 * i + v : 3 * v + i;
}
// And where that of axis v lies in the matrix.
FASTHYP_HD int entry_of(Rotation rotation, int v, int i) {
  return rotation == Rotation::rows ? 3 * v + i : 3 * i + v;
}

// out = v / max(|v|, 1e-12); returns the factor.
template <class O>
FASTHYP_HD Number<O> normalise(const Number<O>* v, Number<O>* out) {
  const Number<O> length = O::sqrt(dot<O>(v, v)), least = O::of(1e-12);
  const Number<O> factor = O::of(1) / O::where_positive(length - least, length, least);
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) out[i] = v[i] * factor;
  return factor;
}

template <class O>
struct Axes {
  Number<O> a[2][3], b[3][3], factor[2], along;

  FASTHYP_HD Axes(Rotation rotation, const Number<O>* x) {
    FASTHYP_UNROLL
    for (int v = 0; v < 2; ++v) FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) a[v][i] = x[place_of(rotation, v, i)];
    factor[0] = normalise<O>(a[0], b[0]);
    along = dot<O>(b[0], a[1]);
    Number<O> rest[3];
    FASTHYP_UNROLL
    for (int i = 0; i < 3; ++i) rest[i] = O::fma(-along, b[0][i], a[1][i]);
    factor[1] = normalise<O>(rest, b[1]);
    cross<O>(b[0], b[1], b[2]);
  }
};

template <class O>
FASTHYP_HD void two_vectors(Rotation rotation, const Number<O>* x, Number<O>* m) {
  const Axes<O> axes(rotation, x);
  FASTHYP_UNROLL
  for (int v = 0; v < 3; ++v) FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) m[entry_of(rotation, v, i)] = axes.b[v][i];
}

template <class O>
FASTHYP_HD void two_vectors_backward(Rotation rotation, const Number<O>* x, const Number<O>* g,
                                     Number<O>* out) {
  const Axes<O> axes(rotation, x);
  Number<O> by[3][3], turned[3];
  FASTHYP_UNROLL
  for (int v = 0; v < 3; ++v) FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) by[v][i] = g[entry_of(rotation, v, i)];
  cross<O>(axes.b[1], by[2], turned);
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) by[0][i] = by[0][i] + turned[i];
  cross<O>(by[2], axes.b[0], turned);
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) by[1][i] = by[1][i] + turned[i];

  Number<O> second[3];  // by what is left of the second vector
  const Number<O> length = dot<O>(by[1], axes.b[1]);
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) second[i] = O::fma(-length, axes.b[1][i], by[1][i]) * axes.factor[1];
  const Number<O> across = dot<O>(second, axes.b[0]);
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i) {
    out[place_of(rotation, 1, i)] = O::fma(-across, axes.b[0][i], second[i]);
    by[0][i] = O::fma(-axes.along, second[i], O::fma(-across, axes.a[1][i], by[0][i]));
  }
  const Number<O> first = dot<O>(by[0], axes.b[0]);
  FASTHYP_UNROLL
  for (int i = 0; i < 3; ++i)
    out[place_of(rotation, 0, i)] = O::fma(-first, axes.b[0][i], by[0][i]) * axes.factor[0];
}

// --- cameras ---

template <class O>
FASTHYP_HD void project(int numbers, const Number<O>* camera, const Number<O>* point,
                        Number<O>* out) {
  FASTHYP_UNROLL
  for (int i = 0; i < 2; ++i)
    out[i] = numbers == kWeak
                 ? camera[0] * (point[i] + camera[1 + i])
                 : camera[3 + i] * (point[i] + camera[i]) / (point[2] + camera[2]) + camera[5 + i];
}

// g: the gradient by what is projected. Adds to those by the point (3) and the camera (numbers).
template <class O>
FASTHYP_HD void project_backward(int numbers, const Number<O>* camera, const Number<O>* point,
                                 const Number<O>* g, Number<O>* by_point, Number<O>* by_camera) {
  if (numbers == kWeak) {
    FASTHYP_UNROLL
    for (int i = 0; i < 2; ++i) {
      by_camera[0] = O::fma(g[i], point[i] + camera[1 + i], by_camera[0]);
      by_camera[1 + i] = O::fma(g[i], camera[0], by_camera[1 + i]);
      by_point[i] = O::fma(g[i], camera[0], by_point[i]);
    }
    return;
  }
  const Number<O> inverse = O::of(1) / (point[2] + camera[2]);
  Number<O> by_depth = O::of(0);
  FASTHYP_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Number<O> ratio = (point[i] + camera[i]) * inverse,
                    slope = g[i] * camera[3 + i] * inverse;
    by_depth = O::fma(-slope, ratio, by_depth);
    by_point[i] = by_point[i] + slope;
    by_camera[i] = by_camera[i] + slope;
    by_camera[3 + i] = O::fma(g[i], ratio, by_camera[3 + i]);
    by_camera[5 + i] = by_camera[5 + i] + g[i];
  }
  by_point[2] = by_point[2] + by_depth;
  by_camera[2] = by_camera[2] + by_depth;
}

// --- any of them ---

template <class O>
FASTHYP_HD void to_matrix(Rotation rotation, const Number<O>* x, Number<O>* m) {
  if (rotation == Rotation::axis_angle) {
    rodrigues<O>(x, m);
  } else if (rotation == Rotation::matrix) {
    FASTHYP_UNROLL
    for (int i = 0; i < 9; ++i) m[i] = x[i];
  } else {
    two_vectors<O>(rotation, x, m);
  }
}

template <class O>
FASTHYP_HD void to_matrix_backward(Rotation rotation, const Number<O>* x, const Number<O>* g,
                                   Number<O>* out) {
  if (rotation == Rotation::axis_angle) {
    rodrigues_backward<O>(x, g, out);
  } else if (rotation == Rotation::matrix) {
    FASTHYP_UNROLL
    for (int i = 0; i < 9; ++i) out[i] = g[i];
  } else {
    two_vectors_backward<O>(rotation, x, g, out);
  }
}

}  // namespace fasthyp::skinning
