// One step of a flow in training: compiled once per SIMD level.
//
// A thread owns a slab of rows and takes them through the step a tile at a time. All layers of the
// tile's subnets are kept (its records); then gradients go back through them, a chunk of a layer's
// units at a time, which meet everything that needs them while they are in the cache: the layer's
// own weight gradient, that of the layer before, the sums per image. Where weights are too many for
// that (wide steps), records and gradients of many rows are kept, and the threads then sum up parts
// of the weight gradients over all of these rows. Every sum is made in an order that depends on
// shapes alone.
#include <algorithm>
#include <cmath>

#include "coupling/cpu_net.h"
#include "coupling/cpu_outer.h"
#include "coupling/math.h"
#include "coupling/training.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using coupling::Activation;
using coupling::Clamp;
using coupling::Coupling;
using coupling::Flow;
using coupling::Kind;
using coupling::LayerPlan;
using coupling::NetPlan;
using coupling::StepJob;
using coupling::StepPlan;
using coupling::Sums;
using coupling::Target;

template <class T>
FASTHYP_INLINE IntVec<T> valid_lanes(int left) {
  return lane_index<T>() < static_cast<typename detail::IntOf<T>::type>(left) + IntVec<T>{};
}
template <class T>
FASTHYP_INLINE void store_some(T* to, Vec<T> v, int left) {
  if (left >= kLanes<T>)
    store<T>(to, v);
  else
    std::memcpy(to, &v, left * sizeof(T));
}

constexpr int kSumLanes = 16;
template <class T>
T sum_lanes(const T* lanes) {
  T v[kSumLanes];
  std::copy_n(lanes, kSumLanes, v);
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// --- a row of a coupling ---

template <class T>
struct Row {
  T* x;            // the values after the pass's step, then those before it
  T* g;            // their gradients, likewise
  const T *s, *t;  // raw
  T *gs, *gt;      // gradients of raw
  int count;
  T clamp;
  Clamp kind;
  bool inverse;  // of the pass
  T log_det;     // its gradient
};

// From gradients of the values after to those before and those of scale and shift. The pass gave
// x exp(scale) + shift, or (x - shift) exp(-scale).
template <class T>
FASTHYP_INLINE void affine_lanes(const Row<T>& r, int i, Vec<T> scale, Vec<T>& gscale) {
  const Vec<T> x = load<T>(r.x + i), g = load<T>(r.g + i), shift = load<T>(r.t + i);
  Vec<T> before, gbefore, gshift;
  if (r.inverse) {
    before = fma(x, exp<T>(scale), shift);
    gbefore = g * exp<T>(-scale);
    gshift = -gbefore;
    gscale = -(g * x);
  } else {
    before = (x - shift) * exp<T>(-scale);
    gbefore = g * exp<T>(scale);
    gshift = g;
    gscale = gbefore * before;
  }
  store_some<T>(r.x + i, before, r.count - i);
  store_some<T>(r.g + i, gbefore, r.count - i);
  store_some<T>(r.gt + i, gshift, r.count - i);
}

template <class T>
void affine_back(const Row<T>& r) {
  const Vec<T> log_det = splat<T>(r.inverse ? -r.log_det : r.log_det);
  for (int i = 0; i < r.count; i += kLanes<T>) {
    const Vec<T> raw = load<T>(r.s + i);
    Vec<T> gscale;
    affine_lanes<T>(r, i, soft_clamp<T>(raw, r.clamp, r.kind), gscale);
    store_some<T>(r.gs + i, (gscale + log_det) * soft_clamp_slope<T>(raw, r.clamp, r.kind),
                  r.count - i);
  }
}

template <class T>
void gin_back(const Row<T>& r) {
  constexpr int W = kLanes<T>;
  const auto number = static_cast<T>(r.count);
  T sums[kSumLanes] = {}, gsums[kSumLanes] = {};
  for (int i = 0; i < r.count; i += W) {
    const Vec<T> scale = soft_clamp<T>(load<T>(r.s + i), r.clamp, r.kind);
    T* lane = sums + i % kSumLanes;
    store<T>(lane, load<T>(lane) + select<T>(valid_lanes<T>(r.count - i), scale, splat<T>(0)));
  }
  const Vec<T> mean = splat<T>(sum_lanes(sums) / number);
  for (int i = 0; i < r.count; i += W) {
    Vec<T> gscale;
    affine_lanes<T>(r, i, soft_clamp<T>(load<T>(r.s + i), r.clamp, r.kind) - mean, gscale);
    store_some<T>(r.gs + i, gscale, r.count - i);
    T* lane = gsums + i % kSumLanes;
    store<T>(lane, load<T>(lane) + select<T>(valid_lanes<T>(r.count - i), gscale, splat<T>(0)));
  }
  const Vec<T> gmean = splat<T>(sum_lanes(gsums) / number);
  for (int i = 0; i < r.count; i += W)
    store_some<T>(
        r.gs + i,
        (load<T>(r.gs + i) - gmean) * soft_clamp_slope<T>(load<T>(r.s + i), r.clamp, r.kind),
        r.count - i);
}

template <class T>
void additive_back(const Row<T>& r) {
  for (int i = 0; i < r.count; ++i) {
    r.x[i] = r.inverse ? r.x[i] + r.t[i] : r.x[i] - r.t[i];
    r.gt[i] = r.inverse ? -r.g[i] : r.g[i];
  }
}

// The pass itself, as in cpu_kernels.cpp; sums gets the log-scales.
template <class T>
void couple_row(T* x, const T* s, const T* t, const Coupling& c, bool inverse, T* sums) {
  constexpr int W = kLanes<T>;
  const auto clamp = static_cast<T>(c.clamp);
  if (c.kind == Kind::additive) {
    for (int i = 0; i < c.active; ++i) x[i] = inverse ? x[i] - t[i] : x[i] + t[i];
    return;
  }
  Vec<T> mean = splat<T>(0);
  if (c.kind == Kind::gin) {
    T scales[kSumLanes] = {};
    for (int i = 0; i < c.active; i += W) {
      const Vec<T> scale = soft_clamp<T>(load<T>(s + i), clamp, c.clamp_activation);
      T* lane = scales + i % kSumLanes;
      store<T>(lane, load<T>(lane) + select<T>(valid_lanes<T>(c.active - i), scale, splat<T>(0)));
    }
    mean = splat<T>(sum_lanes(scales) / static_cast<T>(c.active));
  }
  for (int i = 0; i < c.active; i += W) {
    const auto valid = valid_lanes<T>(c.active - i);
    Vec<T> scale =
        select<T>(valid, soft_clamp<T>(load<T>(s + i), clamp, c.clamp_activation), splat<T>(0));
    if (c.kind == Kind::gin) scale = scale - mean;
    const Vec<T> shift = load<T>(t + i), v = load<T>(x + i);
    store_some<T>(x + i, inverse ? (v - shift) * exp<T>(-scale) : fma(v, exp<T>(scale), shift),
                  c.active - i);
    if (c.kind == Kind::gin) continue;
    T* lane = sums + i % kSumLanes;
    store<T>(lane, load<T>(lane) + scale);
  }
}

// --- a step ---

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
  S* sums_ = nullptr;  // of the slab
  bool add_ = false;   // to what is there
};

