// The plan of a flow in training, its workspace, and the launches of a pass and of its gradient.
#include "coupling/cuda_training.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/cuda_device.h"
#include "common/simt.h"
#include "coupling/cuda_gradients.h"
#include "coupling/plan.h"

namespace fasthyp::coupling::cuda::training {
namespace {

// Rows begin at multiples of 16 bytes, for copies of that size.
constexpr int up4(int n) { return (n + 3) / 4 * 4; }

class PlanParser {
 public:
  explicit PlanParser(std::span<const std::int64_t> numbers) : in_(numbers) {}

  Plan plan() {
    plan_.dim = in_.integer("dim", 1, kMaxWidth);
    plan_.cond_dim = in_.integer("cond_dim", 0, kMaxWidth);
    in_.integer("element", 0, 0);
    in_.integer("lanes", 1, 64);
    const int steps = in_.integer("number of steps", 0, 1 << 16);
    if (slots(plan_.dim) != 0 || !distinct(0))
      throw std::invalid_argument("flow plan: output index is no permutation");
    for (int i = 0; i < steps; ++i) {
      if (in_.flag("step type"))
        plan_.steps.emplace_back(linear());
      else
        plan_.steps.emplace_back(coupling());
    }
    if (!in_.done()) throw std::invalid_argument("flow plan: too long");
    return std::move(plan_);
  }

 private:
  int slots(int count) {
    const auto at = static_cast<int>(plan_.slots.size());
    for (int i = 0; i < count; ++i) plan_.slots.push_back(in_.integer("slot", 0, plan_.dim - 1));
    return at;
  }
  // The slots from there on.
  bool distinct(int from) const {
    return coupling::distinct({plan_.slots.begin() + from, plan_.slots.end()});
  }
  int tensor(std::int64_t rows, std::int64_t columns = 1) {
    plan_.counts.push_back(rows * columns);
    return static_cast<int>(plan_.counts.size()) - 1;
  }

  Coupling coupling() {
    Coupling c{};
    c.active = in_.integer("active count", 1, plan_.dim);
    c.passive = in_.integer("passive count", 0, plan_.dim);
    c.kind = in_.integer("kind", 0, 2);
    c.clamp_kind = in_.integer("clamp activation", 0, 5);
    c.clamp = static_cast<float>(in_.real());
    const bool additive = c.kind == static_cast<int>(Kind::additive);
    const int nets = in_.integer("nets", 1, additive ? 1 : 2);
    c.active_at = slots(c.active);
    c.passive_at = slots(c.passive);
    if (!distinct(c.active_at))
      throw std::invalid_argument("flow plan: active and passive slots overlap");
    const int outputs = !additive && nets == 1 ? 2 * c.active : c.active;
    for (int i = 0; i < nets; ++i) c.nets.push_back(net(c.passive, outputs, i * outputs));
    c.outputs = nets * outputs;
    return c;
  }

  Net net(int width, int outputs, int raw_at) {
    Net n{};
    n.raw_at = raw_at;
    const int layers = in_.integer("layers", 1, 64);
    n.activation = in_.integer("activation", 0, 5);
    n.slope = static_cast<float>(in_.real());
    int kept = 0;
    for (int l = 0; l < layers; ++l) {
      Dense d{};
      d.in = width;
      d.out = in_.integer("layer outputs", 1, kMaxWidth);
      const bool has_cond = plan_.cond_dim > 0;
      const bool cond = in_.integer("reads condition", 0, l == 0 && has_cond) != 0;
      const bool gate = in_.integer("gate", 0, has_cond) != 0;
      d.add = in_.flag("add");
      d.keep = in_.flag("keep");
      const bool norm = in_.flag("norm");
      d.activate = in_.flag("activate");
      if (d.add && kept != d.out)
        throw std::invalid_argument("flow plan: a layer adds " + std::to_string(kept) +
                                    " numbers to its " + std::to_string(d.out));
      if (d.keep) kept = d.out;
      d.weight = tensor(d.out, d.in);
      d.cond_weight = cond ? tensor(d.out, plan_.cond_dim) : -1;
      d.bias = tensor(d.out);
      d.gate_weight = gate ? tensor(d.out, plan_.cond_dim) : -1;
      d.gate_bias = gate ? tensor(d.out) : -1;
      d.scale = norm ? tensor(d.out) : -1;
      d.shift = norm ? tensor(d.out) : -1;
      width = d.out;
      n.layers.push_back(d);
    }
    if (width != outputs)
      throw std::invalid_argument("flow plan: the last layer must have " + std::to_string(outputs) +
                                  " outputs");
    return n;
  }

  Linear linear() {
    Linear l{};
    l.diagonal = in_.flag("diagonal");
    in_.raw();  // log|det|, which is added elsewhere
    for (int i = 0; i < 2; ++i) {
      const int at = tensor(plan_.dim, l.diagonal ? 1 : plan_.dim);
      if (i == 0) l.weight = at;
      tensor(plan_.dim);
    }
    return l;
  }

