// Conditional affine coupling flows on the CPU: shapes, packed weights, and the two entry points.
//
// A flow is a state of D numbers per row and a list of couplings. Each reads some state slots (and
// the condition), runs an MLP, and changes other slots: x <- x * exp(s) + t. Permutations exist
// only as these slot lists and, at the latent end, as `output_index`.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "common/thread_pool.h"

namespace fasthyp::coupling {

// What the weights and the operands of the matrix products are stored as; sums of bf16 products are
// float. The state is double for f64, float otherwise.
enum class Element : int { f32 = 0, f64 = 1, bf16 = 2 };
enum class Activation : int {
  relu = 0,
  leaky_relu = 1,
  silu = 2,
  tanh = 3,
  gelu = 4,
  gelu_tanh = 5
};
enum class Clamp : int {
  none = 0,
  atan = 1,
  tanh = 2,
  sigmoid = 3,
  atan_scaled = 4,
  tanh_scaled = 5
};

// Sums over inputs run in chunks of about this many, each from zero: better rounding than one long
// chain, and the same for every way of splitting rows, images or threads.
inline constexpr int kChunk = 128;

struct Layer {
  int in, out;    // as in nn.Linear, in: without the condition
  int in_padded;  // inputs as stored (without the condition)
  int chunk;      // inputs per partial sum
  int vectors;    // vectors per block of outputs
  int block;      // outputs per block = vectors * lanes
  int blocks;
  std::int64_t weight;  // byte offset of [block][condition, then inputs][output in block]
  std::int64_t bias;    // byte offset of [blocks * block]
  int out_padded() const { return blocks * block; }
};

struct Coupling {
  // The state of a row is kept in an order in which what a coupling reads and what it changes are
  // each contiguous; couplings in a row mostly share one.
  std::vector<int> order;        // slot at each place
  int active, active_at;         // count and first place of the slots changed
  int passive, passive_at;       // and of those read
  std::vector<int> from_before;  // place now -> place in the coupling before; empty: the same
  std::vector<int> from_after;   // and in the one after
  std::vector<Layer> layers;     // layers[0] also reads the condition if cond_padded > 0
  int cond_padded;               // condition inputs as stored; 0: none
  std::int64_t hoisted;          // column of its part in a row of hoisted first-layer sums
  Activation activation;
  double negative_slope;
  Clamp clamp_activation;
  double clamp;
};

struct Flow {
  int dim, cond_dim;
  Element element;
  int lanes;  // outputs per vector of the SIMD level it was packed for
  std::vector<Coupling> couplings;
  std::vector<int> first_slot;   // slot at each place of the first coupling's order
  std::vector<int> last_latent;  // latent dim at each place of the last coupling's order
  std::int64_t packed_bytes;
  std::int64_t hoisted_width;  // numbers of hoisted first-layer sums per image
};

// A flow as numbers, so that it can travel as a tensor:
//   dim, cond_dim, element, lanes, number of couplings, output_index[dim], then per coupling
//   active count, passive count, reads condition (0/1), layers, activation, clamp activation,
//   negative slope and clamp as the bits of doubles, active[], passive[], outputs of each layer[].
// Throws std::invalid_argument for anything that is not a consistent flow.
Flow parse_plan(std::span<const std::int64_t> plan);

// Outputs per vector at the current SIMD level; the level also decides whether bf16 exists.
int lanes(Element element);
bool supports(Element element);

// Writes one Linear into the packed buffer. weight: (out, passive + |cond_columns|) for the first
// layer, (out, in) else, row-major; T is double for f64, float otherwise. bias may be null.
// cond_columns[i]: the condition column that first-layer input (passive + i) reads.
template <class T>
void pack_layer(const Flow& flow, int coupling, int layer, const T* weight, const T* bias,
                std::span<const std::int64_t> cond_columns, std::byte* packed);

// One pass through the flow. All arrays are contiguous; T as above.
struct Call {
  const Flow* flow;
  const std::byte* packed;
  bool inverse;            // false: x -> z, true: z -> x
  std::int64_t images;     // B
  std::int64_t per_image;  // M
  const void* input;       // (B, M, D); null: draw the latent (inverse only)
  const void* cond;        // (B, C); null if C = 0
  void* output;            // (B, M, D)
  void* log_det;           // (B, M); when the latent is drawn: the log-density of the output
  int threads;
  // Drawing the latent:
  std::uint64_t seed = 0;
  std::int64_t image_offset = 0;
  const void* fixed = nullptr;  // (B, F): the last F latent dims of every row of an image
  int fixed_dims = 0;
  bool include_mode = false;  // hypothesis 0 has zero noise
};
void run(const Call& call);

// Coupling arithmetic alone, for subnets that run elsewhere: state (N, D) changed in place,
// raw (N, 2A) as [s | t], log_det (N,) receives +-sum(s).
template <class T>
void affine(T* state, std::int64_t rows, int dim, const T* raw,
            std::span<const std::int64_t> active, double clamp, Clamp clamp_activation,
            bool inverse, T* log_det, int threads);

// --- what a SIMD level provides (cpu_kernels.cpp) ---

struct RowsJob {
  const Call* call;
  const std::int64_t* image_of;  // per row of the input; null: row / per_image
  const void* hoisted;           // (images, hoisted_width) or null: the condition is read per row
  std::int64_t hoisted_begin;    // image of the first row of `hoisted`
};

// Few rows, many weights: the threads of a team take the same rows through the flow, and share the
// hidden units of each subnet. Sums are made in the same order as by one thread.
struct Share {
  int index, size;
  Barrier* barrier;
  std::atomic<bool>* failed;
  std::byte* inner[2];    // hidden layers before the last one, in turn
  std::byte* partial[2];  // sums of the last layer over each chunk of its inputs, in turn

  // Waits for the team; whether all of it is ready.
  bool meet(bool ready) const {
    if (!ready) *failed = true;
    barrier->wait(size);
    return !*failed;
  }
};

// One cache line of padding keeps rows of a power-of-two width out of the same cache sets.
inline std::ptrdiff_t padded_stride(std::ptrdiff_t width, std::size_t number_bytes) {
  const auto line = static_cast<std::ptrdiff_t>(64 / number_bytes);
  return (width + line - 1) / line * line + line;
}

struct Kernels {
  int lanes[3];  // per Element; 0: not available
  // First-layer sums of the condition, units [begin, end) of all (coupling, block) pairs.
  void (*hoist[3])(const Flow&, const std::byte* packed, const void* cond, std::int64_t images,
                   std::int64_t begin, std::int64_t end, void* hoisted);
  // Rows [begin, end) of the call, through the whole flow; shared with others if share is given.
  void (*rows[3])(const RowsJob&, std::int64_t begin, std::int64_t end, const Share* share);
  void (*affine_f32)(float*, std::int64_t rows, int dim, const float* raw,
                     const std::int64_t* active, int count, double clamp, Clamp, bool inverse,
                     float* log_det);
  void (*affine_f64)(double*, std::int64_t rows, int dim, const double* raw,
                     const std::int64_t* active, int count, double clamp, Clamp, bool inverse,
                     double* log_det);
};

}  // namespace fasthyp::coupling
