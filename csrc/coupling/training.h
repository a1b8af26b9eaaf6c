// Training of coupling flows on the CPU: the pass that keeps what its gradient will need, and the
// gradient. The gradient walks the steps from the output: each step's input is reconstructed from
// its output, hidden layers are computed again, so that memory does not grow with the steps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "coupling/coupling.h"

namespace fasthyp::coupling {

// What a pass keeps of each row: with keep_every = k > 0 the state before its steps 0, k, 2k, ...;
// with store also the hidden layers and outputs of all subnets.
struct Keep {
  int every;
  bool store;
};

// Numbers per row.
std::int64_t saved_width(const Flow& flow, Keep keep);

// coupling::run, which also writes `saved` (rows, saved_width).
void run(Call call, Keep keep, void* saved);

struct Gradient {
  const Flow* flow;
  const std::byte* packed;
  bool inverse;  // of the pass
  std::int64_t images, per_image;
  const void* output;  // (B, M, D): what the pass gave
  const void* saved;
  Keep keep;
  const void* cond;
  const void* grad_output;
  const void* grad_log_det;  // (B, M); null: none
  void* grad_input;
  void* grad_cond;           // (B, C); null: not wanted
  void* grad_weights;        // of the wanted tensors one after the other, in the order of the plan
  std::vector<bool> wanted;  // for each tensor of the plan
  int threads;
};
void backward(const Gradient& gradient);

// --- how a step is trained ---

// The gradient of a matrix as a slab of rows sums it up: (m, ld), its transpose where that pads
// less.
struct Sums {
  std::int64_t at = -1;  // first number in the slab's memory; -1: not wanted
  int m = 0, n = 0;
  std::ptrdiff_t ld = 0;
  bool transposed = false;  // m: inputs, n: outputs
};

struct LayerPlan {
  Dense dense;  // its hoisted columns are those of this step alone
  // First column in a row's record, -1: not there. out: what comes out of the layer; slope: of the
  // activation; product: the sums before a gate; value: before the norm.
  int out = -1, slope = -1, product = -1, value = -1;
  Sums weight, cond_weight;            // cond_weight: where the condition is read by row
  int grad = -1;                       // wide steps: first column of a row's gradients
  std::int64_t bias = -1, norm = -1;   // in the slab's memory: out_padded; scale, then shift
  bool hoisted = false, gate = false;  // whether the gradients of these sums are wanted
  Matrix back;                         // the weight's transpose
  std::optional<Matrix> cond_back, gate_back;
};

struct NetPlan {
  std::vector<LayerPlan> layers;
  Activation activation;
  double negative_slope;
  int raw;  // first column of its outputs among the coupling's
};

// A gradient that is wanted, and where it comes from.
struct Target {
  enum class From { zero, matrix, vector, cond_matrix, cond_vector, rows } from = From::zero;
  Sums sums;            // matrix
  std::int64_t at = 0;  // vector: in the slab's memory; cond: column of the hoisted sums
  int rows = 0, columns = 1;
  const int* row_slots = nullptr;  // linear steps: slot of each place
  const int* column_slots = nullptr;
  std::int64_t to = 0;  // first number in grad_weights
  // rows: the gradients' first column, and where the layer's inputs are.
  enum class Input { record, passive, cond } input = Input::record;
  int grad = 0, record = 0;
};

struct StepPlan {
  const Step* step;
  const Coupling* coupling;  // null: a linear step
  std::vector<NetPlan> nets;
  bool by_row = false;  // the condition is an input of each row like any other, not hoisted
  // Weights whose gradients would not stay in the cache: not each tile adds to them, but records
  // and gradients of many rows are kept, over which each part of a gradient is summed up at once.
  bool wide = false;
  const Matrix *linear = nullptr, *linear_undo = nullptr;  // of the pass, and against it
  bool diagonal = false;
  Matrix linear_back;
  Sums linear_weight;
  std::int64_t linear_shift = -1;
  std::vector<Target> targets;
  int raw_width = 0;               // outputs of all nets, padded
  int record = 0;                  // numbers of a row's record; the raw outputs stand first
  int grads = 0;                   // wide: of the gradients of all sums, in the same order
  std::int64_t record_at = 0;      // column in `saved`
  std::int64_t hoisted_width = 0;  // per image
  std::int64_t slab_numbers = 0, back_bytes = 0;
  int inner = 0, kept = 0, inputs = 0, block = 0, widest = 0;  // widths of buffers
};

// A transposed copy of stored inputs [first, first + back.out) of a matrix.
struct Transpose {
  const Matrix *matrix, *back;
  int first;
};

// One step for some images, all rows of which lie together: row i is row order[i] of the caller's.
struct StepJob {
  const Flow* flow;
  const StepPlan* plan;
  const std::byte *packed, *back;
  bool inverse;                  // of the pass
  void *state, *grad;            // (rows, D)
  void* log_det;                 // forward: 16 partial sums per row; backward: its gradient or null
  const std::vector<int>* move;  // places before this step; null: as they are
  std::int64_t first, rows, slab_rows;
  const std::int64_t* order;       // null: the same
  const std::int64_t* image_of;    // per row
  const std::int64_t* segment_of;  // per row; a segment is an image's rows in a slab
  std::int64_t first_image, first_segment;
  std::int64_t images;
  const void* cond;  // (images, cond_ld), from first_image on; by row: the caller's
  std::ptrdiff_t cond_ld;
  void* hoisted;   // (images, hoisted_width); then the gradients of these sums
  void* segments;  // (segments, hoisted_width) of gradients
  // Wide steps: rows [batch_first, batch_first + batch_rows), (batch_rows, record_ld or grads_ld).
  std::int64_t batch_first, batch_rows;
  void *records, *grads;
  std::ptrdiff_t record_ld, grads_ld;
  void* saved;                         // written forward, read backward
  std::int64_t saved_width, state_at;  // state_at: column of the state before this step, -1
  bool store;
  void* slabs;
  std::int64_t started;  // slabs whose memory earlier chunks have written
  bool add;              // to what is in grad_weights
  void* grad_cond;       // (images, C)
  bool cond_by_row;      // grad_cond is (rows, C), in the caller's order
  void* grad_weights;
};

struct TrainingKernels {
  // Per element f32, f64.
  struct Functions {
    void (*transpose)(const Transpose&, const std::byte* packed, std::byte* back, int block);
    void (*hoist)(const StepJob&, const Matrix&, bool gate, int block);
    void (*forward)(const StepJob&, std::int64_t slab);
    void (*backward)(const StepJob&, std::int64_t slab);
    void (*combine)(const StepJob&, std::int64_t image, const std::int64_t* segments_of);
    void (*reduce)(const StepJob&, std::int64_t begin, std::int64_t end, std::int64_t slabs);
    void (*write)(const StepJob&, const Target&, int begin, int end);
    void (*sum_rows)(const StepJob&, const Target&, int begin, int end);
    void (*cond_grad)(const StepJob&, std::int64_t image, int block);
  } of[2];
};

inline constexpr int kTargetRows = 16;   // rows of a target written at a time
inline constexpr int kSummedRows = 256;  // and of one that is summed up over rows

}  // namespace fasthyp::coupling
