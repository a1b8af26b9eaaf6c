// A step of a flow on tiles of rows: their memory, and the pass, which leaves its records there.
// For cpu_training.cpp alone, which is compiled once per SIMD level.
#pragma once

#include <algorithm>

#include "coupling/cpu_couple.h"
#include "coupling/cpu_net.h"
#include "coupling/training.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using coupling::Flow;
using coupling::LayerPlan;
using coupling::NetPlan;
using coupling::StepJob;
using coupling::StepPlan;

template <class S>
class StepRows {
 public:
  using P = Plain<S>;

  explicit StepRows(const StepJob& job)
      : job_(job), plan_(*job.plan), flow_(*job.flow), dim_(flow_.dim) {
    thread_local Scratch scratch;
    const auto ld = [](std::int64_t width) {
      return width > 0 ? padded_stride<S>(static_cast<std::ptrdiff_t>(width)) : 0;
    };
    const bool deep = [&] {
      for (const NetPlan& net : plan_.nets)
        if (net.layers.size() > 2) return true;
      return false;
    }();
    in_place_ = job.store && !job.order && plan_.coupling;
    ldr_ = in_place_ || plan_.wide ? 0 : ld(std::max(plan_.record, plan_.raw_width));
    ldw_ = plan_.wide ? 0 : ld(plan_.raw_width);
    ldi_ = deep && !plan_.wide ? ld(plan_.inner) : 0;
    ldk_ = ld(plan_.kept);
    ldx_ = ld(plan_.inputs);
    ldy_ = plan_.by_row ? ld(flow_.cond_dim + plan_.coupling->passive) : 0;
    ldp_ = ld(plan_.block);
    ldc_ = plan_.wide ? 0 : ld(kChunkUnits + plan_.block);
    ldg_ = job.cond_by_row ? ld(flow_.cond_dim + 64) : 0;
    ldt_ = job.cond_by_row ? ld(plan_.widest + 64) : 0;
    const std::ptrdiff_t widths[] = {ldr_, ldw_, ldi_, ldi_, ldk_, ldx_,
                                     ldy_, ldp_, ldc_, ldg_, ldt_};
    std::size_t bytes = Scratch::bytes<S>(dim_) + Scratch::bytes<const S*>(kTile);
    for (const std::ptrdiff_t w : widths) bytes += Scratch::bytes<S>(w * kTile + 64);
    scratch.reserve(bytes);
    const auto take = [&](std::ptrdiff_t w) { return scratch.template take<S>(w * kTile + 64); };
    record_ = take(ldr_);
    graw_ = take(ldw_);
    for (S*& g : inner_) g = take(ldi_);
    gkept_ = take(ldk_);
    gx_ = take(ldx_);
    inputs_ = take(ldy_);
    partial_ = take(ldp_);
    chunk_ = take(ldc_);
    gcond_ = take(ldg_);
    gates_ = take(ldt_);
    row_ = scratch.template take<S>(dim_);
    hoisted_ = scratch.template take<const S*>(kTile);
    // Vectors may reach behind the raw outputs: what they find there must be numbers.
    if (ldr_ > 0)
      for (int r = 0; r < kTile; ++r) std::fill_n(record_ + r * ldr_, plan_.raw_width, S(0));
    std::fill_n(graw_, ldw_ * kTile + 64, S(0));
    std::fill_n(inputs_, ldy_ * kTile + 64, S(0));
    if (in_place_)
      ldr_ = job.saved_width;
    else if (plan_.wide)
      ldr_ = job.record_ld;
    if (plan_.wide) ldw_ = job.grads_ld;
  }

  void forward(std::int64_t slab) {
    each_tile(slab, [&] {
      if (job_.move) reorder(state_);
      keep_state();
      if (plan_.coupling) {
        gather();
        for (const NetPlan& net : plan_.nets) run(net);
        const Coupling& c = *plan_.coupling;
        S* sums = static_cast<S*>(job_.log_det) + first_ * kSumLanes;
        for (int r = 0; r < rows_; ++r) {
          if (!in_place_) std::copy_n(record_ + r * ldr_, plan_.record, saved(r, plan_.record_at));
          const S* raw = record_ + r * ldr_;
          couple_row<S>(state_ + r * dim_ + c.active_at, raw, raw + c.shift_at, c, job_.inverse,
                        sums + r * kSumLanes);
        }
      } else {
        map(*plan_.linear, state_);
      }
    });
  }

