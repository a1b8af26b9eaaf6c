// How the steps of a flow are trained.
#pragma once

#include <cstdint>
#include <vector>

#include "coupling/training.h"

namespace fasthyp::coupling {

// In the order of the flow.
struct Plans {
  std::vector<StepPlan> steps;
  std::int64_t saved;         // numbers that a pass keeps of each row
  std::int64_t grad_numbers;  // of all wanted gradients
};

// by_row: whether rows read conditions of their own; wanted: of each tensor of the plan, whether
// its gradient is; null: none, nothing is trained. Throws std::invalid_argument for another number
// of tensors.
Plans plan_steps(const Flow& flow, bool inverse, Keep keep, bool by_row,
                 const std::vector<bool>* wanted, bool cond_wanted);

// States that a pass keeps of each row.
std::int64_t states(const Flow& flow, Keep keep);

}  // namespace fasthyp::coupling
