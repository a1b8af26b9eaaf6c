#include "coupling/training_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace fasthyp::coupling {

namespace {

// Weight gradients that every tile of rows can add to.
constexpr std::int64_t kCachedBytes = std::int64_t(1) << 20;

std::size_t number_size(Element e) { return e == Element::f64 ? 8 : 4; }

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

  Plans plans() {
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
    return {std::move(plans), saved_, target_};
  }

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

}  // namespace

std::int64_t states(const Flow& flow, Keep keep) {
  const auto steps = static_cast<std::int64_t>(flow.steps.size());
  return keep.every > 0 ? (steps + keep.every - 1) / keep.every : 0;
}

Plans plan_steps(const Flow& flow, bool inverse, Keep keep, bool by_row,
                 const std::vector<bool>* wanted, bool cond_wanted) {
  return Planner(flow, inverse, keep, by_row, wanted, cond_wanted).plans();
}

}  // namespace fasthyp::coupling
