// Where the values, states and gradients of a flow in training lie: in what a pass stores, and in
// the workspace.
#pragma once

#include "coupling/cuda_training.h"

namespace fasthyp::coupling::cuda::training {

// Rows begin at multiples of 16 bytes, for copies of that size.
constexpr int up4(int n) { return (n + 3) / 4 * 4; }

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
CouplingPlaces places_of(const Coupling& coupling, bool gradient);

// How the sums of a weight's gradient are split.
struct Parts {
  int count, length;
  std::int64_t most;  // of any sum of at most this length
  Parts(std::int64_t m, std::int64_t n, std::int64_t k);
};

// A first layer's gradient is split by images if they are long enough, and few: its parts' column
// sums then are what the condition needs.
bool split_by_image(const Dense& dense, std::int64_t images, std::int64_t per_image);

inline int pieces_of(std::int64_t rows) {
  return static_cast<int>((rows + kPieceRows - 1) / kPieceRows);
}

// How rows are taken in rounds, and what one round needs.
struct Layout {
  std::int64_t rows, images;  // of a round, at most
  int values = 0, raw = 0, hidden = 0, hoisted = 0, pieces = 1;
  bool dense = false, keeps = false;
  std::int64_t at_slots, at_state, at_other, at_grad, at_grad_other, at_values, at_grad_raw,
      at_grad_hidden[2], at_grad_kept, at_hoisted, at_image_grad, at_partial, total = 0;

  Layout(const Plan& plan, std::int64_t images_in_all, std::int64_t rows_of_image, Keep keep,
         bool gradient, std::int64_t scratch);

 private:
  // Numbers of sums that are still to be added up.
  std::int64_t partial(const Plan& plan, int widest) const;

  std::int64_t per_image_;
};

}  // namespace fasthyp::coupling::cuda::training
