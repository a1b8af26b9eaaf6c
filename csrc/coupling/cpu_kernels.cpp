// The fused flow: compiled once per SIMD level.
//
// A thread owns some rows and takes them through the whole flow, a step at a time, and for each
// step a tile of rows at a time. The hidden layers of subnets are computed a chunk at a time and
// the last one consumes each chunk at once, so hidden activations live in L1 (L2 for the inner
// layers of deep nets). Vectors run along a layer's outputs, so one row is as good as a thousand
// and every row may have its own condition. Every sum is made in the same order whatever the tile,
// so results do not depend on it.
#include <algorithm>
#include <cmath>

#include "coupling/coupling.h"
#include "coupling/cpu_net.h"
#include "coupling/math.h"

namespace fasthyp::FASTHYP_SIMD {

void philox_normal_row(std::uint64_t seed, std::uint32_t image, std::uint32_t hypothesis, int dim,
                       float* out);

namespace {

using coupling::Call;
using coupling::Coupling;
using coupling::Flow;
using coupling::Kind;
using coupling::Linear;
using coupling::RowsJob;
using coupling::Step;

// --- coupling arithmetic ---

template <class T>
FASTHYP_INLINE IntVec<T> valid_lanes(int left) {
  return lane_index<T>() < static_cast<typename detail::IntOf<T>::type>(left) + IntVec<T>{};
}

// Row sums of log-scales are kept in 16 lanes at every SIMD level and added up in one fixed order.
constexpr int kSumLanes = 16;

template <class T>
T sum_lanes(const T* lanes) {
  T v[kSumLanes];
  std::copy_n(lanes, kSumLanes, v);
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// One row: values x (count) with raw log-scales s and shifts t; sums gets the log-scales. All
// arrays can be read, and s and x written, up to the next multiple of 16 numbers.
template <class T>
FASTHYP_INLINE void affine_row(T* x, const T* s, const T* t, int count, T clamp,
                               coupling::Clamp kind, bool inverse, T* sums) {
  constexpr int W = kLanes<T>;
  for (int i = 0; i < count; i += W) {
    const auto valid = valid_lanes<T>(count - i);
    const Vec<T> scale = select<T>(valid, soft_clamp<T>(load<T>(s + i), clamp, kind), splat<T>(0));
    const Vec<T> shift = load<T>(t + i), v = load<T>(x + i);
    store<T>(
        x + i,
        select<T>(valid, inverse ? (v - shift) * exp<T>(-scale) : fma(v, exp<T>(scale), shift), v));
    T* lane = sums + i % kSumLanes;
    store<T>(lane, load<T>(lane) + scale);
  }
}

// The same with the log-scales less their mean, which add nothing to the log-Jacobian.
template <class T>
void gin_row(T* x, T* s, const T* t, int count, T clamp, coupling::Clamp kind, bool inverse) {
  constexpr int W = kLanes<T>;
  T sums[kSumLanes] = {};
  for (int i = 0; i < count; i += W) {
    const auto valid = valid_lanes<T>(count - i);
    const Vec<T> raw = load<T>(s + i), scale = soft_clamp<T>(raw, clamp, kind);
    store<T>(s + i, select<T>(valid, scale, raw));  // t may follow at once
    T* lane = sums + i % kSumLanes;
    store<T>(lane, load<T>(lane) + select<T>(valid, scale, splat<T>(0)));
  }
  const Vec<T> mean = splat<T>(sum_lanes(sums) / static_cast<T>(count));
  for (int i = 0; i < count; i += W) {
    const Vec<T> scale = load<T>(s + i) - mean, shift = load<T>(t + i), v = load<T>(x + i);
    store<T>(x + i,
             select<T>(valid_lanes<T>(count - i),
                       inverse ? (v - shift) * exp<T>(-scale) : fma(v, exp<T>(scale), shift), v));
  }
}

template <class T>
void additive_row(T* x, const T* t, int count, bool inverse) {
  for (int i = 0; i < count; ++i) x[i] = inverse ? x[i] - t[i] : x[i] + t[i];
}

// --- the whole flow ---

template <class P>
class FlowRows {
 public:
  using S = typename P::State;
  using In = typename P::In;
  static constexpr std::int64_t kRowsAtOnce = 10 * kTile;  // their state stays in L2

  FlowRows(const RowsJob& job, const Share* share)
      : job_(job), share_(share), call_(*job.call), flow_(*call_.flow) {}

  void run(std::int64_t begin, std::int64_t end) {
    thread_local Scratch scratch;
    const typename NetRunner<P>::Strides strides(flow_.widths);
    const auto room = std::min<std::int64_t>(kRowsAtOnce, end - begin);
    const auto numbers = static_cast<std::size_t>(room) * flow_.dim + kSumLanes;
    const std::size_t bytes = strides.bytes() + 2 * Scratch::bytes<S>(numbers) +
                              Scratch::bytes<S>(room * kSumLanes) + Scratch::bytes<S>(room) +
                              Scratch::bytes<const S*>(room) + Scratch::bytes<float>(flow_.dim);
    try {
      scratch.reserve(bytes);
    } catch (...) {
      if (share_) share_->meet(false);
      throw;
    }
    if (share_ && !share_->meet(true)) return;  // another thread of the team could not begin
    NetRunner<P> nets(strides, call_.packed, scratch, share_);
    state_ = scratch.template take<S>(numbers);
    other_ = scratch.template take<S>(numbers);
    sums_ = scratch.template take<S>(room * kSumLanes);
    base_ = scratch.template take<S>(room);
    hoisted_ = scratch.template take<const S*>(room);
    noise_ = scratch.template take<float>(flow_.dim);
    // Vectors may reach behind the last row's numbers: what they find there must be numbers.
    std::fill_n(state_, numbers, S(0));
    std::fill_n(other_, numbers, S(0));
    std::fill_n(nets.raw, kTile * nets.ldr(), S(0));
    for (std::int64_t row = begin; row < end; row += room)
      chunk(nets, row, static_cast<int>(std::min(room, end - row)));
  }

 private:
  std::int64_t image_of(std::int64_t row) const {
    return job_.image_of ? job_.image_of[row] : row / call_.per_image;
  }

  void chunk(NetRunner<P>& nets, std::int64_t first, int rows) {
    load_state(first, rows);
    std::fill_n(sums_, rows * kSumLanes, S(0));
    if (job_.hoisted)
      for (int r = 0; r < rows; ++r)
        hoisted_[r] = static_cast<const S*>(job_.hoisted) +
                      (image_of(first + r) - job_.hoisted_begin) * flow_.hoisted_width;
    const int count = static_cast<int>(flow_.steps.size());
    for (int i = 0; i < count; ++i) {
      const Step& step = flow_.steps[call_.inverse ? count - 1 - i : i];
      const std::vector<int>& move = call_.inverse ? step.from_after : step.from_before;
      if (!move.empty()) reorder(move, rows);
      if (call_.states && i % call_.keep_every == 0) keep_state(first, rows, i);
      const auto* coupling = std::get_if<Coupling>(&step.what);
      for (int r = 0; r < rows; r += kTile) {
        const int tile = std::min(kTile, rows - r);
        if (coupling)
          couple_tile(nets, *coupling, first + r, r, tile);
        else
          map_tile(nets, std::get<Linear>(step.what), r, tile);
      }
    }
    if (!share_ || share_->index == 0) store_state(first, rows);
  }

  void keep_state(std::int64_t first, int rows, int step) {
    if (share_ && share_->index > 0) return;
    const int dim = flow_.dim;
    for (int r = 0; r < rows; ++r)
      std::copy_n(state_ + static_cast<std::ptrdiff_t>(r) * dim, dim,
                  static_cast<S*>(call_.states) + (first + r) * call_.states_ld +
                      step / call_.keep_every * static_cast<std::int64_t>(dim));
  }

  void reorder(const std::vector<int>& move, int rows) {
    const int dim = flow_.dim;
    for (int r = 0; r < rows; ++r) {
      const S* from = state_ + static_cast<std::ptrdiff_t>(r) * dim;
      S* to = other_ + static_cast<std::ptrdiff_t>(r) * dim;
      for (int k = 0; k < dim; ++k) to[k] = from[move[k]];
    }
    std::swap(state_, other_);
  }

  void couple_tile(NetRunner<P>& nets, const Coupling& c, std::int64_t first, int row, int rows) {
    S* state = state_ + static_cast<std::ptrdiff_t>(row) * flow_.dim;
    const S* const* hoisted = job_.hoisted ? hoisted_ + row : nullptr;
    for (const coupling::Net& net : c.nets)
      nets.run(net, input(nets, c, net.layers[0].matrix, first, state, rows), hoisted);
    for (int r = 0; r < rows; ++r) {
      S *x = state + r * flow_.dim + c.active_at, *s = nets.raw + r * nets.ldr();
      const S* t = s + c.shift_at;
      const auto clamp = static_cast<S>(c.clamp);
      switch (c.kind) {
        case Kind::affine:
          affine_row<S>(x, s, t, c.active, clamp, c.clamp_activation, call_.inverse,
                        sums_ + (row + r) * kSumLanes);
          break;
        case Kind::additive:
          additive_row<S>(x, t, c.active, call_.inverse);
          break;
        case Kind::gin:
          gin_row<S>(x, s, t, c.active, clamp, c.clamp_activation, call_.inverse);
          break;
      }
    }
  }

  // What the first matrix of a subnet reads: the passive slots, after the condition if it is not
  // hoisted.
  Input<P> input(NetRunner<P>& nets, const Coupling& c, const Matrix& m, std::int64_t first,
                 const S* state, int rows) {
    const bool reads_cond = m.cond_padded > 0 && !job_.hoisted;
    if (std::is_same_v<S, In> && !reads_cond && c.passive > 0)  // as they lie there
      return {reinterpret_cast<const In*>(state + c.passive_at), flow_.dim, rows};
    for (int r = 0; r < rows; ++r) {
      In* x = nets.x + r * nets.ldx();
      if (reads_cond) {
        const S* given =
            static_cast<const S*>(call_.cond) + (first + r) / call_.per_image * flow_.cond_dim;
        P::copy_in(x, given, flow_.cond_dim);
        std::fill(x + flow_.cond_dim, x + m.cond_padded, In(0));
        x += m.cond_padded;
      }
      P::copy_in(x, state + r * flow_.dim + c.passive_at, c.passive);
      std::fill(x + c.passive, x + m.in_padded, In(0));
    }
    return {nets.x, nets.ldx(), rows};
  }

  void map_tile(NetRunner<P>& nets, const Linear& l, int row, int rows) {
    const Matrix& m = call_.inverse ? l.inverse : l.forward;
    const int dim = flow_.dim;
    S* state = state_ + static_cast<std::ptrdiff_t>(row) * dim;
    if (l.diagonal) {
      const S *scale = reinterpret_cast<const S*>(call_.packed + m.weight),
              *shift = reinterpret_cast<const S*>(call_.packed + m.bias);
      for (int r = 0; r < rows; ++r)
        for (int k = 0; k < dim; ++k) state[r * dim + k] = state[r * dim + k] * scale[k] + shift[k];
      return;
    }
    const Product<Plain<S>> product(m, call_.packed, {state, dim, rows});
    for (int b = 0; b < m.blocks; ++b) product.sums(b, nets.raw + b * m.block, nets.ldr());
    for (int r = 0; r < rows; ++r) std::copy_n(nets.raw + r * nets.ldr(), dim, state + r * dim);
  }

  void load_state(std::int64_t first, int rows) {
    const int dim = flow_.dim;
    const int* place = (call_.inverse ? flow_.last_latent : flow_.first_slot).data();
    for (int r = 0; r < rows; ++r) {
      const S* in = static_cast<const S*>(call_.input) + (first + r) * dim;
      if (!call_.input) {
        base_[r] = draw(first + r, other_);
        in = other_;
      }
      S* state = state_ + static_cast<std::ptrdiff_t>(r) * dim;
      for (int k = 0; k < dim; ++k) state[k] = in[place[k]];
    }
  }

  // The latent of one row; returns the log-density of its noise.
  S draw(std::int64_t row, S* z) {
    const int noise = flow_.dim - call_.fixed_dims;
    const std::int64_t image = row / call_.per_image;
    const std::int64_t hypothesis = call_.first_sample + row % call_.per_image;
    if (call_.include_mode && hypothesis == 0) {
      std::fill_n(z, noise, S(0));
    } else {
      philox_normal_row(call_.seed, static_cast<std::uint32_t>(call_.image_offset + image),
                        static_cast<std::uint32_t>(hypothesis), noise, noise_);
      std::copy_n(noise_, noise, z);
    }
    S squares = 0;
    for (int k = 0; k < noise; ++k) squares += z[k] * z[k];
    if (call_.fixed_dims > 0)
      std::copy_n(static_cast<const S*>(call_.fixed) + image * call_.fixed_dims, call_.fixed_dims,
                  z + noise);
    return S(-0.5) * squares - static_cast<S>(noise * 0.91893853320467274178);  // ln sqrt(2 pi)
  }

  void store_state(std::int64_t first, int rows) {
    const int dim = flow_.dim;
    const int* place = (call_.inverse ? flow_.first_slot : flow_.last_latent).data();
    for (int r = 0; r < rows; ++r) {
      const S* state = state_ + static_cast<std::ptrdiff_t>(r) * dim;
      S* out = static_cast<S*>(call_.output) + (first + r) * dim;
      for (int k = 0; k < dim; ++k) out[place[k]] = state[k];
      const S log_det = sum_lanes(sums_ + r * kSumLanes) + static_cast<S>(flow_.log_det);
      S& result = static_cast<S*>(call_.log_det)[first + r];
      // Of the inverse, -log_det; the density of a drawn output is the noise's less log|dx/dz|.
      result = !call_.input ? base_[r] + log_det : call_.inverse ? -log_det : log_det;
    }
  }

  const RowsJob& job_;
  const Share* share_;
  const Call& call_;
  const Flow& flow_;
  S *state_ = nullptr, *other_ = nullptr, *sums_ = nullptr, *base_ = nullptr;
  const S** hoisted_ = nullptr;
  float* noise_ = nullptr;
};

template <class P>
void rows(const RowsJob& job, std::int64_t begin, std::int64_t end, const Share* share) {
  FlowRows<P>(job, share).run(begin, end);
}

template <class P>
void hoist(const Flow& flow, const std::byte* packed, const void* cond, std::int64_t images,
           std::int64_t begin, std::int64_t end, void* hoisted) {
  using S = typename P::State;
  using In = typename P::In;
  thread_local Scratch scratch;
  const typename NetRunner<P>::Strides strides(flow.widths);
  scratch.reserve(strides.bytes());
  NetRunner<P> nets(strides, packed, scratch);
  for (std::int64_t image = 0; image < images; image += kTile) {
    const int count = static_cast<int>(std::min<std::int64_t>(kTile, images - image));
    for (int r = 0; r < count; ++r) {
      In* x = nets.x + r * nets.ldx();
      P::copy_in(x, static_cast<const S*>(cond) + (image + r) * flow.cond_dim, flow.cond_dim);
      if (flow.cond_dim % P::kStep) x[flow.cond_dim] = 0;
    }
    std::int64_t unit = 0;
    for_each_hoisted(flow, [&](const Matrix& m, bool gate) {
      for (int b = 0; b < m.blocks; ++b, ++unit)
        if (unit >= begin && unit < end)
          nets.hoist_block(m, gate, b, count,
                           static_cast<S*>(hoisted) + image * flow.hoisted_width + m.hoisted +
                               static_cast<std::ptrdiff_t>(b) * m.block,
                           flow.hoisted_width);
    });
  }
}

template <class T>
void affine(T* state, std::int64_t rows, int dim, const T* raw, const std::int64_t* active,
            int count, double clamp, coupling::Clamp kind, bool inverse, T* log_det) {
  thread_local Scratch scratch;
  const int room = (count + 2 * kSumLanes) / kSumLanes * kSumLanes;
  scratch.reserve(Scratch::bytes<T>(room) + Scratch::bytes<T>(2 * room));
  T* x = scratch.take<T>(room);
  T* row_raw = scratch.take<T>(2 * room);
  std::fill_n(x, room, T(0));
  std::fill_n(row_raw, 2 * room, T(0));
  for (std::int64_t r = 0; r < rows; ++r) {
    T sums[kSumLanes] = {};
    std::copy_n(raw + r * 2 * count, 2 * count, row_raw);
    for (int k = 0; k < count; ++k) x[k] = state[r * dim + active[k]];
    affine_row<T>(x, row_raw, row_raw + count, count, static_cast<T>(clamp), kind, inverse, sums);
    for (int k = 0; k < count; ++k) state[r * dim + active[k]] = x[k];
    const T sum = sum_lanes(sums);
    log_det[r] = inverse ? -sum : sum;
  }
}

}  // namespace

extern const coupling::Kernels coupling_kernels;
const coupling::Kernels coupling_kernels = {
#if defined(__AVX512BF16__)
    {kLanes<float>, kLanes<double>, Bf16::kWidth},
    {hoist<Plain<float>>, hoist<Plain<double>>, hoist<Bf16>},
    {rows<Plain<float>>, rows<Plain<double>>, rows<Bf16>},
#else
    {kLanes<float>, kLanes<double>, 0},
    {hoist<Plain<float>>, hoist<Plain<double>>, nullptr},
    {rows<Plain<float>>, rows<Plain<double>>, nullptr},
#endif
    affine<float>,
    affine<double>,
};

}  // namespace fasthyp::FASTHYP_SIMD
