// Back through a step, whose records are recalled or made again. For cpu_training.cpp alone, which
// is compiled once per SIMD level.
#pragma once

#include <algorithm>

#include "coupling/cpu_outer.h"
#include "coupling/cpu_step.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using coupling::Sums;

template <class S>
class StepGradient : StepRows<S> {
 public:
  using StepRows<S>::StepRows;

  void backward(std::int64_t slab) {
    sums_ = static_cast<S*>(job_.slabs) + slab * plan_.slab_numbers;
    add_ = slab < job_.started;
    clear_segments(slab);
    each_tile(slab, [&] {
      if (job_.move) {
        reorder(state_);
        reorder(grad_);
      }
      if (plan_.coupling)
        couple_back();
      else
        map_back();
      add_ = true;
    });
  }

 private:
  using Base = StepRows<S>;
  using Base::kChunkUnits, Base::each_tile, Base::caller_row, Base::saved, Base::reorder,
      Base::recall_state, Base::passive, Base::gather, Base::run, Base::map, Base::multiply,
      Base::job_, Base::plan_, Base::flow_, Base::dim_, Base::first_, Base::rows_, Base::state_,
      Base::grad_, Base::in_place_, Base::record_, Base::ldr_, Base::graw_, Base::ldw_,
      Base::inner_, Base::ldi_, Base::gkept_, Base::ldk_, Base::gx_, Base::ldx_, Base::inputs_,
      Base::ldy_, Base::partial_, Base::ldp_, Base::chunk_, Base::ldc_, Base::gcond_, Base::ldg_,
      Base::gates_, Base::ldt_, Base::hoisted_;
  using typename Base::P;

  // --- back through a coupling ---

  void couple_back() {
    const Coupling& c = *plan_.coupling;
    gather();
    if (job_.store)
      recall_records();
    else
      for (const NetPlan& net : plan_.nets) run(net);
    for (int r = 0; r < rows_; ++r) {
      const S* raw = record_ + r * ldr_;
      S *state = state_ + r * dim_ + c.active_at, *grad = grad_ + r * dim_ + c.active_at;
      S* graw = graw_ + r * ldw_;
      const Row<S> row{state,
                       grad,
                       raw,
                       raw + c.shift_at,
                       graw,
                       graw + c.shift_at,
                       c.active,
                       static_cast<S>(c.clamp),
                       c.clamp_activation,
                       job_.inverse,
                       job_.log_det ? static_cast<const S*>(job_.log_det)[first_ + r] : S(0)};
      switch (c.kind) {
        case Kind::affine:
          affine_back<S>(row);
          break;
        case Kind::additive:
          additive_back<S>(row);
          break;
        case Kind::gin:
          gin_back<S>(row);
          break;
      }
    }
    recall_state();
    if (job_.cond_by_row) std::fill_n(gcond_, rows_ * ldg_, S(0));
    for (const NetPlan& net : plan_.nets) net_back(net);
    if (job_.cond_by_row)
      for (int r = 0; r < rows_; ++r) {
        S* to = static_cast<S*>(job_.grad_cond) + caller_row(r) * flow_.cond_dim;
        for (int k = 0; k < flow_.cond_dim; ++k) to[k] += gcond_[r * ldg_ + k];
      }
  }

  void recall_records() {
    if (in_place_) return;
    for (int r = 0; r < rows_; ++r)
      std::copy_n(saved(r, plan_.record_at), plan_.record, record_ + r * ldr_);
  }

