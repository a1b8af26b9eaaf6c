// The rounds of rows of a flow in training, and the launches that a pass and its gradient share.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/cuda_device.h"
#include "common/simt.h"
#include "coupling/coupling.h"
#include "coupling/cuda_training.h"
#include "coupling/cuda_training_layout.h"

namespace fasthyp::coupling::cuda::training {

class Engine {
 public:
  Engine(const Call& call, bool gradient, int device, void* stream)
      : call_(call),
        plan_(*call.plan),
        layout_(plan_, call.images, call.per_image, call.keep, gradient, call.scratch),
        device_(device),
        stream_(stream),
        all_(call.images * call.per_image),
        width_(saved_width(plan_, call.keep)) {
    if (call.weights.size() != plan_.counts.size())
      throw std::invalid_argument("weights: expected " + std::to_string(plan_.counts.size()) +
                                  " tensors, got " + std::to_string(call.weights.size()));
    for (std::size_t i = 0; i < plan_.counts.size(); ++i)
      if (call.weights[i].count != plan_.counts[i])
        throw std::invalid_argument("weights[" + std::to_string(i) + "]: expected " +
                                    std::to_string(plan_.counts[i]) + " numbers, got " +
                                    std::to_string(call.weights[i].count));
    if (all_ > 0 && call.workspace_bytes < layout_.total)
      throw std::invalid_argument("coupling pass: workspace too small");
    for (const Step& step : plan_.steps) {
      const auto* c = std::get_if<Coupling>(&step);
      places_.push_back(c ? places_of(*c, gradient || call.keep.store) : CouplingPlaces{});
    }
    int at = static_cast<int>(plan_.steps.size()) * up4(plan_.dim);
    for (const CouplingPlaces& places : places_) {
      stored_at_.push_back(at);
      at += places.width;
    }
    state_ = at_workspace(layout_.at_state);
    other_ = at_workspace(layout_.at_other);
    grad_ = at_workspace(layout_.at_grad);
    grad_other_ = at_workspace(layout_.at_grad_other);
  }

 protected:
  struct Round {
    explicit Round(const Engine& engine) : left(engine.all_) {}
    std::int64_t first = 0, left;
  };

  // Turns to the next rows, if there are any.
  bool begin(Round& round) {
    if (round.left == 0) return false;
    rows_ = static_cast<int>(std::min(layout_.rows, round.left));
    first_row_ = round.first;
    accumulate_ = round.first > 0;
    const std::int64_t per_image = call_.per_image;
    first_image_ = first_row_ / per_image;
    image_count_ = static_cast<int>((first_row_ + rows_ - 1) / per_image - first_image_ + 1);
    constexpr std::int64_t kMost = std::numeric_limits<int>::max();
    images_.lead = static_cast<int>(std::min((first_image_ + 1) * per_image - first_row_, kMost));
    images_.per = static_cast<int>(std::min(per_image, kMost));
    round.first += rows_;
    round.left -= rows_;
    return true;
  }

  // --- memory ---

  float* at_workspace(std::int64_t offset) const {
    return reinterpret_cast<float*>(call_.workspace + offset);
  }
  const int* slots(int at) const {
    return reinterpret_cast<const int*>(call_.workspace + layout_.at_slots) + at;
  }
  const float* weight(int tensor) const { return tensor < 0 ? nullptr : call_.weights[tensor].at; }
  int step_count() const { return static_cast<int>(plan_.steps.size()); }
  // The step that a pass takes as its p-th.
  int number(int p) const { return call_.inverse ? step_count() - 1 - p : p; }

  // Where the state before the p-th step of the pass is kept, for the rows of the round; or null.
  float* kept_state(int p) const {
    int at = p;
    if (!call_.keep.store) {
      if (call_.keep.every <= 0 || p % call_.keep.every != 0) return nullptr;
      at = p / call_.keep.every;
    }
    return saved_ + first_row_ * width_ + std::int64_t{at} * up4(plan_.dim);
  }

  // The values of a coupling: in what the pass stores, or in the workspace.
  void place_values(int step) {
    current_ = &places_[step];
    if (call_.keep.store) {
      values_ = saved_ + first_row_ * width_ + stored_at_[step];
      value_stride_ = width_;
    } else {
      values_ = at_workspace(layout_.at_values);
      value_stride_ = layout_.values;
    }
  }
  float* value(int place) const { return place < 0 ? nullptr : values_ + place; }
  const float* hoisted(int place) const {
    return place < 0 ? nullptr : at_workspace(layout_.at_hoisted) + place;
  }

  // --- small launches ---

  cudaStream_t on() const { return static_cast<cudaStream_t>(stream_); }
  void check(int error) const {
    check_cuda(error,
               "coupling pass of " + std::to_string(plan_.dim) + " dims, " +
                   std::to_string(call_.images) + " images, " + std::to_string(call_.per_image) +
                   " rows each",
               device_);
  }
  void zero(float* at, std::int64_t numbers) const {
    if (numbers > 0) check(cudaMemsetAsync(at, 0, static_cast<std::size_t>(numbers) * 4, on()));
  }
  // As arguments of launches, which a captured graph keeps.
  void send_slots() const {
    auto* to = reinterpret_cast<int*>(call_.workspace + layout_.at_slots);
    const auto count = static_cast<int>(plan_.slots.size());
    for (int at = 0; at < count; at += kSlotInts) {
      Slots slots{};
      const int part = std::min(count - at, kSlotInts);
      std::copy_n(plan_.slots.data() + at, part, slots.v);
      check(launch_slots(slots, to + at, part, stream_));
    }
  }
  void exchange(const float* from, const int* from_index, float* to, const int* to_index) const {
    check(launch_move({from, plan_.dim, from_index, to, plan_.dim, to_index, rows_, plan_.dim},
                      stream_));
  }
  void keep(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride) const {
    check(launch_move({from, from_stride, nullptr, to, to_stride, nullptr, rows_, plan_.dim},
                      stream_));
  }
  void product(Form form, Gemm gemm, Precision precision) const {
    if (gemm.parts == 1) gemm.part = gemm.k;
    check(launch_gemm(form, gemm, precision, device_, stream_));
  }

