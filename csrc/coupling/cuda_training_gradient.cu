// The gradient of a pass in training: the steps from the output, in each the subnets from their
// results.
#include "coupling/cuda_gradients.h"
#include "coupling/cuda_training_engine.h"

namespace fasthyp::coupling::cuda::training {
namespace {

class Backward : Engine {
 public:
  using Engine::Engine;

  void run(const Gradient& gradient) {
    place_gradients(gradient);
    if (gradient.grad_cond) zero(gradient.grad_cond, call_.images * plan_.cond_dim);
    grad_cond_ = gradient.grad_cond;
    if (all_ == 0) return zero(gradient.grad_weights, wanted_numbers_);
    for (const Step& step : plan_.steps)
      if (const auto* l = std::get_if<Linear>(&step))
        for (int i = 0; i < 2; ++i) {  // the pair that the pass has not read
          const int tensor = l->weight + (call_.inverse ? 0 : 2) + i;
          if (grads_[tensor]) zero(grads_[tensor], plan_.counts[tensor]);
        }
    send_slots();
    for (Round round(*this); begin(round);) {
      const std::int64_t at = first_row_ * plan_.dim;
      saved_ = const_cast<float*>(gradient.saved);  // read only, below
      const int* order = call_.inverse ? nullptr : slots(0);
      exchange(gradient.output + at, nullptr, state_, order);
      exchange(gradient.grad_output + at, nullptr, grad_, order);
      for (int p = step_count() - 1; p >= 0; --p) {
        const float* kept = kept_state(p);
        if (kept) keep(kept, width_, state_, plan_.dim);
        const Step& step = plan_.steps[number(p)];
        if (const auto* c = std::get_if<Coupling>(&step))
          coupling_gradient(*c, number(p), kept != nullptr, gradient.grad_log_det);
        else
          linear_gradient(std::get<Linear>(step), kept != nullptr);
      }
      exchange(grad_, call_.inverse ? slots(0) : nullptr, gradient.grad_input + at, nullptr);
    }
  }

 private:
  void place_gradients(const Gradient& gradient) {
    if (gradient.wanted.size() != plan_.counts.size())
      throw std::invalid_argument("wanted: expected one for each of the weights");
    float* at = gradient.grad_weights;
    for (std::size_t i = 0; i < plan_.counts.size(); ++i) {
      grads_.push_back(gradient.wanted[i] ? at : nullptr);
      if (gradient.wanted[i]) at += plan_.counts[i];
    }
    wanted_numbers_ = at - gradient.grad_weights;
  }
  float* grad(int tensor) const { return tensor < 0 ? nullptr : grads_[tensor]; }

  void linear_gradient(const Linear& l, bool from_input) {
    if (!from_input) linear(l, !call_.inverse);  // the state is the step's input now
    const int tensor = l.weight + (call_.inverse ? 2 : 0);
    if (l.diagonal) {
      column_sums(grad_, plan_.dim, state_, plan_.dim, plan_.dim, grad(tensor));
      column_sums(grad_, plan_.dim, nullptr, 0, plan_.dim, grad(tensor + 1));
      return check(
          launch_scale({grad_, weight(tensor), nullptr, grad_, rows_, plan_.dim}, stream_));
    }
    weight_gradient({grad_, plan_.dim}, plan_.dim, {state_, plan_.dim}, plan_.dim, rows_,
                    grad(tensor), grad(tensor + 1), Precision::tf32x3);
    Gemm gemm{};
    gemm.a = {grad_, plan_.dim};
    gemm.b = {weight(tensor), plan_.dim};
    gemm.m = rows_;
    gemm.n = gemm.k = plan_.dim;
    gemm.out = grad_other_;
    gemm.out_stride = plan_.dim;
    product(Form::input, gemm, Precision::tf32x3);
    std::swap(grad_, grad_other_);
  }

  void coupling_gradient(const Coupling& c, int step, bool from_input, const float* grad_log_det) {
    if (call_.keep.store) {
      place_values(step);
      hoist(c, true);
    } else {
      values(c, step);
    }
    Couple couple = couple_of(c);
    couple.from_input = from_input;
    couple.grad = grad_;
    couple.grad_log_det = grad_log_det ? grad_log_det + first_row_ : nullptr;
    couple.grad_raw = at_workspace(layout_.at_grad_raw);
    couple.grad_raw_stride = layout_.raw;
    check(launch_couple(couple, true, stream_));
    for (std::size_t n = 0; n < c.nets.size(); ++n) net_gradient(c, n);
  }

