// The Gaussian, its window and the Levenberg-Marquardt iteration, shared by the CPU and CUDA
// kernels.
//
// Model: A exp(-|w|^2 / 2) with w = (u, v) = L^T (x - mean), where L L^T is the inverse covariance
// and L is lower triangular with a positive diagonal, so every iterate is a proper Gaussian. A step
// is taken in the coordinates of w, where the Gaussian is round and of unit size, whatever it looks
// like in the image:
//
//   w' = (I + E) w - d,   E = [e1 e12; 0 e2],   A' = A (1 + alpha)
//
// so that the Jacobian's columns are g (1, u, v, -u^2, -u v, -v^2) up to factors of A, and J^T J,
// J^T r are moments of g^2 and g r in u and v. Close to a minimum J^T J is nearly a constant
// matrix.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/host_device.h"
#include "gaussian_fit/gaussian_fit.h"

namespace fasthyp::gaussian_fit {

// Cells where |w|^2 is above this have g < 1e-13: the model is zero there to rounding, and such
// cells enter the sums only through their squares, which are added up once.
constexpr double kReach2 = 60.0;

// A step changes no coordinate of w by more than this at |w| = 1, and no amplitude by more than
// this part.
constexpr double kLongestStep = 0.5;

struct Gaussian {
  double amplitude, x, y;
  double l11, l21, l22;  // L = [l11 0; l21 l22]
};

// Sums over the cells of the window.
constexpr int kMoments2 = 15;  // g^2 u^i v^j, i + j <= 4
constexpr int kMoments1 = 6;   // g r u^i v^j, i + j <= 2
constexpr int kMoments = kMoments2 + kMoments1;

// Place of (i, j) among the moments up to `order`, ordered by j, then i.
FASTHYP_HD constexpr int moment_index(int i, int j, int order) {
  return j * (order + 1) - j * (j - 1) / 2 + i;
}

struct Cells {  // first and one past last
  int begin, end;
};

FASTHYP_HD Cells clip_cells(double low, double high, int size) {
  // the comparisons are also false for NaN
  const int begin = low > 0 ? (low < size ? static_cast<int>(std::ceil(low)) : size) : 0;
  const int end = high < size - 1 ? (high >= 0 ? static_cast<int>(std::floor(high)) + 1 : 0) : size;
  return {begin, end};
}

// The cells where the model counts.
struct Window {
  double x, slope, per_l11, l22;
  Cells rows;

  FASTHYP_HD Window(const Gaussian& p, int height)
      : x(p.x), slope(p.l21 / p.l11), per_l11(1.0 / p.l11), l22(p.l22) {
    const double reach = std::sqrt(kReach2) / l22;
    rows = clip_cells(p.y - reach, p.y + reach, height);
  }

