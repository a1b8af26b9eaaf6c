// Sums of outer products over rows, which weight gradients are. For cpu_training.cpp alone, which
// is compiled once per SIMD level.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/simd.h"
#include "coupling/cpu_net.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

// c[i][j] = (add ? c[i][j] : 0) + sum over rows of a[row][i] b[row][j]; R x NV vectors of it.
template <class T, int R, int NV>
FASTHYP_INLINE void outer_tile(const T* a, std::ptrdiff_t lda, const T* b, std::ptrdiff_t ldb,
                               int rows, T* c, std::ptrdiff_t ldc, bool add) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[i][n] = splat<T>(0);
  for (int r = 0; r < rows; ++r) {
    Vec<T> bv[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) bv[n] = load<T>(b + n * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec<T> av = splat<T>(a[i]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[i][n] = fma(av, bv[n], acc[i][n]);
    }
    a += lda;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      T* to = c + i * ldc + n * W;
      store<T>(to, add ? load<T>(to) + acc[i][n] : acc[i][n]);
    }
}

// Rows of c that one register tile holds, by its vectors.
template <int NV>
constexpr int kOuterRows = FASTHYP_SIMD_BYTES == 64 ? (NV == 3 ? 8 : 12)
                                                    : (NV == 3   ? 4
                                                       : NV == 2 ? 6
                                                                 : 12);

template <class T, int NV, int R>
int outer_groups(const T* a, std::ptrdiff_t lda, int i, int m, const T* b, std::ptrdiff_t ldb,
                 int rows, T* c, std::ptrdiff_t ldc, bool add) {
  if constexpr (R <= kOuterRows<NV>)
    for (; i + R <= m; i += R)
      outer_tile<T, R, NV>(a + i, lda, b, ldb, rows, c + i * ldc, ldc, add);
  return i;
}

template <class T, int NV>
void outer_columns(const T* a, std::ptrdiff_t lda, int m, const T* b, std::ptrdiff_t ldb, int rows,
                   T* c, std::ptrdiff_t ldc, bool add) {
  int i = 0;
  i = outer_groups<T, NV, 12>(a, lda, i, m, b, ldb, rows, c, ldc, add);
  i = outer_groups<T, NV, 8>(a, lda, i, m, b, ldb, rows, c, ldc, add);
  i = outer_groups<T, NV, 6>(a, lda, i, m, b, ldb, rows, c, ldc, add);
  i = outer_groups<T, NV, 4>(a, lda, i, m, b, ldb, rows, c, ldc, add);
  i = outer_groups<T, NV, 2>(a, lda, i, m, b, ldb, rows, c, ldc, add);
  outer_groups<T, NV, 1>(a, lda, i, m, b, ldb, rows, c, ldc, add);
}

// a (rows, m), b (rows, n) -> c (m, n); b is read, and c written, up to whole vectors.
template <class T>
void outer(const T* a, std::ptrdiff_t lda, int m, const T* b, std::ptrdiff_t ldb, int n, int rows,
           T* c, std::ptrdiff_t ldc, bool add) {
  constexpr int W = kLanes<T>, kColumns = 48;  // of a, which stay in the cache for all of b
  const int vectors = (n + W - 1) / W;
  for (int i = 0; i < m; i += kColumns) {
    const int columns = std::min(kColumns, m - i);
    for (int j = 0, take; j < vectors; j += take) {
      const int left = vectors - j;
      // Pairs and threes fill the registers; one vector alone only if there is just one.
      take = left <= 2 ? left : left == 4 || left % 3 == 2 ? 2 : 3;
      const T *x = a + i, *y = b + j * W;
      T* to = c + i * ldc + j * W;
      if (take == 1)
        outer_columns<T, 1>(x, lda, columns, y, ldb, rows, to, ldc, add);
      else if (take == 2)
        outer_columns<T, 2>(x, lda, columns, y, ldb, rows, to, ldc, add);
      else
        outer_columns<T, 3>(x, lda, columns, y, ldb, rows, to, ldc, add);
    }
  }
}

// --- over many rows ---

// Columns [0, n) of some rows of x, and zeros behind the last column.
template <class T, int kWidth>
void copy_panel(const T* x, std::ptrdiff_t ld, int rows, int n, T* to) {
  for (int r = 0; r < rows; ++r, x += ld, to += kWidth)
    if (n == kWidth)
      std::memcpy(to, x, kWidth * sizeof(T));
    else
      std::fill(std::copy_n(x, n, to), to + kWidth, T(0));
}

// c (m, n) = or += a b^T over rows of one panel each, which hold R and NV vectors of numbers.
template <class T, int R, int NV>
void outer_panel(const T* a, int m, const T* b, int n, int rows, T* c, std::ptrdiff_t ldc,
                 bool add) {
  constexpr int kWidth = NV * kLanes<T>;
  if (m == R && n == kWidth) return outer_tile<T, R, NV>(a, R, b, kWidth, rows, c, ldc, add);
  T edge[R * kWidth];
  outer_tile<T, R, NV>(a, R, b, kWidth, rows, edge, kWidth, false);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      const T v = edge[i * kWidth + j];
      c[i * ldc + j] = add ? c[i * ldc + j] + v : v;
    }
}

// a (rows, m), b (rows, n) -> c (m, n), exactly: sums of as many rows at a time as leave a panel of
// b in the first cache, and one of all of a in the second.
template <class T>
void outer_rows(const T* a, std::ptrdiff_t lda, int m, const T* b, std::ptrdiff_t ldb, int n,
                std::int64_t rows, T* c, std::ptrdiff_t ldc, bool add, Scratch& scratch) {
  constexpr int R = kOuterRows<3>, NV = 3, kWidth = NV * kLanes<T>;
  constexpr int kRowsAtOnce = 8192 / FASTHYP_SIMD_BYTES;
  const int tiles = (m + R - 1) / R;
  scratch.reserve(Scratch::bytes<T>(kRowsAtOnce * kWidth) +
                  Scratch::bytes<T>(std::size_t(tiles) * R * kRowsAtOnce));
  T* pb = scratch.take<T>(kRowsAtOnce * kWidth);
  T* pa = scratch.take<T>(std::size_t(tiles) * R * kRowsAtOnce);
  for (std::int64_t row = 0; row < rows; row += kRowsAtOnce) {
    const int count = static_cast<int>(std::min<std::int64_t>(kRowsAtOnce, rows - row));
    const auto panel = [&](int i) { return pa + std::ptrdiff_t(i) * R * count; };
    for (int i = 0; i < tiles; ++i)
      copy_panel<T, R>(a + row * lda + i * R, lda, count, std::min(R, m - i * R), panel(i));
    for (int j = 0; j < n; j += kWidth) {
      const int columns = std::min(kWidth, n - j);
      copy_panel<T, kWidth>(b + row * ldb + j, ldb, count, columns, pb);
      for (int i = 0; i < tiles; ++i)
        outer_panel<T, R, NV>(panel(i), std::min(R, m - i * R), pb, columns, count,
                              c + std::ptrdiff_t(i) * R * ldc + j, ldc, add || row > 0);
    }
  }
}

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