  // From the gradient of a subnet's results to those of its weights and of what it has read.
  void net_gradient(const Coupling& c, std::size_t n) {
    const Net& net = c.nets[n];
    float* g = at_workspace(layout_.at_grad_raw) + net.raw_at;
    std::int64_t stride = layout_.raw;
    bool pending = false;  // there is a gradient of what was kept
    const int last = static_cast<int>(net.layers.size()) - 1;
    for (int l = last; l >= 0; --l) {
      const Dense& d = net.layers[l];
      const Places& p = current_->nets[n][l];
      if (l == last && d.activate) {
        Through through = through_of(d, g, stride);
        through.derivative = derivative_values(net, p);
        through.activation = net.activation;
        through.slope = net.slope;
        check(launch_through(through, stream_));
      }
      if (!d.plain()) special_gradient(d, p, g, stride, pending);
      const bool needs_sums = d.cond_weight >= 0 && (grad(d.cond_weight) || grad_cond_);
      if (needs_sums && grad(d.weight) && whole_images() &&
          split_by_image(d, layout_.images, call_.per_image)) {
        const Operand sums = weight_gradient_by_image(d, {g, stride}, input_of(c, n, l));
        cond_gradient(sums, d, d.cond_weight, d.bias);
      } else {
        weight_gradient({g, stride}, d.out, input_of(c, n, l), d.in, rows_, grad(d.weight),
                        grad(d.bias), call_.precision);
        if (needs_sums)
          cond_gradient(image_sums(d, g, stride, nullptr, nullptr), d, d.cond_weight, -1);
      }
      Gemm gemm{};
      gemm.a = {g, stride};
      gemm.b = {weight(d.weight), d.in};
      gemm.m = rows_;
      gemm.n = d.in;
      gemm.k = d.out;
      if (l == 0) {  // added to the gradient of the passive slots
        gemm.out = grad_;
        gemm.out_stride = plan_.dim;
        gemm.out_index = slots(c.passive_at);
        if (c.passive > 0) product(Form::input, gemm, call_.precision);
        break;
      }
      if (net.layers[l - 1].activate) {
        gemm.derivative = derivative_values(net, current_->nets[n][l - 1]);
        gemm.value_stride = value_stride_;
        gemm.activation = net.activation;
        gemm.slope = net.slope;
      }
      g = at_workspace(layout_.at_grad_hidden[l % 2]);
      stride = layout_.hidden;
      gemm.out = g;
      gemm.out_stride = stride;
      product(Form::input, gemm, call_.precision);
    }
  }

  const float* derivative_values(const Net& net, const Places& p) const {
    return value(derivative_of_result(net.activation, net.slope) ? p.result : p.before_activation);
  }

  Through through_of(const Dense& d, float* g, std::int64_t stride) const {
    Through through{};
    through.grad = g;
    through.stride = stride;
    through.rows = rows_;
    through.columns = d.out;
    through.value_stride = value_stride_;
    return through;
  }

  // Back through norm, keep, add and gate.
  void special_gradient(const Dense& d, const Places& p, float* g, std::int64_t stride,
                        bool& pending) {
    if (d.scale >= 0) {
      column_sums(g, stride, value(p.before_norm), value_stride_, d.out, grad(d.scale));
      column_sums(g, stride, nullptr, 0, d.out, grad(d.shift));
    }
    const bool takes = d.keep && pending;
    if (d.scale >= 0 || takes || d.add) {
      Through through = through_of(d, g, stride);
      through.scale = weight(d.scale);
      through.kept = takes || d.add ? at_workspace(layout_.at_grad_kept) : nullptr;
      through.kept_stride = d.out;
      through.take_kept = takes;
      through.give_kept = d.add;
      through.add_kept = pending && !d.keep;
      check(launch_through(through, stream_));
    }
    if (d.keep) pending = false;
    if (d.add) pending = true;
    if (d.gate_weight < 0) return;
    if (grad(d.gate_weight) || grad(d.gate_bias) || grad_cond_)
      cond_gradient(image_sums(d, g, stride, value(p.before_gate), hoisted(p.gate)), d,
                    d.gate_weight, d.gate_bias);
    Through through = through_of(d, g, stride);
    through.gate = hoisted(p.gate);
    through.gate_stride = layout_.hoisted;
    through.images = images_;
    check(launch_through(through, stream_));
  }