  // In the row at distance dy from the mean.
  FASTHYP_HD Cells columns(double dy, int width) const {
    const double v = l22 * dy;
    const double rest = kReach2 - v * v;
    const double reach = std::sqrt(rest > 0 ? rest : 0.0) * per_l11;
    const double centre = x - slope * dy;
    return clip_cells(centre - reach, centre + reach, width);
  }
};

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What one look at a map tells.
struct MapSummary {
  double maximum, minimum;  // over the finite cells
  int argmax;               // its first place
  double square_sum;
  bool finite;
};

struct Initial {
  double amplitude, x, y, sigma_x, theta, sigma_y;
};

FASTHYP_HD Initial initial_guess(const MapSummary& map, int width, const double* init,
                                 int init_size) {
  Initial p{map.maximum,
            static_cast<double>(map.argmax % width),
            static_cast<double>(map.argmax / width),
            2.0,
            0.0,
            2.0};
  if (init_size == 2) {
    p.x = init[0];
    p.y = init[1];
  } else if (init_size == 6) {
    p = {init[0], init[1], init[2], init[3], init[4], init[5]};
  }
  return p;
}

// In image axes, x to the right, y down.
struct Covariance {
  double xx, xy, yy;
};

FASTHYP_HD Covariance covariance_of(double sigma_x, double theta, double sigma_y) {
  const double c = std::cos(theta), s = std::sin(theta);
  const double p = sigma_x * sigma_x, q = sigma_y * sigma_y;
  return {p * c * c + q * s * s, c * s * (q - p), p * s * s + q * c * c};
}

FASTHYP_HD Covariance covariance_of(const Gaussian& p) {
  // L^-T L^-1
  const double yy = 1.0 / (p.l22 * p.l22), k = p.l21 / p.l11;
  return {1.0 / (p.l11 * p.l11) + k * k * yy, -k * yy, yy};
}

FASTHYP_HD Gaussian gaussian_of(const Initial& p) {
  // the precision matrix [a b; b c] = L L^T
  const double c = std::cos(p.theta), s = std::sin(p.theta);
  const double px = 1.0 / (p.sigma_x * p.sigma_x), py = 1.0 / (p.sigma_y * p.sigma_y);
  const double l11 = std::sqrt(px * c * c + py * s * s);
  const double l21 = c * s * (py - px) / l11;
  return {p.amplitude, p.x, p.y, l11, l21, std::sqrt(px * py) / l11};
}

FASTHYP_HD bool usable(const Initial& p) {
  const double sum = p.amplitude + p.x + p.y + p.sigma_x + p.theta + p.sigma_y;
  return sum - sum == 0 && p.sigma_x > 0 &&
         p.sigma_y > 0;  // the difference is NaN for NaN, infinity
}

struct Result {
  double amplitude, x, y, sigma_x, sigma_y, theta, rmse;
  Covariance covariance;
  bool converged;
  int iterations;
};

constexpr double kPi = 3.14159265358979323846;

FASTHYP_HD double wrap_angle(double theta) {  // into [0, pi)
  const double t = theta - kPi * std::floor(theta / kPi);
  return t < kPi && t >= 0 ? t : 0.0;
}

FASTHYP_HD Result unconverged(const Initial& p, int iterations) {
  return {p.amplitude, p.x,
          p.y,         p.sigma_x,
          p.sigma_y,   wrap_angle(p.theta),
          0.0,         covariance_of(p.sigma_x, p.theta, p.sigma_y),
          false,       iterations};
}

// sigma_x belongs to the principal axis that is nearer the x axis; the axis is (cos theta, -sin
// theta).
FASTHYP_HD Result converged(const Gaussian& p, int iterations) {
  const Covariance c = covariance_of(p);
  const double half = 0.5 * (c.xx - c.yy), mid = 0.5 * (c.xx + c.yy);
  const double spread = std::sqrt(half * half + c.xy * c.xy);
  const double large = mid + spread;
  // the smaller one from the determinant: the difference would cancel in a long, thin Gaussian
  const double det = 1.0 / (p.l11 * p.l22);
  const double small = det / large * det;
  const bool x_is_large = half >= 0;
  const double theta = 0.5 * std::atan2(x_is_large ? -c.xy : c.xy, std::fabs(half));
  return {p.amplitude,
          p.x,
          p.y,
          std::sqrt(x_is_large ? large : small),
          std::sqrt(x_is_large ? small : large),
          wrap_angle(theta),
          0.0,
          c,
          true,
          iterations};
}

template <class T>
FASTHYP_HD void store_result(const Call& call, std::int64_t map, const Result& r) {
  // theta just below pi may round up to it in float
  const double theta = static_cast<double>(static_cast<T>(r.theta)) < kPi ? r.theta : 0.0;
  const double scalars[5] = {r.amplitude, r.sigma_x, r.sigma_y, theta, r.rmse};
  FASTHYP_UNROLL
  for (int i = 0; i < 5; ++i)
    static_cast<T*>(call.scalars)[i * call.count + map] = static_cast<T>(scalars[i]);
  T* mean = static_cast<T*>(call.mean) + 2 * map;
  mean[0] = static_cast<T>(r.x);
  mean[1] = static_cast<T>(r.y);
  T* covariance = static_cast<T*>(call.covariance) + 4 * map;
  covariance[0] = static_cast<T>(r.covariance.xx);
  covariance[1] = covariance[2] = static_cast<T>(r.covariance.xy);
  covariance[3] = static_cast<T>(r.covariance.yy);
  call.converged[map] = r.converged;
  call.iterations[map] = r.iterations;
}

enum class Status { running, converged, failed };

// The iteration: evaluate the moments at `trial`, then call advance, until it is no longer running.
struct Fitter {
  Gaussian best, trial;
  double square_sum;   // of the map
  double cost;         // sum of squared residuals at best
  double hessian[21];  // J^T J at best, lower triangle by rows
  double gradient[6];  // J^T r at best
  double predicted;    // by how much the model of the cost falls from best to trial
  double damping, growth, tol;
  int iterations, max_iter;
  double limit;  // size of the map

