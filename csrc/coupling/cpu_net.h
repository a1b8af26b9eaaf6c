// The subnets of the fused flow, one tile of rows at a time. For cpu_kernels.cpp alone, which is
// compiled once per SIMD level.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>

#include "coupling/coupling.h"
#include "coupling/cpu_matrix.h"
#include "coupling/math.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using coupling::Dense;
using coupling::Net;
using coupling::Share;

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

// Runs nets, whose hidden activations stay in its buffers.
template <class P>
class NetRunner {
 public:
  using S = typename P::State;
  using In = typename P::In;

  // Row strides of the buffers, 0 where a flow needs none.
  struct Strides {
    std::ptrdiff_t input, inner, kept, chunk, block, output;
    explicit Strides(const coupling::Widths& w)
        : input(padded_stride<In>(w.input)),
          inner(w.inner ? padded_stride<In>(w.inner) : 0),
          kept(w.kept ? padded_stride<S>(w.kept) : 0),
          chunk(padded_stride<In>(w.chunk)),
          block(padded_stride<S>(w.block)),
          output(padded_stride<S>(w.output)) {}
    std::size_t bytes() const {
      return Scratch::bytes<In>(kTile * input) + 2 * Scratch::bytes<In>(kTile * inner) +
             Scratch::bytes<In>(kTile * chunk) + Scratch::bytes<S>(kTile * kept) +
             Scratch::bytes<S>(kTile * block) + Scratch::bytes<S>(kTile * output);
    }
  };

  NetRunner(const Strides& strides, const std::byte* packed, Scratch& scratch,
            const Share* share = nullptr)
      : strides_(strides), packed_(packed), share_(share) {
    x = scratch.take<In>(kTile * strides.input);
    for (int i = 0; i < 2; ++i) {
      inner_[i] = scratch.take<In>(kTile * strides.inner);
      if (share) inner_[i] = reinterpret_cast<In*>(share->inner[i]);
    }
    kept_ = scratch.take<S>(kTile * strides.kept);
    if (share) kept_ = reinterpret_cast<S*>(share->kept);
    chunk_ = scratch.take<In>(kTile * strides.chunk);
    partial_ = scratch.take<S>(kTile * strides.block);
    raw = scratch.take<S>(kTile * strides.output);
  }

  In* x;   // (rows, ldx()), for inputs that have to be copied together
  S* raw;  // (rows, ldr()): what the nets of a coupling say
  std::ptrdiff_t ldx() const { return strides_.input; }
  std::ptrdiff_t ldr() const { return strides_.output; }

  // in: the passive slots, after the condition where hoisted is null; hoisted[row]: see Product.
  void run(const Net& net, Input<P> in, const S* const* hoisted) {
    const int last = static_cast<int>(net.layers.size()) - 1;
    for (int l = 0; l + 1 < last; ++l) {
      const Matrix& m = net.layers[l].matrix;
      const Range mine =
          share_ ? shard_range(m.blocks, share_->index, share_->size) : Range{0, m.blocks};
      hidden_blocks(net, l, static_cast<int>(mine.begin), static_cast<int>(mine.end), in, hoisted,
                    inner_[l % 2] + mine.begin * m.block, strides_.inner);
      if (share_) share_->barrier->wait(share_->size);
      in = {inner_[l % 2], strides_.inner, in.rows};
    }
    if (last == 0) {
      const Matrix& m = net.layers[0].matrix;
      const Product<P> product(m, packed_, in, hoisted);
      for (int b = 0; b < m.blocks; ++b) product.sums(b, raw + net.raw_at + b * m.block, ldr());
    } else {
      last_two(net, in, hoisted);
    }
    const Dense& out = net.layers[last];
    if (out.plain() && !out.activate) return;
    finish(net, out, 0, out.matrix.out_padded(), in.rows, hoisted, raw + net.raw_at, ldr(),
           raw + net.raw_at, ldr(), [](S* to, Vec<S> v) { store<S>(to, v); });
    // A faster thread must not keep anything new yet.
    if (share_ && out.add) share_->barrier->wait(share_->size);
  }

  // The condition's part of a matrix for a few images in x: block b.
  void hoist_block(const Matrix& m, bool gate, int b, int images, S* out, std::ptrdiff_t ldo) {
    Product<P>(m, packed_, {x, ldx(), images}).condition_sums(b, out, ldo);
    if (!gate) return;
    for (int r = 0; r < images; ++r)
      for (int n = 0; n < m.block; n += kLanes<S>)
        store<S>(out + r * ldo + n, sigmoid<S>(load<S>(out + r * ldo + n)));
  }

