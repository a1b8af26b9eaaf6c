// What the CPU and CUDA kernels share.
//
// The squared discrepancy is one sum over all ordered pairs of different samples of both sets
// together, sum_ab c_ab k(u_a, u_b), and a constant for the pairs of a sample with itself. Samples
// of x count with their weight, those of y with minus theirs; c_ab is the product of both, times
// the set's `scale` where a and b are of the same set. Gradients follow from
// d/du_a = 2 sum_b c_ab k'(|u_a - u_b|^2) 2 (u_a - u_b).
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "mmd/mmd.h"

namespace fasthyp::mmd {

// From sum_b c_ab (-k') (u_a - u_b) to the gradient.
constexpr int kGradientFactor = -4;

// The sum of the squared weights of a set.
FASTHYP_HD double squares_of(const Call& call, std::int64_t problem, int set) {
  return call.squares ? call.squares[2 * problem + set] : 1.0 / static_cast<double>(call.n[set]);
}

// Of the pairs within a set: the unbiased estimator averages over pairs of different samples.
FASTHYP_HD double scale_of(const Call& call, std::int64_t problem, int set) {
  return call.unbiased ? 1.0 / (1.0 - squares_of(call, problem, set)) : 1.0;
}

// The pairs of a sample with itself, at which each bandwidth's kernel is 1.
FASTHYP_HD double diagonal_of(const Call& call, std::int64_t problem) {
  if (call.unbiased) return 0.0;
  return call.bandwidths * (squares_of(call, problem, 0) + squares_of(call, problem, 1));
}

}  // namespace fasthyp::mmd