  PlanReader in_;
  Plan plan_{};
};

// --- where things lie ---

// First columns among the values of a coupling; -1: not kept.
struct Places {
  int result;  // of the last layer: in raw
  int before_gate, before_norm, before_activation;
  int hoisted, gate;  // columns of the hoisted sums
};
struct CouplingPlaces {
  std::vector<std::vector<Places>> nets;
  int width;    // values: raw first
  int hoisted;  // sums of the condition, per image
};

// What a layer's gradient needs is left out of a pass that does not store it.
CouplingPlaces places_of(const Coupling& coupling, bool gradient) {
  CouplingPlaces places{};
  const auto take = [](int& end, int count) {
    const int at = end;
    end += up4(count);
    return at;
  };
  take(places.width, coupling.outputs);
  for (const Net& net : coupling.nets) {
    auto& layers = places.nets.emplace_back();
    for (const Dense& d : net.layers) {
      const auto value = [&](bool needed) { return needed ? take(places.width, d.out) : -1; };
      const auto hoisted = [&](bool needed) { return needed ? take(places.hoisted, d.out) : -1; };
      Places p;
      p.result = &d == &net.layers.back() ? net.raw_at : value(true);
      p.before_gate = value(gradient && d.gate_weight >= 0);
      p.before_norm = value(d.keep || (gradient && d.scale >= 0));
      p.before_activation =
          value(gradient && d.activate && !derivative_of_result(net.activation, net.slope));
      p.hoisted = hoisted(d.cond_weight >= 0);
      p.gate = hoisted(d.gate_weight >= 0);
      layers.push_back(p);
    }
  }
  return places;
}

// How the sums of a weight's gradient are split.
struct Parts {
  int count, length;
  std::int64_t most;  // of any sum of at most this length
  Parts(std::int64_t m, std::int64_t n, std::int64_t k) {
    constexpr std::int64_t kBlocks = 256, kLeast = 256;  // rows of a part
    const std::int64_t tiles = (m + 63) / 64 * ((n + 127) / 128);
    most = std::clamp(kBlocks / std::max<std::int64_t>(tiles, 1), std::int64_t{1},
                      std::max<std::int64_t>((k + kLeast - 1) / kLeast, 1));
    length = static_cast<int>(((k + most - 1) / most + 15) / 16 * 16);
    count = length > 0 ? static_cast<int>((k + length - 1) / length) : 1;
  }
};

// A first layer's gradient is split by images if they are long enough, and few: its parts' column
// sums then are what the condition needs.
bool split_by_image(const Dense& d, std::int64_t images, std::int64_t per_image) {
  constexpr std::int64_t kLeast = 96, kMostNumbers = 4 << 20;
  return d.cond_weight >= 0 && d.in > 0 && per_image >= kLeast &&
         images * d.out * d.in <= kMostNumbers;
}

int pieces_of(std::int64_t rows) { return static_cast<int>((rows + kPieceRows - 1) / kPieceRows); }

// How rows are taken in rounds, and what one round needs.
struct Layout {
  std::int64_t rows, images;  // of a round, at most
  int values = 0, raw = 0, hidden = 0, hoisted = 0, pieces = 1;
  bool dense = false, keeps = false;
  std::int64_t at_slots, at_state, at_other, at_grad, at_grad_other, at_values, at_grad_raw,
      at_grad_hidden[2], at_grad_kept, at_hoisted, at_image_grad, at_partial, total = 0;

  Layout(const Plan& plan, std::int64_t images_in_all, std::int64_t rows_of_image, Keep keep,
         bool gradient, std::int64_t scratch) {
    const std::int64_t per_image = per_image_ = std::max<std::int64_t>(rows_of_image, 1);
    int widest = plan.dim;
    for (const Step& step : plan.steps) {
      if (const auto* l = std::get_if<Linear>(&step)) {
        dense |= !l->diagonal;
        continue;
      }
      const auto& c = std::get<Coupling>(step);
      const CouplingPlaces places = places_of(c, gradient || keep.store);
      values = std::max(values, places.width);
      hoisted = std::max(hoisted, places.hoisted);
      raw = std::max(raw, up4(c.outputs));
      for (const Net& net : c.nets)
        for (const Dense& d : net.layers) {
          if (&d != &net.layers.back()) hidden = std::max(hidden, up4(d.out));
          keeps |= d.keep;
          widest = std::max(widest, d.out);
        }
    }
    const int states = (dense ? 2 : 1) * (gradient ? 2 : 1) * up4(plan.dim);
    const int kept = gradient && keeps ? up4(widest) : 0;
    const int own_values = keep.store ? 0 : values;
    const std::int64_t row =
        4 * (std::int64_t{states} + own_values + (gradient ? 2 * hidden + raw + kept : 0));
    const std::int64_t image = 4 * (std::int64_t{hoisted} + (gradient ? widest : 0));
    constexpr std::int64_t kLeast = 64, kMost = 16384, kEven = 128;
    const std::int64_t all = images_in_all * rows_of_image;
    rows = std::clamp(scratch / (row + image / per_image + 1), kLeast, kMost);
    if (rows >= per_image && per_image > 1)
      rows = rows / per_image * per_image;  // whole images
    else if (rows > kEven)
      rows = rows / kEven * kEven;
    rows = std::min(rows, all);
    images = std::min(images_in_all, (rows + per_image - 2) / per_image + 1);
    pieces = pieces_of(std::min(per_image, rows));

    const auto take = [&](std::int64_t numbers) {
      const std::int64_t from = total;
      total += (numbers * 4 + 255) / 256 * 256;
      return from;
    };
    at_slots = take(static_cast<std::int64_t>(plan.slots.size()));
    const std::int64_t state = rows * plan.dim;
    at_state = take(state);
    at_other = take(dense ? state : 0);
    at_grad = take(gradient ? state : 0);
    at_grad_other = take(gradient && dense ? state : 0);
    at_values = take(rows * own_values);
    at_hoisted = take(images * hoisted);
    at_grad_raw = take(gradient ? rows * raw : 0);
    for (auto& at : at_grad_hidden) at = take(gradient ? rows * hidden : 0);
    at_grad_kept = take(rows * kept);
    at_image_grad = take(gradient ? images * widest : 0);
    at_partial = take(gradient ? partial(plan, widest) : 0);
  }

