// The subnets of the fused flow, one tile of rows at a time. For cpu_kernels.cpp alone, which is
// compiled once per SIMD level.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>

#include "coupling/coupling.h"
#include "coupling/math.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using coupling::Activation;
using coupling::Coupling;
using coupling::Flow;
using coupling::Layer;
using coupling::Share;

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

constexpr int kTile = 48;  // rows; a multiple of every kRows

// --- register tile: R rows x NB vectors of outputs, over one chunk of inputs ---

enum class Store { sums, hidden_relu };

// out = (init ? init[row] + column : out) + x w. For hidden_relu, hidden = max(that, 0) instead.
template <class P, int NB, int R, Store kStore>
FASTHYP_INLINE void register_tile(const typename P::In* x, std::ptrdiff_t ldx,
                                  const typename P::In* w, int inputs,
                                  const typename P::State* const* init, std::ptrdiff_t column,
                                  typename P::State* out, std::ptrdiff_t ldo,
                                  typename P::In* hidden, std::ptrdiff_t ldh) {
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
    for (; row + R <= rows; row += R)
      register_tile<P, NB, R, kStore>(b.x + row * b.ldx, b.ldx, b.w, b.inputs,
                                      b.init ? b.init + row : nullptr, b.column,
                                      b.out + row * b.ldo, b.ldo, b.hidden + row * b.ldh, b.ldh);
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

// --- layers ---

template <class T>
std::ptrdiff_t padded_stride(std::ptrdiff_t width) {
  return coupling::padded_stride(width, sizeof(T));
}

// Per-thread memory, kept between calls: fresh pages would cost as much as a small flow.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void reserve(std::size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<std::byte*>(std::aligned_alloc(64, size_));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    used_ = 0;
  }
  template <class T>
  T* take(std::size_t count) {
    T* p = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes<T>(count);
    return p;
  }
  template <class T>
  static std::size_t bytes(std::size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0, used_ = 0;
};

template <class P>
class Mlp {
 public:
  using S = typename P::State;
  using In = typename P::In;

  // Widths of the buffers that any coupling of the flow needs.
  struct Sizes {
    std::ptrdiff_t input = 0, inner = 0, chunk = 0, block = 0, output = 0;
    explicit Sizes(const Flow& flow) {
      for (const Coupling& c : flow.couplings) {
        input = std::max<std::ptrdiff_t>(input, c.cond_padded + c.layers[0].in_padded);
        output = std::max<std::ptrdiff_t>(output, c.layers.back().out_padded());
        for (std::size_t l = 0; l < c.layers.size(); ++l) {
          block = std::max<std::ptrdiff_t>(block, c.layers[l].block);
          if (l + 2 < c.layers.size())
            inner = std::max<std::ptrdiff_t>(inner, c.layers[l].out_padded());
          if (l > 0) chunk = std::max<std::ptrdiff_t>(chunk, c.layers[l].chunk);
        }
      }
      input = padded_stride<In>(input);
      inner = inner ? padded_stride<In>(inner) : 0;
      chunk = padded_stride<In>(chunk);
      block = padded_stride<S>(block);
      output = padded_stride<S>(output);
    }
    std::size_t bytes() const {
      return Scratch::bytes<In>(kTile * (input + 2 * inner + chunk)) +
             Scratch::bytes<S>(kTile * (block + output)) + 4 * 64;
    }
  };

  Mlp(const Sizes& sizes, Scratch& scratch, const Share* share = nullptr)
      : sizes_(sizes), share_(share) {
    x = scratch.take<In>(kTile * sizes.input);
    for (int i = 0; i < 2; ++i) {
      inner_[i] = scratch.take<In>(kTile * sizes.inner);
      if (share) inner_[i] = reinterpret_cast<In*>(share->inner[i]);
    }
    chunk_ = scratch.take<In>(kTile * sizes.chunk);
    partial_ = scratch.take<S>(kTile * sizes.block);
    raw = scratch.take<S>(kTile * sizes.output);
  }

  In* x;   // (rows, ldx()), for inputs that have to be copied together
  S* raw;  // (rows, ldr()): the MLP's output
  std::ptrdiff_t ldx() const { return sizes_.input; }
  std::ptrdiff_t ldr() const { return sizes_.output; }