  // --- passes ---

  // The condition's part of the first layers, and of gates; what is not gates may be left out.
  void hoist(const Coupling& c, bool gates_only) const {
    const auto sums = [&](int place, int weight_, int bias, int out) {
      if (place < 0) return;
      Gemm gemm{};
      gemm.a = {call_.cond + first_image_ * plan_.cond_dim, plan_.cond_dim};
      gemm.b = {weight(weight_), plan_.cond_dim};
      gemm.m = image_count_;
      gemm.n = out;
      gemm.k = plan_.cond_dim;
      gemm.bias = weight(bias);
      gemm.out = const_cast<float*>(hoisted(place));
      gemm.out_stride = layout_.hoisted;
      product(Form::layer, gemm, call_.precision);
    };
    for (std::size_t n = 0; n < c.nets.size(); ++n)
      for (std::size_t l = 0; l < c.nets[n].layers.size(); ++l) {
        const Dense& d = c.nets[n].layers[l];
        const Places& p = current_->nets[n][l];
        if (!gates_only) sums(p.hoisted, d.cond_weight, d.bias, d.out);
        sums(p.gate, d.gate_weight, d.gate_bias, d.out);
      }
  }

  // All that the subnets of a coupling compute.
  void values(const Coupling& c, int step) {
    place_values(step);
    hoist(c, false);
    for (std::size_t n = 0; n < c.nets.size(); ++n) {
      const Net& net = c.nets[n];
      int kept = -1;
      for (std::size_t l = 0; l < net.layers.size(); ++l) {
        const Dense& d = net.layers[l];
        const Places& p = current_->nets[n][l];
        Gemm gemm{};
        gemm.a = input_of(c, n, l);
        gemm.b = {weight(d.weight), d.in};
        gemm.m = rows_;
        gemm.n = d.out;
        gemm.k = d.in;
        gemm.bias = p.hoisted < 0 ? weight(d.bias) : nullptr;
        gemm.hoisted = hoisted(p.hoisted);
        gemm.gate = hoisted(p.gate);
        gemm.hoisted_stride = layout_.hoisted;
        gemm.images = images_;
        gemm.value_stride = value_stride_;
        gemm.before_gate = value(p.before_gate);
        gemm.kept = d.add ? value(kept) : nullptr;
        gemm.before_norm = value(p.before_norm);
        gemm.scale = weight(d.scale);
        gemm.shift = weight(d.shift);
        gemm.before_activation = value(p.before_activation);
        gemm.activation = d.activate ? net.activation : -1;
        gemm.slope = net.slope;
        gemm.out = value(p.result);
        gemm.out_stride = value_stride_;
        product(Form::layer, gemm, call_.precision);
        if (d.keep) kept = p.before_norm;
      }
    }
  }

  // What layer l of net n reads.
  Operand input_of(const Coupling& c, std::size_t n, std::size_t l) const {
    if (l == 0) return {state_, plan_.dim, slots(c.passive_at)};
    return {value(current_->nets[n][l - 1].result), value_stride_};
  }

  Couple couple_of(const Coupling& c) const {
    Couple couple{};
    couple.state = state_;
    couple.rows = rows_;
    couple.dim = plan_.dim;
    couple.slots = slots(c.active_at);
    couple.active = c.active;
    couple.raw = values_;
    couple.raw_stride = value_stride_;
    couple.shift_at = c.kind == static_cast<int>(Kind::additive) ? 0 : c.active;
    couple.kind = c.kind;
    couple.clamp_kind = c.clamp_kind;
    couple.clamp = c.clamp;
    couple.inverse = call_.inverse;
    return couple;
  }

  // The state through a linear step. Its products are those of float32 always.
  void linear(const Linear& l, bool inverse) {
    const float *w = weight(l.weight + (inverse ? 2 : 0)),
                *shift = weight(l.weight + (inverse ? 3 : 1));
    if (l.diagonal)
      return check(launch_scale({state_, w, shift, state_, rows_, plan_.dim}, stream_));
    Gemm gemm{};
    gemm.a = {state_, plan_.dim};
    gemm.b = {w, plan_.dim};
    gemm.m = rows_;
    gemm.n = gemm.k = plan_.dim;
    gemm.bias = shift;
    gemm.out = other_;
    gemm.out_stride = plan_.dim;
    product(Form::layer, gemm, Precision::tf32x3);
    std::swap(state_, other_);
  }

  const Call& call_;
  const Plan& plan_;
  const Layout layout_;
  int device_;
  void* stream_;
  std::int64_t all_, width_;
  std::vector<CouplingPlaces> places_;
  std::vector<int> stored_at_;  // columns of the values among what a pass stores
  float *state_, *other_, *grad_, *grad_other_;
  float* saved_ = nullptr;
  // the round
  int rows_ = 0, image_count_ = 0;
  std::int64_t first_row_ = 0, first_image_ = 0;
  Images images_{};
  bool accumulate_ = false;  // gradients of weights have shares of earlier rounds
  // the coupling
  const CouplingPlaces* current_ = nullptr;
  float* values_ = nullptr;
  std::int64_t value_stride_ = 0;
};

}  // namespace fasthyp::coupling::cuda::training