  void net_back(const NetPlan& net) {
    const int last = static_cast<int>(net.layers.size()) - 1;
    if (plan_.kept > 0) std::fill_n(gkept_, rows_ * ldk_, S(0));
    const S* g = graw_ + net.raw;
    std::ptrdiff_t ldg = ldw_;
    through(net, last, 0, net.layers[last].dense.matrix.out_padded(), graw_ + net.raw, ldw_);
    for (int l = last; l > 0; --l) {
      const LayerPlan &layer = net.layers[l], &lower = net.layers[l - 1];
      const Matrix& back = layer.back;
      const int step = std::max(kChunkUnits / back.block, 1);
      S* to = plan_.wide ? graw_ + lower.grad : l > 1 ? inner_[l % 2] : chunk_;
      const std::ptrdiff_t ldt = plan_.wide ? ldw_ : l > 1 ? ldi_ : ldc_;
      const bool all = plan_.wide || l > 1;  // whether `to` has room for all units
      for (int b = 0; b < back.blocks; b += step) {
        const int end = std::min(b + step, back.blocks), k = b * back.block;
        const int units = std::min(end * back.block, back.out) - k;
        S* part = all ? to + k : to;
        const Product<P> product(back, job_.back, {g, ldg, rows_});
        for (int i = b; i < end; ++i) product.sums(i, part + (i - b) * back.block, ldt);
        through(net, l - 1, k, (end - b) * back.block, part, ldt);
        if (layer.weight.at >= 0) {
          const Sums& w = layer.weight;
          const S* u = record_ + lower.out + k;
          if (w.transposed)
            outer<S>(u, ldr_, units, g, ldg, w.n, rows_, sums_ + w.at + k * w.ld, w.ld, add_);
          else
            outer<S>(g, ldg, w.m, u, ldr_, units, rows_, sums_ + w.at + k, w.ld, add_);
        }
        if (l == 1) first_layer(lower, k, units, part, ldt);
      }
      g = to;
      ldg = ldt;
    }
    if (last == 0)
      first_layer(net.layers[0], 0, net.layers[0].dense.matrix.out, graw_ + net.raw, ldw_);
    if (net.layers[0].dense.matrix.in > 0) {
      const Coupling& c = *plan_.coupling;
      for (int r = 0; r < rows_; ++r) {
        S* grad = grad_ + r * dim_ + c.passive_at;
        for (int k = 0; k < c.passive; ++k) grad[k] += gx_[r * ldx_ + k];
      }
    }
  }

  // Units [k, k + units) of a net's first layer, whose gradients are g.
  void first_layer(const LayerPlan& layer, int k, int units, const S* g, std::ptrdiff_t ldg) {
    const auto add_weight = [&](const Sums& w, const S* x, std::ptrdiff_t ldx) {
      if (w.at < 0) return;
      if (w.transposed)
        outer<S>(x, ldx, w.m, g, ldg, units, rows_, sums_ + w.at + k, w.ld, add_);
      else
        outer<S>(g, ldg, units, x, ldx, w.n, rows_, sums_ + w.at + k * w.ld, w.ld, add_);
    };
    add_weight(layer.weight, passive(), dim_);
    add_weight(layer.cond_weight, inputs_, ldy_);
    if (layer.dense.matrix.in > 0) multiply_chunk(layer.back, k, units, g, ldg, gx_, ldx_);
    if (job_.cond_by_row && layer.cond_back) add_cond(*layer.cond_back, k, units, g, ldg);
  }

  // to (rows, ld) = or += g, which are inputs [k, k + units) of the matrix, times them.
  void multiply_chunk(const Matrix& m, int k, int units, const S* g, std::ptrdiff_t ldg, S* to,
                      std::ptrdiff_t ld) {
    const Product<P> product(m, job_.back, {g, ldg, rows_});
    for (int b = 0; b < m.blocks; ++b) product.add_chunk(b, k, units, to + b * m.block, ld);
  }

  // The same, added to the rows' own gradients of the condition.
  void add_cond(const Matrix& m, int k, int units, const S* g, std::ptrdiff_t ldg) {
    const Product<P> product(m, job_.back, {g, ldg, rows_});
    for (int b = 0; b < m.blocks; ++b) {
      if (k > 0) {  // a product's first chunk replaces what is there
        product.add_chunk(b, k, units, gcond_ + b * m.block, ldg_);
        continue;
      }
      product.add_chunk(b, k, units, partial_, ldp_);
      for (int r = 0; r < rows_; ++r) {
        S* to = gcond_ + r * ldg_ + b * m.block;
        for (int n = 0; n < m.block; n += kLanes<S>)
          store<S>(to + n, load<S>(to + n) + load<S>(partial_ + r * ldp_ + n));
      }
    }
  }

