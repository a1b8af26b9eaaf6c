// Products of a tile of rows with a packed matrix. For cpu_kernels.cpp alone, which is compiled
// once per SIMD level.
#pragma once

#include <algorithm>

#include "coupling/coupling.h"
#include "coupling/math.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using coupling::Activation;
using coupling::Matrix;

// --- operands: how weights and inputs are stored, and one multiply-accumulate step ---

template <class T>
struct Plain {
  using State = T;
  using In = T;
  static constexpr int kStep = 1;  // inputs per step
  static constexpr int kWidth = kLanes<T>;
  using Acc = Vec<T>;
  static FASTHYP_INLINE Acc weight(const In* w) { return load<T>(w); }
  static FASTHYP_INLINE Acc input(const In* x) { return splat<T>(*x); }
  static FASTHYP_INLINE Acc step(Acc acc, Acc x, Acc w) { return fma(x, w, acc); }
  static FASTHYP_INLINE void store_in(In* p, Acc v) { store<T>(p, v); }
  static void copy_in(In* to, const State* from, int count) { std::copy_n(from, count, to); }
};

#if defined(__AVX512BF16__)
struct Bf16 {
  using State = float;
  using In = std::uint16_t;
  static constexpr int kStep = 2;
  static constexpr int kWidth = 16;
  using Acc = Vec<float>;
  static FASTHYP_INLINE __m512bh weight(const In* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static FASTHYP_INLINE __m512bh input(const In* x) {
    std::int32_t pair;
    std::memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static FASTHYP_INLINE Acc step(Acc acc, __m512bh x, __m512bh w) {
    return (Acc)_mm512_dpbf16_ps((__m512)acc, x, w);
  }
  static FASTHYP_INLINE void store_in(In* p, Acc v) {
    const __m256bh b = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &b, 32);
  }
  // Writes up to 15 zeros more.
  static void copy_in(In* to, const State* from, int count) {
    for (int i = 0; i < count; i += kWidth) {
      const int left = count - i;
      const auto mask = static_cast<__mmask16>(left < kWidth ? (1 << left) - 1 : 0xffff);
      store_in(to + i, (Acc)_mm512_maskz_loadu_ps(mask, from + i));
    }
  }
};
#endif

// Rows that one register tile holds, by vectors per block: accumulators fill the registers.
template <int NB>
constexpr int kRows = FASTHYP_SIMD_BYTES == 64 ? (NB == 3 ? 8 : 12)
                                               : (NB == 3   ? 4
                                                  : NB == 2 ? 6
                                                            : 8);

// Whether a register tile fetches weights ahead; for fewer rows the processor does it well by
// itself.
template <int R>
constexpr bool kFetches = R >= 4;

constexpr int kTile = 48;  // rows; a multiple of every kRows

// --- register tile: R rows x NB vectors of outputs, over one chunk of inputs ---

enum class Store { sums, hidden_relu };

// out = (init ? init[row] + column : out) + x w. For hidden_relu, hidden = max(that, 0) instead.
// On the way fetches `ahead`, `stride` bytes for each step.
template <class P, int NB, int R, Store kStore>
FASTHYP_INLINE void register_tile(const typename P::In* x, std::ptrdiff_t ldx,
                                  const typename P::In* w, int inputs,
                                  const typename P::State* const* init, std::ptrdiff_t column,
                                  typename P::State* out, std::ptrdiff_t ldo,
                                  typename P::In* hidden, std::ptrdiff_t ldh,
                                  const std::byte* ahead, std::ptrdiff_t stride) {
  using S = typename P::State;
  constexpr int W = P::kWidth;
  typename P::Acc acc[R][NB];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) acc[r][n] = splat<S>(0);
  for (int k = 0; k < inputs; k += P::kStep) {
    decltype(P::weight(w)) wv[NB];
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) wv[n] = P::weight(w + n * W * P::kStep);
    w += NB * W * P::kStep;
    if constexpr (kFetches<R>) {
      __builtin_prefetch(ahead);
      ahead += stride;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto xv = P::input(x + r * ldx + k);
#pragma GCC unroll 4
      for (int n = 0; n < NB; ++n) acc[r][n] = P::step(acc[r][n], xv, wv[n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const S* base = init ? init[r] + column : out + r * ldo;
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) {
      const auto v = load<S>(base + n * W) + acc[r][n];
      if constexpr (kStore == Store::hidden_relu)
        P::store_in(hidden + r * ldh + n * W, activate<S>(v, Activation::relu, S(0)));
      else
        store<S>(out + r * ldo + n * W, v);
    }
  }
}

template <class P>
struct Block {  // arguments of one block of outputs over one chunk of inputs, for many rows
  const typename P::In* x;
  std::ptrdiff_t ldx;
  const typename P::In* w;
  const typename P::In* next;  // the weights that are multiplied next: of as many inputs, mostly
  int inputs;
  const typename P::State* const* init;
  std::ptrdiff_t column;
  typename P::State* out;
  std::ptrdiff_t ldo;
  typename P::In* hidden;
  std::ptrdiff_t ldh;
};

template <class P, int NB, int R, Store kStore>
int row_groups(const Block<P>& b, int row, int rows) {
  if constexpr (R <= kRows<NB>) {
    if (row + R > rows) return row;
    const std::byte* ahead = nullptr;
    std::ptrdiff_t stride = 0, share = 0;
    if constexpr (kFetches<R>) {  // each row fetches its share of the next weights
      constexpr std::int64_t kStepBytes = NB * P::kWidth * P::kStep * sizeof(typename P::In);
      share = b.inputs / P::kStep * kStepBytes / rows;
      stride = (kStepBytes * R + rows - 1) / rows;
      ahead = reinterpret_cast<const std::byte*>(b.next);
    }
    for (; row + R <= rows; row += R)
      register_tile<P, NB, R, kStore>(
          b.x + row * b.ldx, b.ldx, b.w, b.inputs, b.init ? b.init + row : nullptr, b.column,
          b.out + row * b.ldo, b.ldo, b.hidden + row * b.ldh, b.ldh, ahead + row * share, stride);
  }
  return row;
}

template <class P, int NB, Store kStore>
void block_rows(const Block<P>& b, int rows) {
  int row = 0;
  row = row_groups<P, NB, 12, kStore>(b, row, rows);
  row = row_groups<P, NB, 8, kStore>(b, row, rows);
  row = row_groups<P, NB, 6, kStore>(b, row, rows);
  row = row_groups<P, NB, 4, kStore>(b, row, rows);
  row = row_groups<P, NB, 2, kStore>(b, row, rows);
  row_groups<P, NB, 1, kStore>(b, row, rows);
}

template <class P, Store kStore>
void block_rows(const Block<P>& b, int vectors, int rows) {
  switch (vectors) {
    case 1:
      return block_rows<P, 1, kStore>(b, rows);
    case 2:
      return block_rows<P, 2, kStore>(b, rows);
    default:
      return block_rows<P, 3, kStore>(b, rows);
  }
}

// --- a matrix ---

template <class P>
struct Input {
  const typename P::In* x;  // (rows, ld)
  std::ptrdiff_t ld;
  int rows;  // at most kTile
};

// A packed matrix, and the rows that it is multiplied with.
template <class P>
class Product {
 public:
  using S = typename P::State;
  using In = typename P::In;