  // in (rows, ld): the passive slots. hoisted[row]: the row's first-layer sums of bias and
  // condition; null: the condition comes before the passive slots.
  void run(const Coupling& c, const std::byte* packed, const In* in, std::ptrdiff_t ld, int rows,
           const S* const* hoisted) {
    packed_ = packed;
    coupling_ = &c;
    const int last = static_cast<int>(c.layers.size()) - 1;
    for (int l = 0; l + 1 < last; ++l) {
      const Layer& layer = c.layers[l];
      const Range mine =
          share_ ? shard_range(layer.blocks, share_->index, share_->size) : Range{0, layer.blocks};
      hidden_blocks(l, static_cast<int>(mine.begin), static_cast<int>(mine.end), in, ld, rows,
                    hoisted, inner_[l % 2] + mine.begin * layer.block, sizes_.inner);
      if (share_) share_->barrier->wait(share_->size);
      in = inner_[l % 2];
      ld = sizes_.inner;
    }
    if (last == 0) {
      for (int b = 0; b < c.layers[0].blocks; ++b)
        output_block(0, b, in, ld, rows, hoisted, raw + b * c.layers[0].block, ldr());
      return;
    }
    const Layer &before = c.layers[last - 1], &out = c.layers[last];
    const int step = out.chunk / before.block;  // blocks of `before` per chunk of `out`
    const int chunks = (before.blocks + step - 1) / step;
    for (int j = share_ ? share_->index : 0; j < chunks; j += share_ ? share_->size : 1) {
      const int first = j * step, end = std::min(first + step, before.blocks);
      hidden_blocks(last - 1, first, end, in, ld, rows, hoisted, chunk_, sizes_.chunk);
      S* sums = share_ ? partial(j, rows) : raw;
      if (share_ && j > 0) std::fill_n(sums, rows * ldr(), S(0));
      for (int b = 0; b < out.blocks; ++b) {
        Block<P> block = arguments(out, b, first * before.block, (end - first) * before.block);
        block.x = chunk_;
        block.ldx = sizes_.chunk;
        block.out = sums + b * out.block;
        block.ldo = ldr();
        if (first == 0) set_bias(block, out, b);
        block_rows<P, Store::sums>(block, out.vectors, rows);
      }
    }
    if (share_) add_partials(chunks, rows);
  }

  // The first layer's sums of bias and condition for a few images: units of one block.
  void hoist_block(const Coupling& c, const std::byte* packed, int block, int images, S* out,
                   std::ptrdiff_t ldo) {
    packed_ = packed;
    coupling_ = &c;
    const Layer& l = c.layers[0];
    sum_chunks(l, block, 0, c.cond_padded, x, ldx(), images, true, nullptr, out, ldo);
  }

 private:
  // Block b of a layer over stored inputs [k, k + inputs), the condition counted.
  Block<P> arguments(const Layer& l, int b, int k, int inputs) const {
    const std::int64_t stored =
        l.in_padded + (&l == coupling_->layers.data() ? coupling_->cond_padded : 0);
    Block<P> block{};
    block.w = reinterpret_cast<const In*>(packed_ + l.weight) + (b * stored + k) * l.block;
    block.inputs = inputs;
    return block;
  }

  // Where the team keeps the last layer's sums over chunk j.
  S* partial(int j, int rows) const {
    return reinterpret_cast<S*>(share_->partial[turn_]) + j * rows * ldr();
  }

  // raw = the team's partial sums, added in the order of the chunks.
  void add_partials(int chunks, int rows) {
    share_->barrier->wait(share_->size);
    for (std::ptrdiff_t i = 0; i < rows * ldr(); i += kLanes<S>) {
      Vec<S> sum = load<S>(partial(0, rows) + i);
      for (int j = 1; j < chunks; ++j) sum = sum + load<S>(partial(j, rows) + i);
      store<S>(raw + i, sum);
    }
    // The next coupling writes elsewhere: a slower thread may still be reading here.
    turn_ ^= 1;
  }

  void set_bias(Block<P>& block, const Layer& l, int b) {
    std::fill_n(init_, kTile, reinterpret_cast<const S*>(packed_ + l.bias));
    block.init = init_;
    block.column = static_cast<std::ptrdiff_t>(b) * l.block;
  }

