// The plan of a flow that is trained on CUDA.
#include <stdexcept>
#include <string>
#include <utility>

#include "coupling/coupling.h"
#include "coupling/cuda_training.h"
#include "coupling/plan.h"

namespace fasthyp::coupling::cuda::training {
namespace {

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

}  // namespace

Plan parse_plan(std::span<const std::int64_t> numbers) { return PlanParser(numbers).plan(); }

}  // namespace fasthyp::coupling::cuda::training
