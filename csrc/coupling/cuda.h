// Conditional coupling flows on CUDA, without gradients, float32 in and out.
//
// python/fasthyp/ops/_coupling_cuda.py turns a flow into a list of launches, for each direction,
// and one buffer of packed weights on the device. Two kernels do everything:
//
//   rows    a block (or a cluster of two, sharing the hidden units) owns a tile of rows and takes
//           them through the flow: noise, subnets of one or two layers, coupling arithmetic, linear
//           steps, log-Jacobian. Weights stream through a ring of asynchronous copies that runs
//           ahead across couplings, as they do not depend on the state.
//   product C = f(A W^T + b) over all rows, for the inner layers of deeper subnets and for the
//           condition's part of all first layers, once per image.
//
// A flow whose subnets have at most two layers is one launch of each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <variant>
#include <vector>

namespace fasthyp::coupling::cuda {

// Operands of the matrix products; sums are float32. tf32x3 multiplies the upper and lower halves
// of float32 numbers apart, which loses nothing that float32 sums would keep.
enum class Precision : int { tf32x3 = 0, tf32 = 1, bf16 = 2 };

// --- the plan: int64 numbers on the host, written by _coupling_cuda.py ---

// Offsets into the packed buffer are in bytes; -1 stands for something that is not there.
struct RowsLaunch {
  std::int64_t ops, op_ints, op_count;  // where its operations lie, their ints, their number
};
struct ProductLaunch {
  std::int64_t weight, bias, steps, columns;  // steps of 16 inputs; columns are a multiple of 16
  std::int64_t depth;                         // inputs that the hidden buffer holds
  std::int64_t from, to;                      // hidden buffers
  std::int64_t kept, add, keep;               // residual buffer; whether it is added, and written
  std::int64_t norm, gate;                    // gate: column of hoisted sums
  std::int64_t activation, slope;             // slope: bits of a float
};
using Launch = std::variant<RowsLaunch, ProductLaunch>;

struct Plan {
  std::int64_t dim, cond_dim;
  std::int64_t cond_stride;  // condition columns as given: a multiple of 4
  Precision precision;
  std::int64_t hoisted;  // columns of the condition's part of all first layers, and of gates
  std::int64_t hoist_weight, hoist_bias;
  std::int64_t hidden, hidden_count;  // columns and number of buffers for hidden layers
  std::int64_t kept_count;            // buffers for residuals, of as many columns
  std::int64_t raw;                   // columns of what subnets say, at most
  std::int64_t steps;                 // k-steps of passive slots, at most
  std::int64_t units;                 // weight units of a block, at most
  std::int64_t linear;                // 1 if there are dense linear steps
  std::int64_t packed_bytes;
  std::int64_t output_index;        // the slot of each latent dim, ints
  std::int64_t scratch;             // bytes that are enough; more rows go in several rounds
  double log_det;                   // of the linear steps, data to latent
  std::vector<Launch> launches[2];  // forward, inverse
};

// Throws std::invalid_argument for what is no plan.
Plan parse_plan(std::span<const std::int64_t> numbers);

// --- operations of a rows launch, as ints on the device ---

// Byte offsets into the packed buffer are given in 16 bytes.
struct RowOp {
  enum Kind : int { net = 0, couple = 1, linear = 2 };
  // net: fused is both layers of a two-layer subnet; head its first layer, to a hidden buffer; tail
  // its last layer, from a hidden buffer; single a subnet of one layer.
  enum Form : int { fused = 0, head = 1, tail = 2, single = 3 };
  int kind;
  int form;
  int slots;       // net: where the passive slots lie among the ints; couple: the active ones
  int count;       // couple: active slots
  int steps;       // net: k-steps of passive slots
  int blocks;      // net: blocks of 16 hidden units, or of 16 inputs of tail and single
  int hoisted;     // net: column of the first layer's sums of condition and bias; -1: none
  int weight;      // net: units; linear: matrix, transposed
  int bias;        // net: of the last layer; linear: shift
  int columns;     // net: outputs, of raw
  int raw;         // net: first column; couple: that of s
  int shift;       // couple: column of t
  int hidden;      // net: hidden buffer read (tail) or written (head)
  int kept;        // head: residual buffer written; -1: none
  int norm;        // head: scale, then shift, of hidden units; -1: none
  int activation;  // net: Activation; -1: none
  int slope;       // net: bits of a float
  int mode;        // couple: 0 affine, 1 additive, 2 gin; linear: 1 if diagonal
  int clamp_kind;
  int clamp;  // bits of a float
};
inline constexpr int kOpInts = sizeof(RowOp) / sizeof(int);

struct RowsCall {
  const std::byte* packed;
  const int* ops;  // op_count operations, then their slot lists
  int op_count, op_ints;
  int dim;
  bool inverse;
  std::int64_t rows, first_row, per_image, first_image;
  const float* hoisted;  // of first_image on
  std::int64_t hoisted_stride;
  // Where rows come from: input; noise if that is null; the state where the launch is not the
  // first.
  bool first, last;
  const int* output_index;
  const float* input;
  std::uint64_t seed;
  std::int64_t image_offset, first_sample;
  const std::int64_t* counter;  // on the device: three numbers to add to these, or null
  const float* fixed;
  int fixed_dims;
  bool include_mode;
  // Between launches: state (rows, dim), sums of log-scales and log-densities (rows).
  float *state, *log_scale, *log_noise;
  std::byte* hidden;  // hidden buffers (rows, columns), one after the other
  std::int64_t hidden_columns, hidden_bytes;
  float* kept;
  std::int64_t kept_numbers;
  float *output, *log_det;
  float constant;  // log|det| of the linear steps, in the direction data to latent
  // Chosen at the launch. Shared memory: bytes, and where in it things are.
  int shared, at_state, at_other, at_raw, at_log, at_fragments, at_sums, at_shares, at_ring;
  int state_stride, raw_stride, stage, stages, warps;
  int split;  // blocks of a cluster
};

struct ProductCall {
  const void* a;  // (rows, a_stride), float or bf16
  std::int64_t a_stride;
  int depth;  // columns of a that exist
  int steps;  // of 16 columns of the packed weight
  const std::byte* weight;
  std::int64_t rows;
  int columns;        // multiple of 16
  const float* bias;  // (columns)
  const float* gate;  // (images, gate_stride) or null
  std::int64_t gate_stride, first_row, per_image, first_image;
  float* kept;  // (rows, columns)
  bool add, keep;
  const float* norm;  // scale (columns), shift (columns), or null
  int activation;     // -1: none
  float slope;
  void* out;  // (rows, out_stride), bf16 if narrow
  std::int64_t out_stride;
  bool narrow;
};

// Both return a CUDA error code.
int launch_rows(const RowsCall& call, const Plan& plan, int device, void* stream);
int launch_product(const ProductCall& call, Precision precision, int device, void* stream);

// --- the whole flow ---

struct Call {
  const Plan* plan;
  const std::byte* packed;
  bool inverse;
  std::int64_t images, per_image;
  const float* input;  // (B, M, D); null: draw the latent (inverse only)
  const float* cond;   // (B, cond_stride), 16-byte aligned; null if there is none
  float* output;
  float* log_det;
  std::byte* workspace;
  std::int64_t workspace_bytes;
  std::uint64_t seed = 0;
  std::int64_t image_offset = 0;
  std::int64_t first_sample = 0;  // number of the first hypothesis of each image
  // On the device: numbers to add to seed, image offset and first sample; may be null.
  const std::int64_t* counter = nullptr;
  const float* fixed = nullptr;
  int fixed_dims = 0;
  bool include_mode = false;
};

// Whether a tile of rows fits the device's shared memory.
bool fits(const Plan& plan, int device);

std::int64_t workspace_bytes(const Plan& plan, std::int64_t images, std::int64_t per_image);
void run(const Call& call, int device, void* stream);

}  // namespace fasthyp::coupling::cuda
