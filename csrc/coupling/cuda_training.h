// Conditional coupling flows on CUDA with gradients, float32 in and out.
//
// A pass goes step by step over all rows, or over a round of them where there are many, so that the
// workspace stays bounded. Three forms of one product do the work of the subnets: a layer, the
// gradient of its input, and the gradient of its weight (cuda_gemm.cu). Everything else is by
// element, or sums over rows in a fixed order (cuda_elementwise.cu). Weights are read where
// autograd has them.
//
// The gradient walks the steps from the output. A step's input comes from its output by the step's
// inverse, or from a state that the pass has kept; its hidden layers are computed again, unless the
// pass has stored them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "coupling/cuda.h"

namespace fasthyp::coupling::cuda::training {

// --- the plan, as coupling.h describes it ---

// Numbers of tensors, in the order of the plan; -1: not there.
struct Dense {
  int in, out;
  bool add, keep, activate;
  int weight, cond_weight, bias, gate_weight, gate_bias, scale, shift;
  bool plain() const { return gate_weight < 0 && scale < 0 && !add && !keep; }
};
struct Net {
  std::vector<Dense> layers;
  int activation;
  float slope;
  int raw_at;  // first column of its outputs among the coupling's
};
struct Coupling {
  int active, active_at;  // how many, and where in the plan's slots
  int passive, passive_at;
  std::vector<Net> nets;
  int kind, clamp_kind;
  float clamp;
  int outputs;  // of all nets
};
struct Linear {
  bool diagonal;
  int weight;  // then its shift, and the inverse's weight and shift
};
using Step = std::variant<Coupling, Linear>;

struct Plan {
  int dim, cond_dim;
  std::vector<Step> steps;
  std::vector<int> slots;  // the output index, then those of the couplings
  std::vector<std::int64_t> counts;
};

// Throws std::invalid_argument for anything that is not a consistent flow in float32.
Plan parse_plan(std::span<const std::int64_t> numbers);

// What a pass keeps: the state before every keep_every-th step from the first
// on, or all of them and the layers.
struct Keep {
  int every;
  bool store;
};
// Numbers per row that a pass keeps for its gradient.
std::int64_t saved_width(const Plan& plan, Keep keep);

struct Weight {
  const float* at;
  std::int64_t count;
};

struct Call {
  const Plan* plan;
  std::span<const Weight> weights;
  bool inverse;
  std::int64_t images, per_image;
  const float* cond;  // (B, C); null if C = 0
  Keep keep;
  Precision precision;  // tf32x3 or tf32
  std::byte* workspace;
  std::int64_t workspace_bytes;
  std::int64_t scratch;  // bytes that are enough; more rows go in several rounds
};
struct Pass {
  const float* input;       // (B, M, D)
  float *output, *log_det;  // (B, M, D), (B, M)
  float* saved;             // (B, M, saved_width)
};
struct Gradient {
  const float *output, *saved;
  const float* grad_output;
  const float* grad_log_det;             // or null
  float* grad_input;                     // (B, M, D)
  float* grad_cond;                      // (B, C), or null
  float* grad_weights;                   // of the wanted ones, one after the other
  std::span<const std::uint8_t> wanted;  // of each tensor
};

std::int64_t workspace_bytes(const Plan& plan, std::int64_t images, std::int64_t per_image,
                             Keep keep, bool gradient, std::int64_t scratch);
void run(const Call& call, const Pass& pass, int device, void* stream);
void run(const Call& call, const Gradient& gradient, int device, void* stream);

// --- the kernels ---

// Which image a row of the round belongs to, counted from the round's first one.
struct Images {
  int lead;  // rows of the first image
  int per;   // of every other one
};

// A matrix as it lies in memory. `index`: the columns of a wider one; null: all.
struct Operand {
  const float* at;
  std::int64_t stride;
  const int* index = nullptr;
};

enum class Form : int {
  layer,   // rows = f(a b^T): values (rows, in), weight (out, in)
  input,   // rows = (a b) f': gradient (rows, out), weight (out, in)
  weight,  // weight = a^T b: gradient (rows, out), values (rows, in)
};

struct Gemm {
  Operand a, b;
  int m, n, k;          // rows and columns of the result, length of the sums
  int part, parts = 1;  // the sums are split (weight only), in parts of this length
  float* out;
  std::int64_t out_stride;
  const int* out_index = nullptr;
  bool accumulate = false;
  // layer: what its sums go through, and where it leaves what the gradient needs on the way
  const float* bias = nullptr;
  const float* hoisted = nullptr;  // (images, hoisted_stride)
  const float* gate = nullptr;
  std::int64_t hoisted_stride = 0;
  Images images{};
  std::int64_t value_stride = 0;  // of the following ones
  float *before_gate = nullptr, *before_norm = nullptr, *before_activation = nullptr;
  const float* kept = nullptr;
  const float *scale = nullptr, *shift = nullptr;
  // input: values that the derivative of the activation follows from; null: no activation
  const float* derivative = nullptr;
  int activation = -1;
  float slope = 0;
  // weight: column sums of a, or null; how far the parts of both are apart
  float* sums = nullptr;
  std::int64_t part_numbers = 0, part_sums = 0;
  // chosen at the launch
  bool a_wide = false, b_wide = false, pairs = false;
};
int launch_gemm(Form form, const Gemm& call, Precision precision, int device, void* stream);

inline constexpr int kSlotInts = 960;  // as many as a launch can carry
struct Slots {
  int v[kSlotInts];
};
int launch_slots(const Slots& slots, int* to, int count, void* stream);

// to[., to_index] = from[., from_index]
struct Move {
  const float* from;
  std::int64_t from_stride;
  const int* from_index;
  float* to;
  std::int64_t to_stride;
  const int* to_index;
  int rows, columns;
};
int launch_move(const Move& call, void* stream);

struct Couple {
  float* state;
  int rows, dim;
  const int* slots;
  int active;
  const float* raw;
  std::int64_t raw_stride;
  int shift_at;
  int kind, clamp_kind;
  float clamp;
  bool inverse;
  float* log_det;
  // gradient:
  bool from_input;  // the state is the step's input, and stays it
  float* grad;      // of the state: of the output, then of the input
  const float* grad_log_det;
  float* grad_raw;
  std::int64_t grad_raw_stride;
};
int launch_couple(const Couple& call, bool gradient, void* stream);

// The gradient of a layer's output on its way to that of its sums.
struct Through {
  float* grad;
  std::int64_t stride;
  int rows, columns;
  std::int64_t value_stride;
  const float* derivative;  // as above
  int activation;
  float slope;
  const float* scale;
  float* kept;  // the gradient of what a layer keeps
  std::int64_t kept_stride;
  bool take_kept, give_kept, add_kept;
  const float* gate;
  std::int64_t gate_stride;
  Images images;
};
int launch_through(const Through& call, void* stream);

inline constexpr int kPieceRows = 256;
// Sums over the rows of each image, in pieces of at most kPieceRows.
struct ImageSums {
  const float* from;
  std::int64_t stride;
  const float* times;  // another factor, or null
  std::int64_t times_stride;
  const float* gate;  // the derivative of this gate is a factor, or null
  std::int64_t gate_stride;
  int rows, columns;
  Images images;
  int image_count, pieces;
  float* to;  // (images, pieces, columns)
};
int launch_image_sums(const ImageSums& call, void* stream);

// to[b, i] (+)= the sum over s of from[b, s, i], of which the numbers from `first` on are of other.
struct Reduce {
  const float* from;
  int batch, parts;
  std::int64_t numbers, first;
  float *to, *other;  // null: not wanted
  bool accumulate;
};
int launch_reduce(const Reduce& call, void* stream);

// to = from * weight (+ shift)
struct Scale {
  const float *from, *weight, *shift;
  float* to;
  int rows, columns;
};
int launch_scale(const Scale& call, void* stream);

}  // namespace fasthyp::coupling::cuda::training