  FASTHYP_HD void begin(const Gaussian& start, const MapSummary& map, int height, int width,
                        int max_iterations, double tolerance) {
    trial = best = start;
    square_sum = map.square_sum;
    cost = -1;
    predicted = 0;
    damping = 1e-3;  // nearly a Gauss-Newton step, as MINPACK starts
    growth = 2;
    tol = tolerance;
    iterations = 0;
    max_iter = max_iterations;
    limit = height > width ? height : width;
  }

  // A Gaussian much larger than the map or far outside it fits a constant or a slope, and one that
  // explains nothing of the map fits nothing.
  FASTHYP_HD bool plausible() const {
    const Covariance c = covariance_of(best);
    return cost < (1 - 1e-6) * square_sum && c.xx + c.yy < 8 * limit * limit && c.xx + c.yy > 0 &&
           best.x > -limit && best.y > -limit && best.x < 2 * limit && best.y < 2 * limit;
  }

  FASTHYP_HD Status finish() const { return plausible() ? Status::converged : Status::failed; }

  FASTHYP_HD Status advance(const double* moments) {
    const double a = trial.amplitude;
    const double* first = moments + kMoments2;
    // sum of r^2 - h^2 over the window = A sum of g (2 r - A g)
    double trial_cost = square_sum + a * (2 * first[0] - a * moments[0]);
    trial_cost = trial_cost > 0 ? trial_cost : 0;
    if (cost < 0) {
      accept(moments, trial_cost);
    } else {
      ++iterations;
      if (trial_cost < cost) {
        const double t = 2 * (cost - trial_cost) / predicted - 1;
        const double factor = 1 - t * t * t;
        damping *= factor > 1.0 / 3 ? factor : 1.0 / 3;
        damping = damping > 1e-12 ? damping : 1e-12;
        growth = 2;
        accept(moments, trial_cost);
      } else {  // also where it is NaN
        damping *= growth;
        growth *= 2;
      }
      if (iterations >= max_iter) return Status::failed;
    }
    double step[6];
    if (!solve(step)) return Status::failed;
    take(step);
    // Below 1e-15 of the sum of squares the cost is rounding noise.
    if (predicted <= tol * cost || predicted <= 1e-15 * square_sum) {
      best = trial;
      ++iterations;
      return finish();
    }
    return Status::running;
  }

 private:
  FASTHYP_HD double amplitude_unit() const {
    return best.amplitude != 0 ? std::fabs(best.amplitude) : std::sqrt(square_sum);
  }

  FASTHYP_HD void accept(const double* moments, double trial_cost) {
    best = trial;
    cost = trial_cost;
    const double unit = amplitude_unit(), a = best.amplitude;
    constexpr int pu[6] = {0, 1, 0, 2, 1, 0}, pv[6] = {0, 0, 1, 0, 1, 2};
    const double scale[6] = {unit, a, a, -a, -a, -a};
    FASTHYP_UNROLL
    for (int i = 0; i < 6; ++i) {
      gradient[i] = scale[i] * moments[kMoments2 + moment_index(pu[i], pv[i], 2)];
      FASTHYP_UNROLL
      for (int j = 0; j <= i; ++j)
        hessian[i * (i + 1) / 2 + j] =
            scale[i] * scale[j] * moments[moment_index(pu[i] + pu[j], pv[i] + pv[j], 4)];
    }
  }

