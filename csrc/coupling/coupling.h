// Conditional coupling flows on the CPU: shapes, packed weights, and the two entry points.
//
// A flow is a state of D numbers per row and a list of steps. A coupling reads some state slots
// (and the condition), runs one or two subnets, and changes other slots; a linear step maps the
// whole state. Permutations exist only as slot lists and, at the latent end, as `output_index`.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <variant>
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
// raw = [s | t]: x * exp(s) + t; raw = t: x + t; and the first with s - mean(s).
enum class Kind : int { affine = 0, additive = 1, gin = 2 };
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

// W u + b: the outputs in blocks of a few vectors.
struct Matrix {
  Element element;  // what the weights are stored as
  int in, out;      // in: without the condition
  int cond_padded;  // condition inputs as stored, before the others; 0: none
  int in_padded;    // the others as stored
  int chunk;        // inputs per partial sum
  int vectors;      // vectors per block of outputs
  int block;        // outputs per block = vectors * lanes
  int blocks;
  std::int64_t weight;   // byte offset of [block][condition, then inputs][output in block]
  std::int64_t bias;     // byte offset of [blocks * block]
  std::int64_t hoisted;  // column of the condition's part in a row of hoisted sums
  int out_padded() const { return blocks * block; }
};

// A linear of a subnet and what its sums go through: gate, add, keep, norm, activation.
struct Dense {
  Matrix matrix;
  std::optional<Matrix> gate;  // sums * sigmoid(W c + b); hoisted as the sigmoid
  bool add, keep;              // + what was kept last; keep the sums
  std::int64_t norm;           // byte offset of scale and shift, out_padded each; -1: none
  bool activate;
  bool plain() const { return !gate && !add && !keep && norm < 0; }
};

struct Net {
  std::vector<Dense> layers;  // the first one may read the condition
  Activation activation;
  double negative_slope;
  int raw_at;  // first column of its outputs among the coupling's
};

// The state of a row is kept in an order in which what a coupling reads and what it changes are
// each contiguous.
struct Coupling {
  int active, active_at;    // count and first place of the slots changed
  int passive, passive_at;  // and of those read
  std::vector<Net> nets;
  Kind kind;
  Clamp clamp_activation;
  double clamp;
  int shift_at;  // first column of t
};

// Packed for the places that the state has before and after it.
struct Linear {
  bool diagonal;  // the matrices have one input per output
  Matrix forward, inverse;
};

struct Step {
  std::variant<Coupling, Linear> what;
  std::vector<int> before, after;  // slot at each place, before and after the step
  std::vector<int> from_before;    // place -> place after the step before; empty: the same
  std::vector<int> from_after;     // and before the step after
};

// Widths of the buffers that any step of a flow needs, 0 where it needs none.
struct Widths {
  int input = 0;   // a first layer's inputs
  int inner = 0;   // outputs of hidden layers before the last one
  int kept = 0;    // outputs of layers that keep or add
  int chunk = 0;   // inputs that a layer sums at a time
  int block = 0;   // outputs per block
  int output = 0;  // all outputs of a step
  int chunks = 1;  // how many of them a last layer sums
};

struct Flow {
  int dim, cond_dim;
  Element element;
  int lanes;  // outputs per vector of the SIMD level it was packed for
  std::vector<Step> steps;
  std::vector<int> first_slot;   // slot at each place before the first step
  std::vector<int> last_latent;  // latent dim at each place after the last one
  double log_det;                // of the linear steps
  bool gated;
  Widths widths;
  std::int64_t packed_bytes;
  std::int64_t hoisted_width;  // numbers of hoisted sums per image
};

// A flow as numbers, so that it can travel as a tensor (real numbers as the bits of doubles):
//   dim, cond_dim, element, lanes, number of steps, output_index[dim], then per step
//     0 (coupling), active count, passive count, kind, clamp activation, clamp, nets,
//       active[], passive[], then per net
//         layers, activation, negative slope, and of each layer its outputs and, as 0 or 1: reads
//         the condition (first layers only), gate, add, keep, norm, activate
//     1 (linear), diagonal (0 or 1), log|det|
// Throws std::invalid_argument for anything that is not a consistent flow.
Flow parse_plan(std::span<const std::int64_t> plan);

// Outputs per vector at the current SIMD level; the level also decides whether bf16 exists.
int lanes(Element element);
bool supports(Element element);

// A contiguous tensor: double for f64, float otherwise.
struct Numbers {
  const void* data;
  std::int64_t count;
};
// Writes all weights into the packed buffer. They come in the order of the plan: of each layer
// weight (out, in), weight (out, C) of the condition, bias, then weight (out, C) and bias of the
// gate, scale and shift of the norm; of linear steps weight and shift, then those of the inverse,
// on slots.
void pack(const Flow& flow, std::span<const Numbers> tensors, std::byte* packed, int threads);

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
  std::int64_t first_sample = 0;  // number of the first hypothesis of each image
  const void* fixed = nullptr;    // (B, F): the last F latent dims of every row of an image
  int fixed_dims = 0;
  bool include_mode = false;  // hypothesis 0 has zero noise
  // Keeping states: of each row before steps 0, keep_every, ... of the pass, one after
  // the other at states + row * states_ld.
  int keep_every = 0;
  void* states = nullptr;
  std::int64_t states_ld = 0;
};
void run(const Call& call);

// Coupling arithmetic alone, for subnets that run elsewhere: state (N, D) changed in place,
// raw (N, 2A) as [s | t], log_det (N,) receives +-sum(s).
template <class T>
void affine(T* state, std::int64_t rows, int dim, const T* raw,
            std::span<const std::int64_t> active, double clamp, Clamp clamp_activation,
            bool inverse, T* log_det, int threads);

// Vectors per block of a matrix: the fewest padded vectors win; one vector alone leaves the FMA
// units waiting for broadcasts, so it must be clearly better.
int choose_vectors(int vectors);

// Which earlier row of cond each row repeats (itself if none): index of the distinct row, and the
// rows that are distinct, in order of first appearance.
struct Distinct {
  std::vector<std::int64_t> index, first;
};
Distinct find_distinct(const std::byte* cond, std::int64_t rows, std::size_t row_bytes);

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
  std::byte* kept;        // sums that a later layer adds
  std::byte* partial[2];  // sums of the last layer over each chunk of its inputs, in turn

  // Waits for the team; whether all of it is ready.
  bool meet(bool ready) const {
    if (!ready) *failed = true;
    barrier->wait(size);
    return !*failed;
  }
};

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// One cache line of padding keeps rows of a power-of-two width out of the same cache sets.
inline std::ptrdiff_t padded_stride(std::ptrdiff_t width, std::size_t number_bytes) {
  const auto line = static_cast<std::ptrdiff_t>(64 / number_bytes);
  return (width + line - 1) / line * line + line;
}

// Calls f(matrix, is_gate) for every matrix that reads the condition.
template <class F>
void for_each_hoisted(const Flow& flow, F&& f) {
  for (const Step& step : flow.steps)
    if (const auto* coupling = std::get_if<Coupling>(&step.what))
      for (const Net& net : coupling->nets)
        for (const Dense& dense : net.layers) {
          if (dense.matrix.cond_padded > 0) f(dense.matrix, false);
          if (dense.gate) f(*dense.gate, true);
        }
}

struct Kernels {
  int lanes[3];  // per Element; 0: not available
  // The condition's part of every matrix that has one, units [begin, end) of all their blocks.
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