 protected:
  static constexpr int kChunkUnits = 96;

  S* saved(int r, std::int64_t column) const {
    return static_cast<S*>(job_.saved) + caller_row(r) * job_.saved_width + column;
  }
  std::int64_t caller_row(int r) const { return job_.order ? job_.order[first_ + r] : first_ + r; }

  template <class F>
  void each_tile(std::int64_t slab, F&& f) {
    const std::int64_t begin = job_.first + slab * job_.slab_rows;
    const std::int64_t end = std::min(begin + job_.slab_rows, job_.first + job_.rows);
    for (first_ = begin; first_ < end; first_ += kTile) {
      rows_ = static_cast<int>(std::min<std::int64_t>(kTile, end - first_));
      state_ = static_cast<S*>(job_.state) + first_ * dim_;
      grad_ = static_cast<S*>(job_.grad) + first_ * dim_;
      if (plan_.hoisted_width > 0)
        for (int r = 0; r < rows_; ++r)
          hoisted_[r] = static_cast<const S*>(job_.hoisted) +
                        (job_.image_of[first_ + r] - job_.first_image) * plan_.hoisted_width;
      place();
      f();
    }
  }

  // Where the tile's records and gradients are, if not in this thread's own memory.
  void place() {
    const std::int64_t row = first_ - job_.batch_first;
    if (in_place_)
      record_ = saved(0, plan_.record_at);
    else if (plan_.wide)
      record_ = static_cast<S*>(job_.records) + row * ldr_;
    if (!plan_.wide) return;
    graw_ = static_cast<S*>(job_.grads) + row * ldw_;
    for (int r = 0; r < rows_; ++r) std::fill_n(graw_ + r * ldw_, plan_.raw_width, S(0));
  }

  void reorder(S* rows) {
    for (int r = 0; r < rows_; ++r, rows += dim_) {
      std::copy_n(rows, dim_, row_);
      for (int k = 0; k < dim_; ++k) rows[k] = row_[(*job_.move)[k]];
    }
  }

  void keep_state() {
    if (job_.state_at < 0) return;
    for (int r = 0; r < rows_; ++r) std::copy_n(state_ + r * dim_, dim_, saved(r, job_.state_at));
  }
  void recall_state() {
    if (job_.state_at < 0) return;
    for (int r = 0; r < rows_; ++r) std::copy_n(saved(r, job_.state_at), dim_, state_ + r * dim_);
  }

  // --- forward through a net, into the records ---

  const S* passive() const { return state_ + plan_.coupling->passive_at; }

  // The inputs of first layers by row: the condition, then the passive slots; neither is padded.
  void gather() {
    if (!plan_.by_row) return;
    for (int r = 0; r < rows_; ++r) {
      const S* cond = static_cast<const S*>(job_.cond) + caller_row(r) * flow_.cond_dim;
      std::copy_n(passive() + r * dim_, plan_.coupling->passive,
                  std::copy_n(cond, flow_.cond_dim, inputs_ + r * ldy_));
    }
  }
  Input<P> input(const Matrix& m) const {
    if (plan_.by_row && m.cond_padded > 0) return {inputs_, ldy_, rows_};
    return {passive(), dim_, rows_};
  }
  // Null: not hoisted.
  const S* const* hoisted() const { return plan_.by_row ? nullptr : hoisted_; }

  void run(const NetPlan& net) {
    const int last = static_cast<int>(net.layers.size()) - 1;
    Input<P> in = input(net.layers[0].dense.matrix);
    for (int l = 0; l < last - 1; ++l) {
      hidden(net, l, 0, net.layers[l].dense.matrix.blocks, in);
      in = {record_ + net.layers[l].out, ldr_, rows_};
    }
    S* raw = record_ + net.raw;
    const Matrix& m = net.layers[last].dense.matrix;
    if (last == 0) {
      const Product<P> product(m, job_.packed, in, hoisted());
      for (int b = 0; b < m.blocks; ++b) product.sums(b, raw + b * m.block, ldr_);
    } else {
      // The last layer sums each chunk of the one before as soon as it is there.
      const Matrix& before = net.layers[last - 1].dense.matrix;
      const int step = m.chunk / before.block;
      for (int first = 0; first < before.blocks; first += step) {
        const int end = std::min(first + step, before.blocks), k = first * before.block;
        hidden(net, last - 1, first, end, in);
        const Product<P> product(m, job_.packed,
                                 {record_ + net.layers[last - 1].out + k, ldr_, rows_});
        for (int b = 0; b < m.blocks; ++b)
          product.add_chunk(b, k, (end - first) * before.block, raw + b * m.block, ldr_);
      }
    }
    const LayerPlan& out = net.layers[last];
    if (!out.dense.plain() || out.dense.activate) finish(net, last, 0, m.out_padded(), raw, ldr_);
  }

