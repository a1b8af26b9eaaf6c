#include "coupling/training.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "common/cpu_features.h"
#include "common/thread_pool.h"
#include "coupling/training_plan.h"
#include "coupling/training_rows.h"

namespace fasthyp {

FASTHYP_PER_SIMD_LEVEL(coupling::TrainingKernels, coupling_training_kernels)

namespace coupling {
namespace {

// Rows of an odd number of cache lines: a column of them is spread over all sets of a cache.
std::int64_t odd_lines(std::int64_t width, std::size_t number_bytes) {
  const auto line = static_cast<std::int64_t>(64 / number_bytes);
  return ((width + line - 1) / line | 1) * line;
}

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
  Plans plans = plan_steps(*call.flow, call.inverse, keep, images.by_row, nullptr, false);
  Rows rows = arrange(*call.flow, plans.steps, std::move(images), cond);
  Forward<T>(*call.flow, call.packed, call.inverse, call.threads, std::move(plans.steps),
             std::move(rows))
      .run(call, keep, static_cast<T*>(saved), plans.saved);
}

template <class T>
void backward(const Gradient& g) {
  const Flow& flow = *g.flow;
  const auto* cond = static_cast<const T*>(g.cond);
  Images images = find_images(flow, g.images, g.per_image, cond);
  Plans plans = plan_steps(flow, g.inverse, g.keep, images.by_row, &g.wanted, g.grad_cond);
  if (g.grad_cond)
    std::fill_n(static_cast<T*>(g.grad_cond), g.images * std::int64_t(flow.cond_dim), T(0));
  if (g.images * g.per_image == 0) {
    std::fill_n(static_cast<T*>(g.grad_weights), plans.grad_numbers, T(0));
    return;
  }
  Rows rows = arrange(flow, plans.steps, std::move(images), cond);
  Backward<T>(g, std::move(plans.steps), std::move(rows)).run(plans.saved);
}

void check(const Flow& flow) {
  if (flow.element == Element::bf16)
    throw std::invalid_argument("flow: bf16 weights have no gradient");
  if (flow.lanes != lanes(flow.element))
    throw std::invalid_argument("flow: packed for another SIMD level than the one in use");
}

}  // namespace

std::int64_t saved_width(const Flow& flow, Keep keep) {
  return plan_steps(flow, false, keep, false, nullptr, false).saved;
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