  // hoisted[row]: the row's sums of bias and condition; `in` then holds the other inputs alone.
  // null: `in` holds all inputs, the condition's first.
  Product(const Matrix& m, const std::byte* packed, Input<P> in, const S* const* hoisted = nullptr)
      : m_(m), packed_(packed), in_(in) {
    if (hoisted && m.cond_padded > 0) {
      first_ = m.cond_padded;
      init_ = hoisted;
      column_ = m.hoisted;
    } else {
      std::fill_n(bias_, in.rows, reinterpret_cast<const S*>(packed + m.bias));
      init_ = bias_;
    }
  }
  Product(const Product&) = delete;

  // Block b over all inputs -> out (rows, ldo).
  void sums(int b, S* out, std::ptrdiff_t ldo) const {
    sum(b, m_.cond_padded + m_.in_padded, out, ldo);
  }
  // And over those of the condition alone.
  void condition_sums(int b, S* out, std::ptrdiff_t ldo) const { sum(b, m_.cond_padded, out, ldo); }

  // Block b over inputs [k, k + inputs), of which `in` holds only these: added to out, or, if k is
  // the first input, to where the sums begin.
  void add_chunk(int b, int k, int inputs, S* out, std::ptrdiff_t ldo) const {
    Block<P> block = chunk(b, k, inputs, in_.x);
    block.next = weights(b + 1, k);
    block.out = out;
    block.ldo = ldo;
    block_rows<P, Store::sums>(block, m_.vectors, in_.rows);
  }

  // Block b and its ReLU straight from the registers, where all inputs are one chunk.
  bool one_chunk() const {
    const int inputs = m_.cond_padded + m_.in_padded - first_;
    return inputs > 0 && inputs <= m_.chunk && (first_ > 0 || m_.cond_padded == 0);
  }
  void relu(int b, In* hidden, std::ptrdiff_t ldh) const {
    Block<P> block = chunk(b, first_, m_.in_padded, in_.x);
    block.next = weights(b + 1, first_);
    block.hidden = hidden;
    block.ldh = ldh;
    block_rows<P, Store::hidden_relu>(block, m_.vectors, in_.rows);
  }

 private:
  void sum(int b, int end, S* out, std::ptrdiff_t ldo) const {
    if (first_ == end)
      for (int r = 0; r < in_.rows; ++r)
        std::copy_n(init_[r] + column_ + b * m_.block, m_.block, out + r * ldo);
    for (int k = first_; k < end;) {
      // The condition's inputs and the others are summed apart.
      const int inputs = std::min(m_.chunk, (k < m_.cond_padded ? m_.cond_padded : end) - k);
      Block<P> block = chunk(b, k, inputs, in_.x + (k - first_));
      block.next = k + inputs < end ? weights(b, k + inputs) : weights(b + 1, first_);
      block.out = out;
      block.ldo = ldo;
      block_rows<P, Store::sums>(block, m_.vectors, in_.rows);
      k += inputs;
    }
  }

  // Those of block b from input k on; behind the last block something that is fetched in vain.
  const In* weights(int b, int k) const {
    const std::int64_t stored = m_.cond_padded + m_.in_padded;
    return reinterpret_cast<const In*>(packed_ + m_.weight) + (b * stored + k) * m_.block;
  }

  Block<P> chunk(int b, int k, int inputs, const In* x) const {
    Block<P> block{};
    block.x = x;
    block.ldx = in_.ld;
    block.w = weights(b, k);
    block.inputs = inputs;
    if (k == first_) {
      block.init = init_;
      block.column = column_ + static_cast<std::ptrdiff_t>(b) * m_.block;
    }
    return block;
  }

  const Matrix& m_;
  const std::byte* packed_;
  Input<P> in_;
  int first_ = 0;  // input that `in` begins with
  const S* const* init_;
  std::ptrdiff_t column_ = 0;
  const S* bias_[kTile];
};

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