  // out (+)= stored inputs [begin, end) of block b, chunk by chunk; starts from the bias or init.
  void sum_chunks(const Layer& l, int b, int begin, int end, const In* in, std::ptrdiff_t ld,
                  int rows, bool from_bias, const S* const* init, S* out, std::ptrdiff_t ldo) {
    for (int k = begin; k < end; k += l.chunk) {
      Block<P> block = arguments(l, b, k, std::min(l.chunk, end - k));
      block.x = in + (k - begin);
      block.ldx = ld;
      block.out = out;
      block.ldo = ldo;
      if (k == begin) {
        if (from_bias) {
          set_bias(block, l, b);
        } else if (init) {
          block.init = init;
          block.column = coupling_->hoisted + static_cast<std::ptrdiff_t>(b) * l.block;
        }
      }
      block_rows<P, Store::sums>(block, l.vectors, rows);
    }
  }

  // All inputs of block b of layer l, summed into out.
  void output_block(int index, int b, const In* in, std::ptrdiff_t ld, int rows,
                    const S* const* hoisted, S* out, std::ptrdiff_t ldo) {
    const Layer& l = coupling_->layers[index];
    const int cond = index == 0 ? coupling_->cond_padded : 0;
    if (cond > 0 && !hoisted) {
      sum_chunks(l, b, 0, cond, in, ld, rows, true, nullptr, out, ldo);
      sum_chunks(l, b, cond, cond + l.in_padded, in + cond, ld, rows, false, nullptr, out, ldo);
      return;
    }
    const bool from_hoisted = cond > 0;
    const S* const* init = from_hoisted ? hoisted : nullptr;
    if (l.in_padded ==
        0) {  // a first layer that reads nothing but the condition, or nothing at all
      for (int r = 0; r < rows; ++r) {
        const S* from = from_hoisted ? hoisted[r] + coupling_->hoisted
                                     : reinterpret_cast<const S*>(packed_ + l.bias);
        std::copy_n(from + b * l.block, l.block, out + r * ldo);
      }
      return;
    }
    sum_chunks(l, b, cond, cond + l.in_padded, in, ld, rows, !from_hoisted, init, out, ldo);
  }

  // Blocks [first, end) of hidden layer l, activated, to out (rows, (end - first) * block).
  void hidden_blocks(int index, int first, int end, const In* in, std::ptrdiff_t ld, int rows,
                     const S* const* hoisted, In* out, std::ptrdiff_t ldh) {
    const Layer& l = coupling_->layers[index];
    const int cond = index == 0 ? coupling_->cond_padded : 0;
    const bool relu = coupling_->activation == Activation::relu;
    for (int b = first; b < end; ++b) {
      In* hidden = out + (b - first) * l.block;
      // The usual first layer: hoisted condition, one chunk, ReLU: straight from the registers.
      if (relu && (cond == 0 || hoisted) && l.in_padded > 0 && l.in_padded <= l.chunk) {
        Block<P> block = arguments(l, b, cond, l.in_padded);
        block.x = in;
        block.ldx = ld;
        block.hidden = hidden;
        block.ldh = ldh;
        if (cond > 0) {
          block.init = hoisted;
          block.column = coupling_->hoisted + static_cast<std::ptrdiff_t>(b) * l.block;
        } else {
          set_bias(block, l, b);
        }
        block_rows<P, Store::hidden_relu>(block, l.vectors, rows);
        continue;
      }
      output_block(index, b, in, ld, rows, hoisted, partial_, sizes_.block);
      for (int r = 0; r < rows; ++r)
        for (int n = 0; n < l.block; n += P::kWidth)
          P::store_in(hidden + r * ldh + n,
                      activate<S>(load<S>(partial_ + r * sizes_.block + n), coupling_->activation,
                                  static_cast<S>(coupling_->negative_slope)));
    }
  }

  const Sizes& sizes_;
  const Share* share_;
  int turn_ = 0;
  In* inner_[2];
  In* chunk_;
  S* partial_;
  const S* init_[kTile];
  const std::byte* packed_ = nullptr;
  const Coupling* coupling_ = nullptr;
};

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