  // g: gradients of what comes out of columns [k, k + columns) of layer l; then of its sums.
  void through(const NetPlan& net, int l, int k, int columns, S* g, std::ptrdiff_t ldg) {
    const LayerPlan& layer = net.layers[l];
    const Dense& dense = layer.dense;
    if (dense.plain()) {
      if (dense.activate) {
        const bool relu = layer.slope < 0;
        const S* with = record_ + k + (relu ? layer.out : layer.slope);
        for (int r = 0; r < rows_; ++r) {
          S* v = g + r * ldg;
          const S* w = with + r * ldr_;
          if (relu)
            for (int n = 0; n < columns; n += kLanes<S>)
              store<S>(v + n,
                       select<S>(load<S>(w + n) <= splat<S>(0), splat<S>(0), load<S>(v + n)));
          else
            for (int n = 0; n < columns; n += kLanes<S>)
              store<S>(v + n, load<S>(v + n) * load<S>(w + n));
        }
      }
    } else {
      unfold(layer, k, columns, g, ldg);
    }
    if (layer.hoisted)
      add_segments(dense.matrix.hoisted + k, columns, g, ldg);
    else if (layer.bias >= 0)
      add_columns(layer.bias + k, columns, [&](int r, int n) { return load<S>(g + r * ldg + n); });
  }

  void unfold(const LayerPlan& layer, int k, int columns, S* g, std::ptrdiff_t ldg) {
    const Dense& dense = layer.dense;
    const S* record = record_ + k;
    if (dense.activate)
      for (int r = 0; r < rows_; ++r)
        for (int n = 0; n < columns; n += kLanes<S>) {
          const Vec<S> v = load<S>(g + r * ldg + n);
          const S* at = record + r * ldr_ + n;
          store<S>(g + r * ldg + n,
                   layer.slope >= 0
                       ? v * load<S>(at + layer.slope)
                       : select<S>(load<S>(at + layer.out) <= splat<S>(0), splat<S>(0), v));
        }
    if (dense.norm >= 0) {
      if (layer.norm >= 0) {
        add_columns(layer.norm + k, columns, [&](int r, int n) {
          return load<S>(g + r * ldg + n) * load<S>(record + r * ldr_ + layer.value + n);
        });
        add_columns(layer.norm + dense.matrix.out_padded() + k, columns,
                    [&](int r, int n) { return load<S>(g + r * ldg + n); });
      }
      const S* scale = reinterpret_cast<const S*>(job_.packed + dense.norm) + k;
      for (int r = 0; r < rows_; ++r)
        for (int n = 0; n < columns; n += kLanes<S>)
          store<S>(g + r * ldg + n, load<S>(g + r * ldg + n) * load<S>(scale + n));
    }
    if (dense.keep || dense.add)
      for (int r = 0; r < rows_; ++r) {
        S *kept = gkept_ + r * ldk_ + k, *v = g + r * ldg;
        for (int n = 0; n < columns; n += kLanes<S>) {
          if (dense.keep) {
            store<S>(v + n, load<S>(v + n) + load<S>(kept + n));
            store<S>(kept + n, splat<S>(0));
          }
          if (dense.add) store<S>(kept + n, load<S>(kept + n) + load<S>(v + n));
        }
      }
    if (dense.gate) {
      const std::int64_t at = dense.gate->hoisted + k;
      if (layer.gate)
        each_run([&](int first, int end, S* segment) {
          for (int n = 0; n < columns; n += kLanes<S>) {
            Vec<S> sum = splat<S>(0);
            for (int r = first; r < end; ++r)
              sum = fma(load<S>(g + r * ldg + n), load<S>(record + r * ldr_ + layer.product + n),
                        sum);
            store<S>(segment + at + n, load<S>(segment + at + n) + sum);
          }
        });
      if (job_.cond_by_row && layer.gate_back) {
        for (int r = 0; r < rows_; ++r)
          for (int n = 0; n < columns; n += kLanes<S>) {
            const Vec<S> s = load<S>(hoisted_[r] + at + n);
            store<S>(gates_ + r * ldt_ + n, load<S>(g + r * ldg + n) *
                                                load<S>(record + r * ldr_ + layer.product + n) *
                                                (splat<S>(1) - s) * s);
          }
        add_cond(*layer.gate_back, k, std::min(columns, dense.matrix.out - k), gates_, ldt_);
      }
      for (int r = 0; r < rows_; ++r)
        for (int n = 0; n < columns; n += kLanes<S>)
          store<S>(g + r * ldg + n, load<S>(g + r * ldg + n) * load<S>(hoisted_[r] + at + n));
    }
  }

