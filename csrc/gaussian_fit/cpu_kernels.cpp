// Compiled once per SIMD level. One call fits one map, in double whatever the map's type.
#include "common/simd.h"
#include "gaussian_fit/gaussian_fit.h"
#include "gaussian_fit/math.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using namespace gaussian_fit;
using V = Vec<double>;
constexpr int kWidth = kLanes<double>;

// A map in double, rows padded with zeros to whole vectors.
struct Map {
  const double* cells;
  int height, width, stride;
};

double sum_lanes(V v) {
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

V lane_offsets() {
  V v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

// Copies one map and looks at it.
template <class T>
MapSummary load_map(const T* in, int height, int width, int stride, double* out) {
  V squares = splat<double>(0);
  MapSummary map{-kInfinity, kInfinity, 0, 0, true};
  for (int y = 0; y < height; ++y) {
    double* row = out + static_cast<std::ptrdiff_t>(y) * stride;
    for (int x = 0; x < width; ++x)
      row[x] = static_cast<double>(in[static_cast<std::ptrdiff_t>(y) * width + x]);
    for (int x = width; x < stride; ++x) row[x] = 0;
    V high = splat(-kInfinity), low = splat(kInfinity);
    int x = 0;
    for (; x + kWidth <= width; x += kWidth) {
      const V h = load(row + x);
      squares = fma(h, h, squares);
      high = select<double>(h > high, h, high);
      low = select<double>(h < low, h, low);
    }
    double row_high = -kInfinity, row_low = kInfinity, rest = 0;
    for (; x < width; ++x) {
      rest += row[x] * row[x];
      row_high = row[x] > row_high ? row[x] : row_high;
      row_low = row[x] < row_low ? row[x] : row_low;
    }
    for (int i = 0; i < kWidth; ++i) {
      row_high = high[i] > row_high ? high[i] : row_high;
      row_low = low[i] < row_low ? low[i] : row_low;
    }
    squares[0] += rest;
    map.minimum = row_low < map.minimum ? row_low : map.minimum;
    if (row_high > map.maximum) {
      map.maximum = row_high;
      int at = 0;
      while (at < width - 1 && !(row[at] == row_high)) ++at;
      map.argmax = y * width + at;
    }
  }
  map.square_sum = sum_lanes(squares);
  map.finite = map.square_sum - map.square_sum == 0;  // false for NaN and infinity
  return map;
}

// What load_map could not tell with NaN or infinity about: the greatest finite cell.
MapSummary finite_part(const Map& map) {
  MapSummary s{0, 0, 0, 0, false};
  bool any = false;
  for (int i = 0; i < map.height * map.width; ++i) {
    const double h =
        map.cells[static_cast<std::ptrdiff_t>(i / map.width) * map.stride + i % map.width];
    if (h - h == 0 && (!any || h > s.maximum)) {
      any = true;
      s.maximum = h;
      s.argmax = i;
    }
  }
  return s;
}

// exp(-square / 2), to 1 ulp; 1e-304 where the square is above 1400. Unlike the general exp it
// needs no second scaling, and its short chain of operations matters in rows of two or three
// vectors.
V bell(V square) {
  using I = IntVec<double>;
  V x = splat(-0.5) * square;
  x = select<double>(x > splat(-700.0), x, splat(-700.0));
  const V shifted = fma(x, splat(1.4426950408889634), splat(6755399441055744.0));
  const V n = shifted - splat(6755399441055744.0);  // rounded; also in the low bits of shifted
  V r = fma(n, splat(-0.6931471803691238), x);
  r = fma(n, splat(-1.9082149292705877e-10), r);
  // Taylor series to r^12 by Estrin's scheme, |r| <= ln(2) / 2
  const V r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
  const V p01 = splat(1.0) + r;
  const V p23 = fma(r, splat(1. / 6), splat(0.5));
  const V p45 = fma(r, splat(1. / 120), splat(1. / 24));
  const V p67 = fma(r, splat(1. / 5040), splat(1. / 720));
  const V p89 = fma(r, splat(1. / 362880), splat(1. / 40320));
  const V pab = fma(r, splat(1. / 39916800), splat(1. / 3628800));
  const V high = fma(r4, splat(1. / 479001600), fma(r2, pab, p89));
  const V low = fma(r4, fma(r2, p67, p45), fma(r2, p23, p01));
  const V p = fma(r8, high, low);
  return bits_as<V>(bits_as<I>(p) + (bits_as<I>(shifted) << 52));
}

// w of the lanes from column x on. Lanes past the row's end are put where the model is zero.
struct Row {
  V u, square;  // |w|^2
};
Row row_coordinates(const Gaussian& p, int x, double dy, V offsets, int width) {
  const V column = splat<double>(x) + offsets;
  const double v = p.l22 * dy;
  const V u = fma(column - splat(p.x), splat(p.l11), splat(p.l21 * dy));
  return {u, select<double>(column < splat<double>(width), fma(u, u, splat(v * v)), splat(1e4))};
}

void moments(const Gaussian& p, const Map& map, double* out) {
  V total[kMoments];
  for (V& t : total) t = splat<double>(0);
  const V offsets = lane_offsets(), zero = splat<double>(0), amplitude = splat(p.amplitude);
  const Window window(p, map.height);
  const Cells rows = window.rows;
  for (int y = rows.begin; y < rows.end; ++y) {
    const double dy = y - p.y, v = p.l22 * dy;
    const Cells columns = window.columns(dy, map.width);
    const double* row = map.cells + static_cast<std::ptrdiff_t>(y) * map.stride;
    V s0 = zero, s1 = zero, s2 = zero, s3 = zero, s4 = zero, t0 = zero, t1 = zero, t2 = zero;
    for (int x = columns.begin / kWidth * kWidth; x < columns.end; x += kWidth) {
      const Row w = row_coordinates(p, x, dy, offsets, map.width);
      const V g = bell(w.square);
      const V r = fma(amplitude, g, -load(row + x));
      const V u = w.u, gu = g * u, guu = gu * u;
      s0 = fma(g, g, s0);
      s1 = fma(g, gu, s1);
      s2 = fma(gu, gu, s2);
      s3 = fma(gu, guu, s3);
      s4 = fma(guu, guu, s4);
      t0 = fma(g, r, t0);
      t1 = fma(gu, r, t1);
      t2 = fma(guu, r, t2);
    }
    const V s[5] = {s0, s1, s2, s3, s4}, t[3] = {t0, t1, t2};
    double power = 1;
    for (int j = 0; j <= 4; ++j, power *= v)
      for (int i = 0; i + j <= 4; ++i)
        total[moment_index(i, j, 4)] = fma(s[i], splat(power), total[moment_index(i, j, 4)]);
    power = 1;
    for (int j = 0; j <= 2; ++j, power *= v)
      for (int i = 0; i + j <= 2; ++i) {
        V& sum = total[kMoments2 + moment_index(i, j, 2)];
        sum = fma(t[i], splat(power), sum);
      }
  }
  for (int k = 0; k < kMoments; ++k) out[k] = sum_lanes(total[k]);
}

// Root mean square residual over the whole map.
double residual(const Gaussian& p, const Map& map) {
  const V offsets = lane_offsets(), zero = splat<double>(0);
  const Window window(p, map.height);
  const Cells rows = window.rows;
  V sum = zero;
  for (int y = 0; y < map.height; ++y) {
    const double dy = y - p.y;
    Cells columns{0, 0};
    if (y >= rows.begin && y < rows.end) columns = window.columns(dy, map.width);
    const double* row = map.cells + static_cast<std::ptrdiff_t>(y) * map.stride;
    for (int x = 0; x < map.stride; x += kWidth) {
      V r = load(row + x);
      if (x < columns.end && x + kWidth > columns.begin) {
        const Row w = row_coordinates(p, x, dy, offsets, map.width);
        r = fma(splat(p.amplitude), bell(w.square), -r);
      }
      sum = fma(r, r, sum);
    }
  }
  return std::sqrt(sum_lanes(sum) / (static_cast<double>(map.height) * map.width));
}

template <class T>
Result fit_map(const Call& call, std::int64_t index, double* scratch) {
  const int height = call.height, width = call.width;
  const Map map{scratch, height, width, (width + kWidth - 1) / kWidth * kWidth};
  const T* in = static_cast<const T*>(call.heatmaps) + index * height * width;
  MapSummary summary = load_map(in, height, width, map.stride, scratch);
  if (!summary.finite) summary = finite_part(map);
  double init[6] = {};
  for (int i = 0; i < call.init_size; ++i)
    init[i] = static_cast<double>(static_cast<const T*>(call.init)[index * call.init_size + i]);
  const Initial start = initial_guess(summary, width, init, call.init_size);
  Result result = unconverged(start, 0);
  if (!summary.finite || !usable(start)) {
    result.rmse = kNaN;
    return result;
  }
  const Gaussian guess = gaussian_of(start);
  if (summary.maximum > summary.minimum) {
    Fitter fitter;
    fitter.begin(guess, summary, height, width, call.max_iter, call.tol);
    Status status;
    double sums[kMoments];
    do {
      moments(fitter.trial, map, sums);
      status = fitter.advance(sums);
    } while (status == Status::running);
    result.iterations = fitter.iterations;
    if (status == Status::converged) {
      result = converged(fitter.best, fitter.iterations);
      result.rmse = residual(fitter.best, map);
      return result;
    }
  }
  result.rmse = residual(guess, map);
  return result;
}

template <class T>
void fit(const Call& call, std::int64_t index, double* scratch) {
  store_result<T>(call, index, fit_map<T>(call, index, scratch));
}

}  // namespace

extern const gaussian_fit::Kernels gaussian_fit_kernels;
const gaussian_fit::Kernels gaussian_fit_kernels = {kWidth, fit<float>, fit<double>};

}  // namespace fasthyp::FASTHYP_SIMD