 private:
  // Numbers of sums that are still to be added up.
  std::int64_t partial(const Plan& plan, int widest) const {
    std::int64_t most = std::max(images * pieces, std::int64_t{pieces_of(rows)}) * widest;
    const auto weight = [&](std::int64_t m, std::int64_t n, std::int64_t k) {
      most = std::max(most, Parts(m, n, k).most * (m * n + m));
      most = std::max(most, Parts(m, 0, k).most * m);  // the bias alone
    };
    for (const Step& step : plan.steps) {
      if (const auto* c = std::get_if<Coupling>(&step)) {
        for (const Net& net : c->nets)
          for (const Dense& d : net.layers) {
            weight(d.out, d.in, rows);
            if (split_by_image(d, images, per_image_)) most = std::max(most, images * d.out * d.in);
            if (d.cond_weight >= 0 || d.gate_weight >= 0) weight(d.out, plan.cond_dim, images);
          }
      } else {
        weight(plan.dim, plan.dim, rows);
      }
    }
    return most;
  }

  std::int64_t per_image_;
};

// --- the launches ---

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

  void pass(const Pass& pass) {
    send_slots();
    check(cudaMemsetAsync(pass.log_det, 0, static_cast<std::size_t>(all_) * 4, on()));
    for (Round round(*this); begin(round);) {
      const std::int64_t at = first_row_ * plan_.dim;
      saved_ = pass.saved;
      exchange(pass.input + at, nullptr, state_, call_.inverse ? slots(0) : nullptr);
      for (int p = 0; p < step_count(); ++p) {
        if (float* kept = kept_state(p)) keep(state_, plan_.dim, kept, width_);
        const Step& step = plan_.steps[number(p)];
        if (const auto* c = std::get_if<Coupling>(&step)) {
          values(*c, number(p));
          Couple couple = couple_of(*c);
          couple.log_det = pass.log_det + first_row_;
          check(launch_couple(couple, false, stream_));
        } else {
          linear(std::get<Linear>(step), call_.inverse);
        }
      }
      exchange(state_, call_.inverse ? nullptr : slots(0), pass.output + at, nullptr);
    }
  }

  void gradient(const Gradient& gradient) {
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

  // --- gradients ---

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
  // gradients
  std::vector<float*> grads_;
  std::int64_t wanted_numbers_ = 0;
  float* grad_cond_ = nullptr;
};

}  // namespace

Plan parse_plan(std::span<const std::int64_t> numbers) { return PlanParser(numbers).plan(); }

std::int64_t saved_width(const Plan& plan, Keep keep) {
  const auto steps = static_cast<std::int64_t>(plan.steps.size());
  const std::int64_t state = up4(plan.dim);
  if (!keep.store) return keep.every > 0 ? (steps + keep.every - 1) / keep.every * state : 0;
  std::int64_t width = steps * state;
  for (const Step& step : plan.steps)
    if (const auto* c = std::get_if<Coupling>(&step)) width += places_of(*c, true).width;
  if (width > std::numeric_limits<int>::max())
    throw std::invalid_argument("coupling pass: too much to store");
  return width;
}

std::int64_t workspace_bytes(const Plan& plan, std::int64_t images, std::int64_t per_image,
                             Keep keep, bool gradient, std::int64_t scratch) {
  if (images * per_image == 0) return 0;
  return Layout(plan, images, per_image, keep, gradient, scratch).total;
}

void run(const Call& call, const Pass& pass, int device, void* stream) {
  if (call.images * call.per_image == 0) return;
  const DeviceGuard guard(device);
  Engine(call, false, device, stream).pass(pass);
}

void run(const Call& call, const Gradient& gradient, int device, void* stream) {
  const DeviceGuard guard(device);
  Engine(call, true, device, stream).gradient(gradient);
}

}  // namespace fasthyp::coupling::cuda::training