template <class S>
void forward(const StepJob& job, std::int64_t slab) {
  StepRows<S>(job).forward(slab);
}
template <class S>
void backward(const StepJob& job, std::int64_t slab) {
  StepRows<S>(job).backward(slab);
}

// --- around the rows ---

// One block of a transposed matrix, and its bias of zeros.
template <class S>
void transpose(const coupling::Transpose& t, const std::byte* packed, std::byte* to, int block) {
  const Matrix &m = *t.matrix, &back = *t.back;
  const S* from = reinterpret_cast<const S*>(packed + m.weight);
  const std::int64_t stored = m.cond_padded + m.in_padded;
  S* out = reinterpret_cast<S*>(to + back.weight) + std::int64_t(block) * back.in * back.block;
  const int first = block * back.block, count = std::min(back.block, back.out - first);
  for (int b = 0; b < m.blocks; ++b) {
    const int outputs = std::min(m.block, m.out - b * m.block);
    const S* w = from + (b * stored + t.first + first) * m.block;
    S* column = out + std::int64_t(b) * m.block * back.block;
    for (int o = 0; o < outputs; ++o, column += back.block) {
      for (int i = 0; i < count; ++i) column[i] = w[i * m.block + o];
      std::fill(column + count, column + back.block, S(0));
    }
  }
  std::fill_n(reinterpret_cast<S*>(to + back.bias) + first, back.block, S(0));
}