  // Blocks [first, end) of layer l.
  void hidden(const NetPlan& net, int l, int first, int end, Input<P> in) {
    const LayerPlan& layer = net.layers[l];
    const Matrix& m = layer.dense.matrix;
    const Product<P> product(m, job_.packed, in, hoisted());
    const bool straight = layer.dense.plain() && layer.dense.activate &&
                          net.activation == Activation::relu && product.one_chunk();
    for (int b = first; b < end; ++b) {
      S* out = record_ + layer.out + b * m.block;
      if (straight) {
        product.relu(b, out, ldr_);
        continue;
      }
      product.sums(b, partial_, ldp_);
      finish(net, l, b * m.block, m.block, partial_, ldp_);
    }
  }

  // What the sums of some columns of layer l go through. gkept_ holds what layers keep: on the way
  // back, its gradient.
  void finish(const NetPlan& net, int l, int column, int columns, const S* sums,
              std::ptrdiff_t lds) {
    const LayerPlan& layer = net.layers[l];
    const Dense& dense = layer.dense;
    const auto slope = static_cast<S>(net.negative_slope);
    const S* scale = reinterpret_cast<const S*>(job_.packed + dense.norm) + column;
    const S* shift = scale + dense.matrix.out_padded();
    for (int r = 0; r < rows_; ++r, sums += lds) {
      S* record = record_ + r * ldr_ + column;
      const S* gate = dense.gate ? hoisted_[r] + dense.gate->hoisted + column : nullptr;
      S* kept = gkept_ + r * ldk_ + column;
      for (int n = 0; n < columns; n += kLanes<S>) {
        Vec<S> v = load<S>(sums + n);
        if (gate) {
          store<S>(record + layer.product + n, v);
          v = v * load<S>(gate + n);
        }
        if (dense.add) v = load<S>(kept + n) + v;
        if (dense.keep) store<S>(kept + n, v);
        if (dense.norm >= 0) {
          store<S>(record + layer.value + n, v);
          v = fma(v, load<S>(scale + n), load<S>(shift + n));
        }
        if (dense.activate) {
          if (layer.slope >= 0)
            store<S>(record + layer.slope + n, activation_slope<S>(v, net.activation, slope));
          v = activate<S>(v, net.activation, slope);
        }
        store<S>(record + layer.out + n, v);
      }
    }
  }

  // --- linear steps ---

  void map(const Matrix& m, S* rows) {
    if (plan_.diagonal) {
      const S *scale = reinterpret_cast<const S*>(job_.packed + m.weight),
              *shift = reinterpret_cast<const S*>(job_.packed + m.bias);
      for (int r = 0; r < rows_; ++r, rows += dim_)
        for (int k = 0; k < dim_; ++k) rows[k] = rows[k] * scale[k] + shift[k];
      return;
    }
    multiply(m, job_.packed, rows);
  }

  // rows (rows, D) <- m rows.
  void multiply(const Matrix& m, const std::byte* packed, S* state) {
    const Product<P> product(m, packed, {state, dim_, rows_});
    for (int b = 0; b < m.blocks; ++b) product.sums(b, record_ + b * m.block, ldr_);
    for (int r = 0; r < rows_; ++r) std::copy_n(record_ + r * ldr_, dim_, state + r * dim_);
  }

  const StepJob& job_;
  const StepPlan& plan_;
  const Flow& flow_;
  const int dim_;
  bool in_place_;  // whether records are worked on in `saved`
  std::ptrdiff_t ldr_, ldw_, ldi_, ldk_, ldx_, ldy_, ldp_, ldc_, ldg_, ldt_;
  S *record_, *graw_, *inner_[2], *gkept_, *gx_, *inputs_, *partial_, *chunk_, *gcond_, *gates_,
      *row_;
  const S** hoisted_;
  std::int64_t first_ = 0;  // of the tile
  int rows_ = 0;
  S *state_ = nullptr, *grad_ = nullptr;
};

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