  // --- sums over rows ---

  // Slab numbers [at, at + columns) += the sums of value(row, column).
  template <class F>
  void add_columns(std::int64_t at, int columns, F&& value) {
    for (int n = 0; n < columns; n += kLanes<S>) {
      Vec<S> sum = splat<S>(0);
      for (int r = 0; r < rows_; ++r) sum = sum + value(r, n);
      S* to = sums_ + at + n;
      store<S>(to, add_ ? load<S>(to) + sum : sum);
    }
  }

  // Calls f(first, end, sums of their segment) for every run of rows of one segment.
  template <class F>
  void each_run(F&& f) {
    const std::int64_t* segment = job_.segment_of + first_;
    for (int first = 0, end; first < rows_; first = end) {
      for (end = first + 1; end < rows_ && segment[end] == segment[first];) ++end;
      f(first, end,
        static_cast<S*>(job_.segments) +
            (segment[first] - job_.first_segment) * plan_.hoisted_width);
    }
  }

  void add_segments(std::int64_t at, int columns, const S* g, std::ptrdiff_t ldg) {
    each_run([&](int first, int end, S* segment) {
      int n = 0;
      for (; n + 4 * kLanes<S> <= columns; n += 4 * kLanes<S>)
        add_run<4>(g + n, ldg, first, end, segment + at + n);
      for (; n < columns; n += kLanes<S>) add_run<1>(g + n, ldg, first, end, segment + at + n);
    });
  }
  // Several sums at a time do not wait for each other's additions.
  template <int N>
  static FASTHYP_INLINE void add_run(const S* g, std::ptrdiff_t ldg, int first, int end, S* to) {
    Vec<S> sum[N] = {};
    for (int r = first; r < end; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) sum[i] = sum[i] + load<S>(g + r * ldg + i * kLanes<S>);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) store<S>(to + i * kLanes<S>, load<S>(to + i * kLanes<S>) + sum[i]);
  }

  void clear_segments(std::int64_t slab) {
    if (plan_.hoisted_width == 0) return;
    const std::int64_t begin = job_.first + slab * job_.slab_rows;
    const std::int64_t end = std::min(begin + job_.slab_rows, job_.first + job_.rows);
    const std::int64_t first = job_.segment_of[begin], last = job_.segment_of[end - 1];
    std::fill_n(static_cast<S*>(job_.segments) + (first - job_.first_segment) * plan_.hoisted_width,
                (last + 1 - first) * plan_.hoisted_width, S(0));
  }

  // --- back through a linear step ---

  void map_back() {
    map(*plan_.linear_undo, state_);
    recall_state();
    if (plan_.linear_shift >= 0)
      for (int k = 0; k < dim_; ++k) {
        S sum = 0;
        for (int r = 0; r < rows_; ++r) sum += grad_[r * dim_ + k];
        S& to = sums_[plan_.linear_shift + k];
        to = add_ ? to + sum : sum;
      }
    const Sums& w = plan_.linear_weight;
    if (plan_.diagonal) {
      if (w.at >= 0)
        for (int k = 0; k < dim_; ++k) {
          S sum = 0;
          for (int r = 0; r < rows_; ++r) sum += grad_[r * dim_ + k] * state_[r * dim_ + k];
          S& to = sums_[w.at + k];
          to = add_ ? to + sum : sum;
        }
      const S* scale = reinterpret_cast<const S*>(job_.packed + plan_.linear->weight);
      for (int r = 0; r < rows_; ++r)
        for (int k = 0; k < dim_; ++k) grad_[r * dim_ + k] *= scale[k];
      return;
    }
    if (w.at >= 0) {
      const S *a = w.transposed ? state_ : grad_, *b = w.transposed ? grad_ : state_;
      outer<S>(a, dim_, w.m, b, dim_, w.n, rows_, sums_ + w.at, w.ld, add_);
    }
    multiply(plan_.linear_back, job_.back, grad_);
  }

  S* sums_ = nullptr;  // of the slab
  bool add_ = false;   // to what is there
};

}  // namespace
}  // namespace fasthyp::FASTHYP_SIMD