template <class S>
void hoist(const StepJob& job, const Matrix& m, bool gate, int block) {
  const std::int64_t width = job.plan->hoisted_width;
  for (std::int64_t image = 0; image < job.images; image += kTile) {
    const int count = static_cast<int>(std::min<std::int64_t>(kTile, job.images - image));
    S* out = static_cast<S*>(job.hoisted) + image * width + m.hoisted + block * m.block;
    Product<Plain<S>>(m, job.packed,
                      {static_cast<const S*>(job.cond) + image * job.cond_ld, job.cond_ld, count})
        .condition_sums(block, out, width);
    if (!gate) continue;
    for (int r = 0; r < count; ++r)
      for (int n = 0; n < m.block; n += kLanes<S>)
        store<S>(out + r * width + n, sigmoid<S>(load<S>(out + r * width + n)));
  }
}

// The gradients of an image's hoisted sums, over its segments, to where the sums were.
template <class S>
void combine(const StepJob& job, std::int64_t image, const std::int64_t* segments_of) {
  const StepPlan& plan = *job.plan;
  const std::int64_t width = plan.hoisted_width;
  const S* segments = static_cast<const S*>(job.segments);
  S* to = static_cast<S*>(job.hoisted) + image * width;
  const auto columns = [&](std::int64_t at, int count, bool gate) {
    for (std::int64_t n = at; n < at + count; n += kLanes<S>) {
      Vec<S> sum = splat<S>(0);
      for (std::int64_t s = segments_of[image]; s < segments_of[image + 1]; ++s)
        sum = sum + load<S>(segments + (s - job.first_segment) * width + n);
      if (gate) {
        const Vec<S> y = load<S>(to + n);
        sum = sum * (splat<S>(1) - y) * y;
      }
      store<S>(to + n, sum);
    }
  };
  for (const NetPlan& net : plan.nets)
    for (const LayerPlan& layer : net.layers) {
      const Matrix& m = layer.dense.matrix;
      if (m.cond_padded > 0) columns(m.hoisted, m.out_padded(), false);
      if (layer.dense.gate) columns(layer.dense.gate->hoisted, m.out_padded(), true);
    }
}

// Slab numbers [begin, end), over all slabs, to the first one.
template <class S>
void reduce(const StepJob& job, std::int64_t begin, std::int64_t end, std::int64_t slabs) {
  S* to = static_cast<S*>(job.slabs);
  const std::int64_t stride = job.plan->slab_numbers;
  for (std::int64_t n = begin; n < end; n += 16) {  // whole cache lines
    Vec<S> sum[16 / kLanes<S>];
    for (int i = 0; i < 16 / kLanes<S>; ++i) sum[i] = load<S>(to + n + i * kLanes<S>);
    for (std::int64_t s = 1; s < slabs; ++s)
      for (int i = 0; i < 16 / kLanes<S>; ++i)
        sum[i] = sum[i] + load<S>(to + s * stride + n + i * kLanes<S>);
    for (int i = 0; i < 16 / kLanes<S>; ++i) store<S>(to + n + i * kLanes<S>, sum[i]);
  }
}