 private:
  // The last layer sums each chunk of the one before as soon as it is there.
  void last_two(const Net& net, Input<P> in, const S* const* hoisted) {
    const int last = static_cast<int>(net.layers.size()) - 1, rows = in.rows;
    const Matrix &before = net.layers[last - 1].matrix, &out = net.layers[last].matrix;
    const Product<P> product(out, packed_, {chunk_, strides_.chunk, rows});
    const int step = out.chunk / before.block;  // blocks of `before` per chunk of `out`
    const int chunks = (before.blocks + step - 1) / step;
    for (int j = share_ ? share_->index : 0; j < chunks; j += share_ ? share_->size : 1) {
      const int first = j * step, end = std::min(first + step, before.blocks);
      hidden_blocks(net, last - 1, first, end, in, hoisted, chunk_, strides_.chunk);
      S* sums = share_ ? partial(j, rows) : raw + net.raw_at;
      if (share_ && j > 0) std::fill_n(sums, rows * ldr(), S(0));
      for (int b = 0; b < out.blocks; ++b)
        product.add_chunk(b, first * before.block, (end - first) * before.block,
                          sums + b * out.block, ldr());
    }
    if (share_) add_partials(chunks, rows, raw + net.raw_at, out.out_padded());
  }

  // Where the team keeps the last layer's sums over chunk j.
  S* partial(int j, int rows) const {
    return reinterpret_cast<S*>(share_->partial[turn_]) + j * rows * ldr();
  }

  // to = the team's partial sums, added in the order of the chunks.
  void add_partials(int chunks, int rows, S* to, int width) {
    share_->barrier->wait(share_->size);
    for (int r = 0; r < rows; ++r)
      for (int n = 0; n < width; n += kLanes<S>) {
        Vec<S> sum = load<S>(partial(0, rows) + r * ldr() + n);
        for (int j = 1; j < chunks; ++j) sum = sum + load<S>(partial(j, rows) + r * ldr() + n);
        store<S>(to + r * ldr() + n, sum);
      }
    // The next net writes elsewhere: a slower thread may still be reading here.
    turn_ ^= 1;
  }

  // Blocks [first, end) of hidden layer l, finished, to out (rows, (end - first) * block).
  void hidden_blocks(const Net& net, int l, int first, int end, Input<P> in,
                     const S* const* hoisted, In* out, std::ptrdiff_t ldh) {
    const Dense& dense = net.layers[l];
    const Matrix& m = dense.matrix;
    const Product<P> product(m, packed_, in, hoisted);
    const bool straight = dense.plain() && dense.activate && net.activation == Activation::relu &&
                          product.one_chunk();
    for (int b = first; b < end; ++b) {
      In* hidden = out + (b - first) * m.block;
      if (straight) {
        product.relu(b, hidden, ldh);
        continue;
      }
      product.sums(b, partial_, strides_.block);
      finish(net, dense, b * m.block, m.block, in.rows, hoisted, partial_, strides_.block, hidden,
             ldh, [](In* to, Vec<S> v) { P::store_in(to, v); });
    }
  }

  // What the sums of some columns of a layer go through on their way to the next one.
  template <class Out, class Put>
  void finish(const Net& net, const Dense& dense, int column, int columns, int rows,
              const S* const* hoisted, const S* sums, std::ptrdiff_t lds, Out* out,
              std::ptrdiff_t ldo, Put put) {
    const auto slope = static_cast<S>(net.negative_slope);
    const S* scale = reinterpret_cast<const S*>(packed_ + dense.norm) + column;
    const S* shift = scale + dense.matrix.out_padded();
    for (int r = 0; r < rows; ++r) {
      const S* gate = dense.gate ? hoisted[r] + dense.gate->hoisted + column : nullptr;
      S* kept = kept_ + r * strides_.kept + column;
      for (int n = 0; n < columns; n += kLanes<S>) {
        Vec<S> v = load<S>(sums + r * lds + n);
        if (gate) v = v * load<S>(gate + n);
        if (dense.add) v = load<S>(kept + n) + v;
        if (dense.keep) store<S>(kept + n, v);
        if (dense.norm >= 0) v = fma(v, load<S>(scale + n), load<S>(shift + n));
        if (dense.activate) v = activate<S>(v, net.activation, slope);
        put(out + r * ldo + n, v);
      }
    }
  }

  const Strides& strides_;
  const std::byte* packed_;
  const Share* share_;
  int turn_ = 0;
  In* inner_[2];
  S* kept_;
  In* chunk_;
  S* partial_;
};

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