  // weight (m, n) += a^T b, bias (m) += column sums of a, over k rows; null: not wanted.
  void weight_gradient(const Operand& a, int m, const Operand& b, int n, int k, float* weight,
                       float* bias, Precision precision) const {
    if (!weight && !bias) return;
    if (!weight) n = 0;
    const Parts parts(m, n, k);
    Gemm gemm{};
    gemm.a = a;
    gemm.b = b;
    gemm.m = m;
    gemm.n = n;
    gemm.k = k;
    gemm.part = parts.length;
    gemm.parts = parts.count;
    gemm.out_stride = n;
    const std::int64_t numbers = std::int64_t{m} * n;
    if (parts.count == 1) {
      gemm.out = weight;
      gemm.sums = bias;
      gemm.accumulate = accumulate_;
      return product(Form::weight, gemm, precision);
    }
    float* partial = at_workspace(layout_.at_partial);
    gemm.out = partial;
    gemm.sums = bias ? partial + numbers : nullptr;
    gemm.part_numbers = gemm.part_sums = numbers + (bias ? m : 0);
    product(Form::weight, gemm, precision);
    check(launch_reduce(
        {partial, 1, parts.count, gemm.part_numbers, numbers, weight, bias, accumulate_}, stream_));
  }

  bool whole_images() const {
    return first_row_ % call_.per_image == 0 && rows_ % call_.per_image == 0;
  }

  // weight += a^T b, in parts of an image each; returns the column sums of a for each image.
  Operand weight_gradient_by_image(const Dense& d, const Operand& a, const Operand& b) const {
    Gemm gemm{};
    gemm.a = a;
    gemm.b = b;
    gemm.m = d.out;
    gemm.n = d.in;
    gemm.k = rows_;
    gemm.part = static_cast<int>(call_.per_image);
    gemm.parts = image_count_;
    gemm.out = at_workspace(layout_.at_partial);
    gemm.out_stride = d.in;
    gemm.part_numbers = std::int64_t{d.out} * d.in;
    gemm.sums = at_workspace(layout_.at_image_grad);
    gemm.part_sums = d.out;
    product(Form::weight, gemm, call_.precision);
    check(launch_reduce({gemm.out, 1, image_count_, gemm.part_numbers, gemm.part_numbers,
                         grad(d.weight), nullptr, accumulate_},
                        stream_));
    return {gemm.sums, d.out};
  }

  void column_sums(const float* from, std::int64_t stride, const float* times,
                   std::int64_t times_stride, int columns, float* to) const {
    if (!to) return;
    ImageSums sums{};
    sums.from = from;
    sums.stride = stride;
    sums.times = times;
    sums.times_stride = times_stride;
    sums.rows = rows_;
    sums.columns = columns;
    sums.images = {rows_, 1};
    sums.image_count = 1;
    sums.pieces = pieces_of(rows_);
    sums.to = at_workspace(layout_.at_partial);
    check(launch_image_sums(sums, stream_));
    check(launch_reduce({sums.to, 1, sums.pieces, columns, columns, to, nullptr, accumulate_},
                        stream_));
  }

  // The gradient of what a layer takes from the condition, summed over each image's rows.
  Operand image_sums(const Dense& d, const float* g, std::int64_t stride, const float* times,
                     const float* gate) const {
    if (call_.per_image == 1 && !times) return {g, stride};
    float* result = at_workspace(layout_.at_image_grad);
    ImageSums sums{};
    sums.from = g;
    sums.stride = stride;
    sums.times = times;
    sums.times_stride = value_stride_;
    sums.gate = gate;
    sums.gate_stride = layout_.hoisted;
    sums.rows = rows_;
    sums.columns = d.out;
    sums.images = images_;
    sums.image_count = image_count_;
    sums.pieces = layout_.pieces;
    sums.to = sums.pieces == 1 ? result : at_workspace(layout_.at_partial);
    check(launch_image_sums(sums, stream_));
    if (sums.pieces > 1)
      check(launch_reduce(
          {sums.to, image_count_, sums.pieces, d.out, d.out, result, nullptr, false}, stream_));
    return {result, d.out};
  }

  // From such sums to the gradients of the weight, the bias and the condition itself.
  void cond_gradient(const Operand& sums, const Dense& d, int weight_, int bias) const {
    const std::int64_t at = first_image_ * plan_.cond_dim;
    weight_gradient(sums, d.out, {call_.cond + at, plan_.cond_dim}, plan_.cond_dim, image_count_,
                    grad(weight_), grad(bias), call_.precision);
    if (!grad_cond_) return;
    Gemm gemm{};
    gemm.a = sums;
    gemm.b = {weight(weight_), plan_.cond_dim};
    gemm.m = image_count_;
    gemm.n = plan_.cond_dim;
    gemm.k = d.out;
    gemm.out = grad_cond_ + at;
    gemm.out_stride = plan_.cond_dim;
    gemm.accumulate = true;
    product(Form::input, gemm, call_.precision);
  }

  std::vector<float*> grads_;
  std::int64_t wanted_numbers_ = 0;
  float* grad_cond_ = nullptr;
};

}  // namespace

void run(const Call& call, const Gradient& gradient, int device, void* stream) {
  const DeviceGuard guard(device);
  Backward(call, true, device, stream).run(gradient);
}

}  // namespace fasthyp::coupling::cuda::training