// Rows [begin, end) of a target.
template <class S>
void write(const StepJob& job, const Target& t, int begin, int end) {
  constexpr int kRowsAtOnce = 128;  // images
  const S* slab = static_cast<const S*>(job.slabs);
  S* to = static_cast<S*>(job.grad_weights) + t.to;
  const std::int64_t width = job.plan->hoisted_width;
  const auto row = [&](int i) {
    return to + std::int64_t(t.row_slots ? t.row_slots[i] : i) * t.columns;
  };
  switch (t.from) {
    case Target::From::rows:  // see sum_rows
      break;
    case Target::From::zero:
      std::fill(to + std::int64_t(begin) * t.columns, to + std::int64_t(end) * t.columns, S(0));
      break;
    case Target::From::vector:
      for (int i = begin; i < end; ++i) *row(i) = slab[t.at + i];
      break;
    case Target::From::matrix: {
      const S* from = slab + t.sums.at;
      const std::ptrdiff_t down = t.sums.transposed ? 1 : t.sums.ld,
                           right = t.sums.transposed ? t.sums.ld : 1;
      if (!t.sums.transposed && !t.column_slots) {
        for (int i = begin; i < end; ++i) std::copy_n(from + i * down, t.columns, row(i));
        break;
      }
      for (int j = 0; j < t.columns; ++j)
        for (int i = begin; i < end; ++i)
          row(i)[t.column_slots ? t.column_slots[j] : j] = from[i * down + j * right];
      break;
    }
    case Target::From::cond_vector:
      for (int i = begin; i < end; ++i) {
        S sum = 0;
        for (std::int64_t image = 0; image < job.images; image += kRowsAtOnce) {
          S part = 0;
          const std::int64_t last = std::min<std::int64_t>(image + kRowsAtOnce, job.images);
          for (std::int64_t k = image; k < last; ++k)
            part += static_cast<const S*>(job.hoisted)[k * width + t.at + i];
          sum += part;
        }
        to[i] = job.add ? to[i] + sum : sum;
      }
      break;
    case Target::From::cond_matrix: {
      thread_local Scratch scratch;
      scratch.reserve(Scratch::bytes<S>((end - begin) * job.cond_ld));
      S* sums = scratch.take<S>((end - begin) * job.cond_ld);
      for (std::int64_t image = 0; image < job.images; image += kRowsAtOnce)
        outer<S>(static_cast<const S*>(job.hoisted) + image * width + t.at + begin, width,
                 end - begin, static_cast<const S*>(job.cond) + image * job.cond_ld, job.cond_ld,
                 t.columns,
                 static_cast<int>(std::min<std::int64_t>(kRowsAtOnce, job.images - image)), sums,
                 job.cond_ld, image > 0);
      for (int i = begin; i < end; ++i)
        for (int j = 0; j < t.columns; ++j) {
          const S v = sums[(i - begin) * job.cond_ld + j];
          row(i)[j] = job.add ? row(i)[j] + v : v;
        }
      break;
    }
  }
}

// Rows [begin, end) of a target that is summed up over the rows of a batch.
template <class S>
void sum_rows(const StepJob& job, const Target& t, int begin, int end) {
  const S* inputs = nullptr;
  std::ptrdiff_t ld = 0;
  switch (t.input) {
    case Target::Input::record:
      inputs = static_cast<const S*>(job.records) + t.record;
      ld = job.record_ld;
      break;
    case Target::Input::passive:
      ld = job.flow->dim;
      inputs =
          static_cast<const S*>(job.state) + job.batch_first * ld + job.plan->coupling->passive_at;
      break;
    case Target::Input::cond:
      ld = job.flow->cond_dim;
      inputs = static_cast<const S*>(job.cond) + job.batch_first * ld;
      break;
  }
  thread_local Scratch scratch;
  outer_rows<S>(static_cast<const S*>(job.grads) + t.grad + begin, job.grads_ld, end - begin,
                inputs, ld, t.columns, job.batch_rows,
                static_cast<S*>(job.grad_weights) + t.to + std::int64_t(begin) * t.columns,
                t.columns, job.add, scratch);
}

// Gradients of the condition of some images, one block of its numbers.
template <class S>
void cond_grad(const StepJob& job, std::int64_t image, int block) {
  const StepPlan& plan = *job.plan;
  const int rows = static_cast<int>(std::min<std::int64_t>(kTile, job.images - image));
  S sums[kTile * 3 * kLanes<S>];
  const auto add = [&](const Matrix& m, std::int64_t column) {
    const S* g = static_cast<const S*>(job.hoisted) + image * plan.hoisted_width + column;
    const Product<Plain<S>> product(m, job.back, {g, plan.hoisted_width, rows});
    product.sums(block, sums, m.block);
    const int first = block * m.block, count = std::min(m.block, m.out - first);
    for (int r = 0; r < rows; ++r) {
      S* to = static_cast<S*>(job.grad_cond) + (image + r) * job.flow->cond_dim + first;
      for (int k = 0; k < count; ++k) to[k] += sums[r * m.block + k];
    }
  };
  for (const NetPlan& net : plan.nets)
    for (const LayerPlan& layer : net.layers) {
      if (layer.cond_back) add(*layer.cond_back, layer.dense.matrix.hoisted);
      if (layer.gate_back) add(*layer.gate_back, layer.dense.gate->hoisted);
    }
}

}  // namespace

extern const coupling::TrainingKernels coupling_training_kernels;
const coupling::TrainingKernels coupling_training_kernels = {
    {{transpose<float>, hoist<float>, forward<float>, backward<float>, combine<float>,
      reduce<float>, write<float>, sum_rows<float>, cond_grad<float>},
     {transpose<double>, hoist<double>, forward<double>, backward<double>, combine<double>,
      reduce<double>, write<double>, sum_rows<double>, cond_grad<double>}}};

}  // namespace fasthyp::FASTHYP_SIMD