  // (J^T J + damping * largest diagonal) step = -J^T r, shortened to kLongestStep. False where
  // there is no step. By L D L^T, column by column: one division a column, and what follows it does
  // not wait for one another, because on a GPU a single thread does this while all others wait.
  FASTHYP_HD bool solve(double* step) {
    double largest = 0;
    FASTHYP_UNROLL
    for (int i = 0; i < 6; ++i) {
      const double d = hessian[i * (i + 1) / 2 + i];
      largest = d > largest ? d : largest;
    }
    if (!(largest > 0) || !(largest < 1e300) || !(damping < 1e100)) return false;
    double c[21], per_pivot[6];  // L below the diagonal; 1 / D
    for (;;) {
      FASTHYP_UNROLL
      for (int i = 0; i < 6; ++i) {
        FASTHYP_UNROLL
        for (int j = 0; j <= i; ++j)
          c[i * (i + 1) / 2 + j] =
              hessian[i * (i + 1) / 2 + j] + (i == j ? damping * largest : 0.0);
      }
      bool positive = true;
      FASTHYP_UNROLL
      for (int j = 0; j < 6; ++j) {
        const double pivot = c[j * (j + 1) / 2 + j];
        positive = positive && pivot > 0;
        per_pivot[j] = 1.0 / (pivot > 0 ? pivot : 1.0);
        double column[6];
        FASTHYP_UNROLL
        for (int i = j + 1; i < 6; ++i) {
          column[i] = c[i * (i + 1) / 2 + j];
          c[i * (i + 1) / 2 + j] *= per_pivot[j];
          FASTHYP_UNROLL
          for (int k = j + 1; k <= i; ++k)
            c[i * (i + 1) / 2 + k] -= c[i * (i + 1) / 2 + j] * column[k];
        }
      }
      if (positive) break;
      damping *= 10;  // rounding made a singular matrix indefinite
      if (!(damping < 1e100)) return false;
    }
    FASTHYP_UNROLL
    for (int i = 0; i < 6; ++i) step[i] = -gradient[i];
    FASTHYP_UNROLL
    for (int j = 0; j < 6; ++j) {
      FASTHYP_UNROLL
      for (int i = j + 1; i < 6; ++i) step[i] -= c[i * (i + 1) / 2 + j] * step[j];
    }
    FASTHYP_UNROLL
    for (int j = 5; j >= 0; --j) {
      step[j] *= per_pivot[j];
      FASTHYP_UNROLL
      for (int i = j + 1; i < 6; ++i) step[j] -= c[i * (i + 1) / 2 + j] * step[i];
    }
    // Far from the minimum a full step throws the Gaussian off the blob.
    double longest = 0, slope = 0, square = 0;
    FASTHYP_UNROLL
    for (int i = 0; i < 6; ++i) {
      const double size = std::fabs(step[i]);
      longest = size > longest ? size : longest;
      slope += step[i] * gradient[i];
      square += step[i] * step[i];
    }
    const double part = longest > kLongestStep ? kLongestStep / longest : 1.0;
    FASTHYP_UNROLL
    for (int i = 0; i < 6; ++i) step[i] *= part;
    // -2 g.s - s.H.s with H.(s / part) = -g - damping largest s / part
    predicted = part * (part * damping * largest * square - (2 - part) * slope);
    return predicted >= 0 && predicted < 1e300;
  }

  FASTHYP_HD void take(const double* step) {
    trial.amplitude = best.amplitude + amplitude_unit() * step[0];
    const double dy = step[2] / best.l22;
    trial.y = best.y + dy;
    trial.x = best.x + (step[1] - best.l21 * dy) / best.l11;
    const double e1 = std::exp(step[3]), e2 = std::exp(step[5]);
    trial.l11 = best.l11 * e1;
    trial.l21 = best.l21 * e1 + best.l22 * step[4];
    trial.l22 = best.l22 * e2;
  }
};

}  // namespace fasthyp::gaussian_fit
