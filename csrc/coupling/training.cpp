#include "coupling/training.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include "common/cpu_features.h"
#include "common/thread_pool.h"

namespace fasthyp {

FASTHYP_PER_SIMD_LEVEL(coupling::TrainingKernels, coupling_training_kernels)

namespace coupling {
namespace {

constexpr std::int64_t kImageBytes = std::int64_t(16) << 20;  // hoisted sums held at a time
constexpr std::int64_t kSlabBytes = std::int64_t(64) << 20;   // gradients of all slabs
constexpr std::int64_t kBatchBytes = std::int64_t(64) << 20;  // wide steps: what is kept of rows
// Weight gradients that every tile of rows can add to.
constexpr std::int64_t kCachedBytes = std::int64_t(1) << 20;
// Hoisted sums, and their gradients, are many numbers. Where rows share few conditions, each row
// reads its own, if its weights are few enough for their gradients to stay in the cache.
constexpr std::int64_t kSharing = 2;  // rows of a condition, on average, that are worth it
constexpr int kRowCond = 256;         // numbers of a condition that is read by row, at most

// Rows of an odd number of cache lines: a column of them is spread over all sets of a cache.
std::int64_t odd_lines(std::int64_t width, std::size_t number_bytes) {
  const auto line = static_cast<std::int64_t>(64 / number_bytes);
  return ((width + line - 1) / line | 1) * line;
}

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
std::size_t number_size(Element e) { return e == Element::f64 ? 8 : 4; }

const TrainingKernels::Functions& functions(Element e) {
  return coupling_training_kernels().of[e == Element::f64 ? 1 : 0];
}

// Calls f(i) for all i in [0, count), each on whichever thread is free.
template <class F>
void for_each(int threads, std::int64_t count, F&& f) {
  std::atomic<std::int64_t> next{0};
  parallel(static_cast<int>(std::clamp<std::int64_t>(count, 1, threads)), [&](int, int) {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

// Memory for numbers of either type, not set to anything.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::int64_t bytes) : data_(new (std::align_val_t(64)) std::byte[bytes + 64]) {}
  std::byte* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<std::byte, Free> data_;
};

std::int64_t states(const Flow& flow, Keep keep) {
  const auto steps = static_cast<std::int64_t>(flow.steps.size());
  return keep.every > 0 ? (steps + keep.every - 1) / keep.every : 0;
}

// How the steps of a flow are trained; in the order of the flow.
class Planner {
 public:
  Planner(const Flow& flow, bool inverse, Keep keep, bool by_row, const std::vector<bool>* wanted,
          bool cond_wanted)
      : flow_(flow),
        inverse_(inverse),
        by_row_(by_row),
        number_(static_cast<std::int64_t>(number_size(flow.element))),
        wanted_(wanted),
        cond_wanted_(cond_wanted) {
    saved_ = states(flow, keep) * flow.dim;
    store_ = keep.store;
  }

  std::vector<StepPlan> steps() {
    std::vector<StepPlan> plans;
    for (const Step& step : flow_.steps) {
      StepPlan plan{};
      plan.step = &step;
      plan_ = &plan;
      if (const auto* c = std::get_if<Coupling>(&step.what))
        coupling(*c);
      else
        linear(std::get<Linear>(step.what));
      plans.push_back(std::move(plan));
    }
    if (wanted_ && tensor_ != wanted_->size())
      throw std::invalid_argument("flow: expected " + std::to_string(tensor_) +
                                  " flags of wanted gradients, got " +
                                  std::to_string(wanted_->size()));
    return plans;
  }
  std::int64_t saved() const { return saved_; }
  std::int64_t grad_numbers() const { return target_; }

 private:
  void coupling(const Coupling& c) {
    StepPlan& p = *plan_;
    p.coupling = &c;
    p.by_row = by_row_;
    p.wide = wanted_ && weight_numbers(c) * number_ > kCachedBytes;
    for (const Net& net : c.nets) p.raw_width += net.layers.back().matrix.out_padded();
    p.record = p.grads = p.raw_width;
    for (const Net& net : c.nets) {
      NetPlan n{{}, net.activation, net.negative_slope, net.raw_at};
      for (std::size_t l = 0; l < net.layers.size(); ++l)
        n.layers.push_back(layer(net, static_cast<int>(l), n));
      p.nets.push_back(std::move(n));
    }
    p.record_at = saved_;
    if (store_) saved_ += p.record;
  }

  // Of the weights whose gradients are summed up over rows.
  std::int64_t weight_numbers(const Coupling& c) const {
    std::int64_t numbers = 0;
    for (const Net& net : c.nets)
      for (const Dense& dense : net.layers) {
        const Matrix& m = dense.matrix;
        const int cond = by_row_ && m.cond_padded > 0 ? flow_.cond_dim : 0;
        numbers += std::int64_t(m.out) * (m.in + cond);
      }
    return numbers;
  }

  LayerPlan layer(const Net& net, int l, const NetPlan& n) {
    StepPlan& p = *plan_;
    LayerPlan layer{};
    layer.dense = net.layers[l];
    Dense& dense = layer.dense;
    Matrix& m = dense.matrix;
    const int width = m.out_padded();
    const bool last = l + 1 == static_cast<int>(net.layers.size()), reads = m.cond_padded > 0;
    layer.out = last ? net.raw_at : column(width);
    if (p.wide) {
      layer.grad = last ? net.raw_at : p.grads;
      if (!last) p.grads += width;
    }
    if (dense.activate && net.activation != Activation::relu) layer.slope = column(width);
    if (dense.gate) layer.product = column(width);
    if (dense.norm >= 0) layer.value = column(width);
    p.block = std::max(p.block, m.block);
    p.widest = std::max(p.widest, width);
    if (!last) p.inner = std::max(p.inner, width);
    if (dense.keep || dense.add) p.kept = std::max(p.kept, width);

    if (m.in > 0) {
      layer.back = transposed(m.out, m.in);
      p.inputs = std::max(p.inputs, layer.back.out_padded());
    }
    if (reads && !by_row_) {
      m.hoisted = p.hoisted_width;
      p.hoisted_width += width;
    }
    if (dense.gate) {
      dense.gate->hoisted = p.hoisted_width;
      p.hoisted_width += width;
    }
    if (cond_wanted_ && reads) layer.cond_back = transposed(m.out, flow_.cond_dim);
    if (cond_wanted_ && dense.gate) layer.gate_back = transposed(m.out, flow_.cond_dim);

    const auto summed = [&](Sums& of, int in, Target::Input input) {
      Target t{p.wide ? Target::From::rows : Target::From::matrix, {}};
      t.input = input;
      t.grad = layer.grad;
      if (input == Target::Input::record) t.record = n.layers.back().out;
      if (want() && in > 0 && !p.wide) t.sums = of = sums(m.out, in);
      target(t, m.out, in);
    };
    summed(layer.weight, m.in, l > 0 ? Target::Input::record : Target::Input::passive);
    layer.hoisted = reads && !by_row_ && cond_wanted_;
    if (reads && by_row_) {
      summed(layer.cond_weight, flow_.cond_dim, Target::Input::cond);
    } else if (reads) {
      layer.hoisted |= want();
      target({Target::From::cond_matrix, {}, m.hoisted}, m.out, flow_.cond_dim);
    }
    if (reads && !by_row_) {
      layer.hoisted |= want();
      target({Target::From::cond_vector, {}, m.hoisted}, m.out, 1);
    } else {
      if (want()) layer.bias = slab(width);
      target({Target::From::vector, {}, layer.bias}, m.out, 1);
    }
    if (dense.gate) {
      const std::int64_t at = dense.gate->hoisted;
      layer.gate = cond_wanted_ || want();
      target({Target::From::cond_matrix, {}, at}, m.out, flow_.cond_dim);
      layer.gate |= want();
      target({Target::From::cond_vector, {}, at}, m.out, 1);
    }
    if (dense.norm >= 0) {
      if (want() || want(1)) layer.norm = slab(2 * width);
      target({Target::From::vector, {}, layer.norm}, m.out, 1);
      target({Target::From::vector, {}, layer.norm + width}, m.out, 1);
    }
    return layer;
  }

  void linear(const Linear& l) {
    StepPlan& p = *plan_;
    p.diagonal = l.diagonal;
    p.linear = inverse_ ? &l.inverse : &l.forward;
    p.linear_undo = inverse_ ? &l.forward : &l.inverse;
    p.raw_width = p.linear->out_padded();
    const int dim = flow_.dim, columns = l.diagonal ? 1 : dim;
    if (!l.diagonal) {
      p.linear_back = transposed(dim, dim);
      p.inputs = p.linear_back.out_padded();
    }
    for (const bool inverse : {false, true}) {
      const std::vector<int>&from = inverse ? p.step->after : p.step->before,
            &to = inverse ? p.step->before : p.step->after;
      const bool read = inverse == inverse_;
      Target weight, shift;
      if (read && want()) {
        if (l.diagonal) {
          p.linear_weight.at = slab(p.raw_width);
          weight = {Target::From::vector, {}, p.linear_weight.at};
        } else {
          p.linear_weight = sums(dim, dim);
          weight = {Target::From::matrix, p.linear_weight};
          weight.column_slots = from.data();
        }
        weight.row_slots = to.data();
      }
      target(weight, dim, columns);
      if (read && want()) {
        p.linear_shift = slab(p.raw_width);
        shift = {Target::From::vector, {}, p.linear_shift};
        shift.row_slots = to.data();
      }
      target(shift, dim, 1);
    }
  }

  bool want(std::size_t ahead = 0) const {
    return wanted_ && tensor_ + ahead < wanted_->size() && (*wanted_)[tensor_ + ahead];
  }
  // The next tensor of the plan.
  void target(Target t, int rows, int columns) {
    if (want() && std::int64_t(rows) * columns > 0) {
      t.rows = rows;
      t.columns = columns;
      t.to = target_;
      plan_->targets.push_back(t);
      target_ += std::int64_t(rows) * columns;
    }
    ++tensor_;
  }

  int column(int width) {
    const int at = plan_->record;
    plan_->record += width;
    return at;
  }
  std::int64_t slab(std::int64_t numbers) {
    const std::int64_t at = plan_->slab_numbers;
    plan_->slab_numbers += round_up(numbers, 16);
    return at;
  }
  Sums sums(int out, int in) {
    const auto cost = [&](std::int64_t m, int n) {
      const std::int64_t vectors = (n + flow_.lanes - 1) / flow_.lanes;
      return m * (vectors == 1 ? 3 : 2 * vectors);  // a tile of one vector waits for its broadcasts
    };
    Sums s;
    s.transposed = cost(in, out) < cost(out, in);
    s.m = s.transposed ? in : out;
    s.n = s.transposed ? out : in;
    s.ld = round_up(s.n, 16);
    s.at = slab(s.m * s.ld);
    return s;
  }
  Matrix transposed(int in, int out) {
    Matrix m{};
    m.element = flow_.element;
    m.in = m.in_padded = in;
    m.out = out;
    m.chunk = kChunk;
    m.vectors = choose_vectors((out + flow_.lanes - 1) / flow_.lanes);
    m.block = m.vectors * flow_.lanes;
    m.blocks = (out + m.block - 1) / m.block;
    plan_->block = std::max(plan_->block, m.block);
    m.weight = plan_->back_bytes;
    plan_->back_bytes += round_up(std::int64_t(in) * m.out_padded() * number_, 64);
    m.bias = plan_->back_bytes;
    plan_->back_bytes += round_up(m.out_padded() * number_, 64);
    return m;
  }

  const Flow& flow_;
  bool inverse_, by_row_, store_;
  std::int64_t number_;
  const std::vector<bool>* wanted_;
  bool cond_wanted_;
  StepPlan* plan_ = nullptr;
  std::size_t tensor_ = 0;
  std::int64_t target_ = 0, saved_;
};

// Rows in the order in which they are worked on: those of an image together. Images go in chunks,
// whose hoisted sums fit into memory; the rows of a chunk in slabs, each of which sums up weight
// gradients of its own. None of it depends on the number of threads.
struct Rows {
  struct Chunk {
    std::int64_t first_image, images, first, rows, first_segment, segments;
  };
  std::int64_t count = 0;
  std::vector<std::int64_t> order;        // empty: the same
  std::vector<std::int64_t> image_of;     // per row
  std::vector<std::int64_t> segment_of;   // per row
  std::vector<std::int64_t> segments_of;  // per image, its first one; and the end
  std::vector<Chunk> chunks;
  std::int64_t slab_rows = 1;
  std::int64_t batch_slabs = 1;  // of wide steps
  std::int64_t most_images = 0, most_segments = 0, slabs = 0;
  Memory cond;  // (images, cond_ld)
  std::int64_t cond_ld = 0;
  const void* by_row = nullptr;  // the caller's condition, where it is read by row
};

// The images of a call. Callers that know nothing of images repeat the condition for every
// hypothesis.
struct Images {
  std::int64_t count, per_image;
  std::optional<Distinct> distinct;  // then per_image is 1
  bool by_row = false;               // see StepPlan; then per_image is 1
};

template <class T>
Images find_images(const Flow& flow, std::int64_t images, std::int64_t per_image, const T* cond) {
  Images found{images, per_image, {}};
  if (flow.hoisted_width == 0 || per_image != 1) return found;
  Distinct d =
      find_distinct(reinterpret_cast<const std::byte*>(cond), images, flow.cond_dim * sizeof(T));
  if (static_cast<std::int64_t>(d.first.size()) * kSharing <= images)
    found.distinct = std::move(d);
  else
    found.by_row = !flow.gated && flow.cond_dim <= kRowCond;
  return found;
}

template <class T>
Rows arrange(const Flow& flow, const std::vector<StepPlan>& plans, Images found, const T* cond) {
  std::int64_t images = found.count;
  Rows r;
  r.count = images * found.per_image;
  if (found.by_row) r.by_row = cond;
  std::int64_t hoisted = 0, slab = 1, kept = 1;
  for (const StepPlan& p : plans) {
    hoisted = std::max(hoisted, p.hoisted_width);
    slab = std::max(slab, p.slab_numbers);
    if (p.wide) kept = std::max<std::int64_t>(kept, p.record + p.grads);
  }
  r.image_of.resize(r.count);
  for (std::int64_t i = 0; i < r.count; ++i) r.image_of[i] = i / found.per_image;
  std::vector<std::int64_t> first;  // distinct rows of cond
  if (found.distinct) {
    Distinct& d = *found.distinct;
    images = static_cast<std::int64_t>(d.first.size());
    first = std::move(d.first);
    if (!std::is_sorted(d.index.begin(), d.index.end())) {
      r.order.resize(r.count);
      std::iota(r.order.begin(), r.order.end(), 0);
      std::stable_sort(r.order.begin(), r.order.end(),
                       [&](std::int64_t a, std::int64_t b) { return d.index[a] < d.index[b]; });
    }
    std::sort(d.index.begin(), d.index.end());
    r.image_of = std::move(d.index);
  }
  if (hoisted > 0) {
    r.cond_ld = round_up(flow.cond_dim, 16);
    r.cond = Memory(images * r.cond_ld * static_cast<std::int64_t>(sizeof(T)));
    for (std::int64_t i = 0; i < images; ++i) {
      T* to = reinterpret_cast<T*>(r.cond.data()) + i * r.cond_ld;
      const T* from = cond + (first.empty() ? i : first[i]) * flow.cond_dim;
      std::fill(std::copy_n(from, flow.cond_dim, to), to + r.cond_ld, T(0));
    }
  }
  std::vector<std::int64_t> row_of(images + 1, 0);  // first row of each image
  for (std::int64_t i = 0; i < r.count; ++i) ++row_of[r.image_of[i] + 1];
  for (std::int64_t i = 0; i < images; ++i) row_of[i + 1] += row_of[i];

  const std::int64_t limit =
      hoisted > 0 ? std::max<std::int64_t>(
                        1, kImageBytes / (hoisted * static_cast<std::int64_t>(sizeof(T))))
                  : images;
  for (std::int64_t i = 0; i < images; i += limit) {
    const std::int64_t n = std::min(limit, images - i);
    r.chunks.push_back({i, n, row_of[i], row_of[i + n] - row_of[i], 0, 0});
  }
  std::int64_t most_rows = 0;
  for (const auto& c : r.chunks) most_rows = std::max(most_rows, c.rows);
  // Many slabs keep threads evenly busy, large ones read and write gradients less often.
  r.slab_rows = std::clamp<std::int64_t>(round_up((most_rows + 11) / 12, 12), 24, 384);
  const std::int64_t most_slabs =
      std::max<std::int64_t>(1, kSlabBytes / (slab * static_cast<std::int64_t>(sizeof(T))));
  r.slab_rows = std::max(r.slab_rows, round_up((most_rows + most_slabs - 1) / most_slabs, 12));
  r.slabs = (most_rows + r.slab_rows - 1) / r.slab_rows;
  const std::int64_t slab_bytes = r.slab_rows * kept * static_cast<std::int64_t>(sizeof(T));
  r.batch_slabs = std::clamp<std::int64_t>(kBatchBytes / slab_bytes, 1, r.slabs);

  r.segment_of.resize(r.count);
  r.segments_of.resize(images + 1);
  std::int64_t segment = -1;
  for (auto& c : r.chunks) {
    c.first_segment = segment + 1;
    for (std::int64_t i = 0; i < c.rows; ++i) {
      const std::int64_t row = c.first + i;
      const bool starts = i == 0 || r.image_of[row] != r.image_of[row - 1];
      if (starts || i % r.slab_rows == 0) ++segment;
      if (starts) r.segments_of[r.image_of[row]] = segment;
      r.segment_of[row] = segment;
    }
    c.segments = segment + 1 - c.first_segment;
    r.most_images = std::max(r.most_images, c.images);
    r.most_segments = std::max(r.most_segments, c.segments);
  }
  r.segments_of[images] = segment + 1;
  return r;
}

// What both walks through the steps share.
template <class T>
class Walk {
 public:
  Walk(const Flow& flow, const std::byte* packed, bool inverse, int threads,
       std::vector<StepPlan> plans, Rows rows)
      : flow_(flow),
        packed_(packed),
        inverse_(inverse),
        threads_(threads),
        plans_(std::move(plans)),
        rows_(std::move(rows)),
        kernels_(functions(flow.element)) {
    std::int64_t hoisted = 0;
    for (const StepPlan& p : plans_) hoisted = std::max(hoisted, p.hoisted_width);
    state_ = numbers(rows_.count * flow.dim + 64);
    hoisted_ = numbers(rows_.most_images * hoisted);
  }

 protected:
  static Memory numbers(std::int64_t count) {
    return Memory(count * static_cast<std::int64_t>(sizeof(T)));
  }
  static T* at(const Memory& m) { return reinterpret_cast<T*>(m.data()); }
  std::int64_t caller_row(std::int64_t row) const {
    return rows_.order.empty() ? row : rows_.order[row];
  }

  // The caller's rows, whose column place[k] goes to place k.
  void load(const T* from, const std::vector<int>& place, const Memory& to) {
    each_rows([&](std::int64_t row) {
      const T* in = from + caller_row(row) * flow_.dim;
      T* out = at(to) + row * flow_.dim;
      for (int k = 0; k < flow_.dim; ++k) out[k] = in[place[k]];
    });
    std::fill_n(at(to) + rows_.count * flow_.dim, 64, T(0));
  }
  void store(const Memory& from, const std::vector<int>& place, T* to) {
    each_rows([&](std::int64_t row) {
      const T* in = at(from) + row * flow_.dim;
      T* out = to + caller_row(row) * flow_.dim;
      for (int k = 0; k < flow_.dim; ++k) out[place[k]] = in[k];
    });
  }
  template <class F>
  void each_rows(F&& f) {
    parallel(threads_, [&](int shard, int shards) {
      const Range r = shard_range(rows_.count, shard, shards);
      for (std::int64_t row = r.begin; row < r.end; ++row) f(row);
    });
  }

  StepJob job(const StepPlan& plan, const std::vector<int>& move) const {
    StepJob j{};
    j.flow = &flow_;
    j.plan = &plan;
    j.packed = packed_;
    j.inverse = inverse_;
    j.state = state_.data();
    j.move = move.empty() ? nullptr : &move;
    j.slab_rows = rows_.slab_rows;
    j.order = rows_.order.empty() ? nullptr : rows_.order.data();
    j.image_of = rows_.image_of.data();
    j.segment_of = rows_.segment_of.data();
    j.cond_ld = rows_.cond_ld;
    j.hoisted = hoisted_.data();
    j.state_at = -1;
    return j;
  }
  void enter(StepJob& job, const Rows::Chunk& chunk) const {
    job.first = chunk.first;
    job.rows = chunk.rows;
    job.first_image = chunk.first_image;
    job.images = chunk.images;
    job.first_segment = chunk.first_segment;
    if (rows_.by_row)
      job.cond = rows_.by_row;
    else if (rows_.cond_ld > 0)
      job.cond = at(rows_.cond) + chunk.first_image * rows_.cond_ld;
  }
  std::int64_t slabs(const StepJob& job) const {
    return (job.rows + job.slab_rows - 1) / job.slab_rows;
  }

  struct Hoist {
    const Matrix* matrix;
    bool gate;
    int block;
  };
  static std::vector<Hoist> hoists(const StepPlan& plan) {
    std::vector<Hoist> found;
    if (plan.by_row) return found;
    for (const NetPlan& net : plan.nets)
      for (const LayerPlan& layer : net.layers) {
        if (layer.dense.matrix.cond_padded > 0)
          for (int b = 0; b < layer.dense.matrix.blocks; ++b)
            found.push_back({&layer.dense.matrix, false, b});
        if (layer.dense.gate)
          for (int b = 0; b < layer.dense.gate->blocks; ++b)
            found.push_back({&*layer.dense.gate, true, b});
      }
    return found;
  }

  const Flow& flow_;
  const std::byte* packed_;
  const bool inverse_;
  const int threads_;
  std::vector<StepPlan> plans_;
  Rows rows_;
  const TrainingKernels::Functions& kernels_;
  Memory state_, hoisted_;
};

// The pass that stores hidden layers.
template <class T>
class Forward : Walk<T> {
 public:
  using Walk<T>::Walk;

  void run(const Call& call, Keep keep, T* saved, std::int64_t saved_width) {
    const Flow& flow = this->flow_;
    constexpr int kLanes = 16;
    const Memory sums = this->numbers(this->rows_.count * kLanes);
    std::fill_n(this->at(sums), this->rows_.count * kLanes, T(0));
    this->load(static_cast<const T*>(call.input), call.inverse ? flow.last_latent : flow.first_slot,
               this->state_);
    const int count = static_cast<int>(flow.steps.size());
    for (int i = 0; i < count; ++i) {
      const int index = call.inverse ? count - 1 - i : i;
      const Step& step = flow.steps[index];
      StepJob job =
          this->job(this->plans_[index], call.inverse ? step.from_after : step.from_before);
      job.log_det = sums.data();
      job.saved = saved;
      job.saved_width = saved_width;
      job.store = true;
      if (keep.every > 0 && i % keep.every == 0)
        job.state_at = i / keep.every * std::int64_t(flow.dim);
      const auto hoists = this->hoists(*job.plan);
      for (const auto& chunk : this->rows_.chunks) {
        this->enter(job, chunk);
        for_each(this->threads_, static_cast<std::int64_t>(hoists.size()), [&](std::int64_t h) {
          this->kernels_.hoist(job, *hoists[h].matrix, hoists[h].gate, hoists[h].block);
        });
        for_each(this->threads_, this->slabs(job),
                 [&](std::int64_t slab) { this->kernels_.forward(job, slab); });
      }
    }
    this->store(this->state_, call.inverse ? flow.first_slot : flow.last_latent,
                static_cast<T*>(call.output));
    this->each_rows([&](std::int64_t row) {
      T* v = this->at(sums) + row * kLanes;
      for (int half = kLanes / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) v[k] += v[k + half];
      const T log_det = v[0] + static_cast<T>(flow.log_det);
      static_cast<T*>(call.log_det)[this->caller_row(row)] = call.inverse ? -log_det : log_det;
    });
  }
};

template <class T>
class Backward : Walk<T> {
 public:
  Backward(const Gradient& g, std::vector<StepPlan> plans, Rows rows)
      : Walk<T>(*g.flow, g.packed, g.inverse, g.threads, std::move(plans), std::move(rows)), g_(g) {
    std::int64_t slab = 0, hoisted = 0, back = 0, records = 0, grads = 0;
    for (const StepPlan& p : this->plans_) {
      slab = std::max(slab, p.slab_numbers);
      hoisted = std::max(hoisted, p.hoisted_width);
      back = std::max(back, p.back_bytes);
      if (!p.wide) continue;
      if (!stored_in_place()) records = std::max<std::int64_t>(records, stride(p.record));
      grads = std::max<std::int64_t>(grads, stride(p.grads));
    }
    const std::int64_t batch =
        std::min(this->rows_.batch_slabs * this->rows_.slab_rows, this->rows_.count);
    records_ = this->numbers(batch * records + 64);
    grads_ = this->numbers(batch * grads + 64);
    grad_ = this->numbers(this->rows_.count * g.flow->dim + 64);
    slabs_ = this->numbers(slab * this->rows_.slabs);
    segments_ = this->numbers(hoisted * this->rows_.most_segments);
    back_ = Memory(back);
  }

  void run(std::int64_t saved_width) {
    const Flow& flow = this->flow_;
    const bool undo = !g_.inverse;  // the direction in which states are reconstructed
    const auto& from = undo ? flow.last_latent : flow.first_slot;
    this->load(static_cast<const T*>(g_.output), from, this->state_);
    this->load(static_cast<const T*>(g_.grad_output), from, grad_);
    Memory log_det;
    if (g_.grad_log_det) {
      log_det = this->numbers(this->rows_.count);
      this->each_rows([&](std::int64_t row) {
        this->at(log_det)[row] = static_cast<const T*>(g_.grad_log_det)[this->caller_row(row)];
      });
    }
    const int count = static_cast<int>(flow.steps.size());
    for (int i = count - 1; i >= 0; --i) {
      const int index = g_.inverse ? count - 1 - i : i;
      const Step& step = flow.steps[index];
      StepJob job = this->job(this->plans_[index], undo ? step.from_after : step.from_before);
      job.grad = grad_.data();
      job.log_det = log_det.data();
      job.back = back_.data();
      job.segments = segments_.data();
      job.slabs = slabs_.data();
      job.saved = const_cast<void*>(g_.saved);
      job.saved_width = saved_width;
      job.store = g_.keep.store;
      job.grads = grads_.data();
      job.grads_ld = stride(job.plan->grads);
      job.record_ld = stored_in_place() ? saved_width : stride(job.plan->record);
      job.cond_by_row =
          g_.grad_cond &&
          (this->rows_.by_row ||
           this->rows_.chunks.back().first_image + this->rows_.chunks.back().images != g_.images);
      job.grad_weights = g_.grad_weights;
      if (g_.keep.every > 0 && i % g_.keep.every == 0)
        job.state_at = i / g_.keep.every * std::int64_t(flow.dim);
      step_backward(job);
    }
    this->store(grad_, undo ? flow.first_slot : flow.last_latent, static_cast<T*>(g_.grad_input));
  }

 private:
  struct Part {  // of a target, or of the condition's gradient
    const Target* target;
    std::int64_t begin, end;
  };

  void step_backward(StepJob& job) {
    const StepPlan& plan = *job.plan;
    const auto& kernels = this->kernels_;
    const int threads = this->threads_;
    const auto hoists = this->hoists(plan);
    const auto transposes = this->transposes(plan);
    const auto size = [](const auto& v) { return static_cast<std::int64_t>(v.size()); };
    for (const auto& chunk : this->rows_.chunks) {
      this->enter(job, chunk);
      const bool first = &chunk == &this->rows_.chunks.front(),
                 last = &chunk == &this->rows_.chunks.back();
      job.add = !first;
      job.grad_cond = g_.grad_cond;
      if (g_.grad_cond && !job.cond_by_row)
        job.grad_cond =
            static_cast<T*>(g_.grad_cond) + chunk.first_image * std::int64_t(this->flow_.cond_dim);
      const std::int64_t packs = first ? size(transposes) : 0;
      for_each(threads, packs + size(hoists), [&](std::int64_t i) {
        if (i < packs)
          return kernels.transpose(transposes[i].what, job.packed, back_.data(),
                                   transposes[i].block);
        const auto& h = hoists[i - packs];
        kernels.hoist(job, *h.matrix, h.gate, h.block);
      });
      const std::int64_t slabs = this->slabs(job);
      const std::int64_t batch = plan.wide ? this->rows_.batch_slabs : slabs;
      for (std::int64_t begin = 0; begin < slabs; begin += batch) {
        enter_batch(job, begin, std::min(begin + batch, slabs));
        for_each(threads, std::min(batch, slabs - begin),
                 [&](std::int64_t i) { kernels.backward(job, begin + i); });
        if (plan.wide) sum_rows(job, first && begin == 0);
      }
      job.started = std::max(job.started, slabs);

      constexpr std::int64_t kReduced = 4096;  // numbers at a time
      const std::int64_t images = plan.hoisted_width > 0 ? chunk.images : 0;
      const std::int64_t reduced = last ? (plan.slab_numbers + kReduced - 1) / kReduced : 0;
      for_each(threads, images + reduced, [&](std::int64_t i) {
        if (i < images)
          return kernels.combine(job, i, this->rows_.segments_of.data() + chunk.first_image);
        const std::int64_t begin = (i - images) * kReduced;
        kernels.reduce(job, begin, std::min(begin + kReduced, plan.slab_numbers),
                       this->rows_.slabs);
      });

      std::vector<Part> parts;
      for (const Target& t : plan.targets) {
        const bool cond =
            t.from == Target::From::cond_matrix || t.from == Target::From::cond_vector;
        if (t.from == Target::From::rows || (!cond && !last)) continue;
        for (int begin = 0; begin < t.rows; begin += kTargetRows)
          parts.push_back({&t, begin, std::min(begin + kTargetRows, t.rows)});
      }
      if (g_.grad_cond && !job.cond_by_row && plan.hoisted_width > 0) {
        const int blocks = cond_blocks(plan);
        for (std::int64_t image = 0; image < chunk.images; image += 48)
          for (int b = 0; b < blocks; ++b) parts.push_back({nullptr, image, b});
      }
      for_each(threads, size(parts), [&](std::int64_t i) {
        const Part& p = parts[i];
        if (p.target)
          kernels.write(job, *p.target, static_cast<int>(p.begin), static_cast<int>(p.end));
        else
          kernels.cond_grad(job, p.begin, static_cast<int>(p.end));
      });
    }
  }

  static std::ptrdiff_t stride(int width) { return odd_lines(width, sizeof(T)); }
  // Whether steps read the records where the pass has stored them.
  bool stored_in_place() const { return g_.keep.store && this->rows_.order.empty(); }

  void enter_batch(StepJob& job, std::int64_t begin, std::int64_t end) const {
    job.batch_first = job.first + begin * job.slab_rows;
    job.batch_rows = std::min(end * job.slab_rows, job.rows) - begin * job.slab_rows;
    job.records = records_.data();
    if (stored_in_place())
      job.records =
          static_cast<T*>(job.saved) + job.batch_first * job.saved_width + job.plan->record_at;
  }

  // The gradients of weights, over the rows of a batch.
  void sum_rows(StepJob& job, bool first) {
    std::vector<Part> parts;
    for (const Target& t : job.plan->targets)
      if (t.from == Target::From::rows)
        for (int begin = 0; begin < t.rows; begin += kSummedRows)
          parts.push_back({&t, begin, std::min(begin + kSummedRows, t.rows)});
    const bool add = job.add;
    job.add = !first;
    for_each(this->threads_, static_cast<std::int64_t>(parts.size()), [&](std::int64_t i) {
      const Part& p = parts[i];
      this->kernels_.sum_rows(job, *p.target, static_cast<int>(p.begin), static_cast<int>(p.end));
    });
    job.add = add;
  }

  static int cond_blocks(const StepPlan& plan) {
    for (const NetPlan& net : plan.nets)
      for (const LayerPlan& layer : net.layers) {
        if (layer.cond_back) return layer.cond_back->blocks;
        if (layer.gate_back) return layer.gate_back->blocks;
      }
    return 0;
  }

  struct Transposes {
    Transpose what;
    int block;
  };
  std::vector<Transposes> transposes(const StepPlan& plan) const {
    std::vector<Transposes> found;
    const auto add = [&](const Matrix& matrix, const Matrix& back, int first) {
      for (int b = 0; b < back.blocks; ++b) found.push_back({{&matrix, &back, first}, b});
    };
    for (const NetPlan& net : plan.nets)
      for (const LayerPlan& layer : net.layers) {
        const Matrix& m = layer.dense.matrix;
        if (m.in > 0) add(m, layer.back, m.cond_padded);
        if (layer.cond_back) add(m, *layer.cond_back, 0);
        if (layer.gate_back) add(*layer.dense.gate, *layer.gate_back, 0);
      }
    if (!plan.coupling && !plan.diagonal) add(*plan.linear, plan.linear_back, 0);
    return found;
  }

  const Gradient& g_;
  Memory grad_, slabs_, segments_, back_, records_, grads_;
};

template <class T>
void run_stored(const Call& call, Keep keep, void* saved) {
  const auto* cond = static_cast<const T*>(call.cond);
  Images images = find_images(*call.flow, call.images, call.per_image, cond);
  Planner planner(*call.flow, call.inverse, keep, images.by_row, nullptr, false);
  std::vector<StepPlan> plans = planner.steps();
  Rows rows = arrange(*call.flow, plans, std::move(images), cond);
  Forward<T>(*call.flow, call.packed, call.inverse, call.threads, std::move(plans), std::move(rows))
      .run(call, keep, static_cast<T*>(saved), planner.saved());
}

template <class T>
void backward(const Gradient& g) {
  const Flow& flow = *g.flow;
  const auto* cond = static_cast<const T*>(g.cond);
  Images images = find_images(flow, g.images, g.per_image, cond);
  Planner planner(flow, g.inverse, g.keep, images.by_row, &g.wanted, g.grad_cond);
  std::vector<StepPlan> plans = planner.steps();
  if (g.grad_cond)
    std::fill_n(static_cast<T*>(g.grad_cond), g.images * std::int64_t(flow.cond_dim), T(0));
  if (g.images * g.per_image == 0) {
    std::fill_n(static_cast<T*>(g.grad_weights), planner.grad_numbers(), T(0));
    return;
  }
  Rows rows = arrange(flow, plans, std::move(images), cond);
  Backward<T>(g, std::move(plans), std::move(rows)).run(planner.saved());
}

void check(const Flow& flow) {
  if (flow.element == Element::bf16)
    throw std::invalid_argument("flow: bf16 weights have no gradient");
  if (flow.lanes != lanes(flow.element))
    throw std::invalid_argument("flow: packed for another SIMD level than the one in use");
}

}  // namespace

std::int64_t saved_width(const Flow& flow, Keep keep) {
  Planner planner(flow, false, keep, false, nullptr, false);
  planner.steps();
  return planner.saved();
}

void run(Call call, Keep keep, void* saved) {
  if (keep.store) {
    check(*call.flow);
    if (call.images * call.per_image == 0) return;
    return call.flow->element == Element::f64 ? run_stored<double>(call, keep, saved)
                                              : run_stored<float>(call, keep, saved);
  }
  if (states(*call.flow, keep) > 0) {
    call.keep_every = keep.every;
    call.states = saved;
    call.states_ld = states(*call.flow, keep) * call.flow->dim;
  }
  run(call);
}

void backward(const Gradient& gradient) {
  check(*gradient.flow);
  if (gradient.flow->element == Element::f64)
    backward<double>(gradient);
  else
    backward<float>(gradient);
}

}  // namespace coupling
}  // namespace fasthyp
