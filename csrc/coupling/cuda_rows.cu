// A tile of rows through the flow, or through the part of it between two products.
//
// The warps (of all blocks of the cluster) take the blocks of 16 hidden units in turn: each
// computes them for the tile's rows, and multiplies them at once, still in registers, with the last
// layer's weights. The warps' sums are added in a fixed order; then half a warp owns a row for the
// coupling arithmetic. What a block needs comes in one stage of the warp's own ring, several blocks
// ahead.
#include <algorithm>

#include "common/cuda_device.h"
#include "common/philox.h"
#include "common/simt.h"
#include "coupling/cuda.h"
#include "coupling/cuda_operands.h"

namespace fasthyp::coupling::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMostWarps = 8;
constexpr int kHalf = 16;  // lanes that own a row
constexpr int kTiles = 6;  // B tiles of outputs at a time
constexpr int kColumns = 8 * kTiles;

// Blocks of 16 hidden units or inputs, in the order in which a warp needs them: a cursor over the
// operations of a launch.
struct Cursor {
  int op, chunk, block;
};

template <class P, int kRowTiles>
class Rows {
 public:
  static constexpr int kRows = 16 * kRowTiles;

  __device__ explicit Rows(const RowsCall& call) : call_(call) {
    std::byte* shared = dynamic_shared<std::byte>();
    table_ = reinterpret_cast<int*>(shared);
    state_ = at<float>(shared, call.at_state);
    other_ = at<float>(shared, call.at_other);
    raw_ = at<float>(shared, call.at_raw);
    log_ = at<float>(shared, call.at_log);
    fragments_ = at<uint4>(shared, call.at_fragments);
    sums_ = at<float>(shared, call.at_sums);
    shares_ = at<float>(shared, call.at_shares);
    warps_ = static_cast<int>(blockDim.x) / kWarp;
    warp_ = static_cast<int>(threadIdx.x) / kWarp;
    lane_ = static_cast<int>(threadIdx.x) % kWarp;
    ring_ = shared + call.at_ring + warp_ * call.stages * call.stage;
    tile_row_ = static_cast<std::int64_t>(blockIdx.x / call.split) * kRows;
    rank_ = call.split > 1 ? simt::cluster_rank() : 0;
    one_image_ = image(0) == image(kRows - 1);
  }

  __device__ void run() {
    for (int i = threadIdx.x; i < call_.op_ints; i += blockDim.x) table_[i] = __ldg(call_.ops + i);
    __syncthreads();
    cursor_ = {-1, 0, 0};
    next_op(cursor_);
    for (int i = 0; i + 1 < call_.stages; ++i) prefetch(i);
    begin();
    __syncthreads();
    for (int i = 0; i < call_.op_count; ++i) {
      const RowOp& op = operation(i);
      if (op.kind == RowOp::net) {
        net(op);
      } else {
        if (op.kind == RowOp::couple)
          couple(op);
        else
          linear(op);
        __syncthreads();
      }
    }
    if (rank_ == 0) end();
    if (call_.split > 1) simt::cluster_sync();  // the other block may still read this one's shares
  }

 private:
  template <class T>
  static __device__ T* at(std::byte* shared, int offset) {
    return reinterpret_cast<T*>(shared + offset);
  }
  template <class T>
  __device__ const T* packed(int sixteens) const {
    return reinterpret_cast<const T*>(call_.packed + static_cast<std::int64_t>(sixteens) * 16);
  }
  __device__ const RowOp& operation(int i) const {
    return reinterpret_cast<const RowOp*>(table_)[i];
  }
  __device__ float* state(int row) const { return state_ + row * call_.state_stride; }
  __device__ std::int64_t image(int row) const {
    return min_(call_.first_row + tile_row_ + row, call_.first_row + call_.rows - 1) /
           call_.per_image;
  }
  __device__ const float* hoisted(int row) const {
    return call_.hoisted + (image(row) - call_.first_image) * call_.hoisted_stride;
  }
  static __device__ std::int64_t min_(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
  // All blocks of the cluster, or this block alone.
  __device__ void team_sync() const {
    if (call_.split > 1)
      simt::cluster_sync();
    else
      __syncthreads();
  }

  // --- the ring ---

  __device__ static int chunks(const RowOp& op) {
    return op.form == RowOp::fused || op.form == RowOp::head
               ? 1
               : (op.columns + kColumns - 1) / kColumns;
  }
  __device__ static int units(const RowOp& op) {
    const int outputs = P::kSteps * kTiles / 2;
    return op.form == RowOp::fused  ? op.steps + outputs
           : op.form == RowOp::head ? op.steps
                                    : outputs;
  }
  __device__ int first_block() const { return rank_ * warps_ + warp_; }
  __device__ int stride() const { return call_.split * warps_; }

  // To this warp's first block of the next subnet.
  __device__ void next_op(Cursor& c) const {
    do {
      ++c.op;
    } while (c.op < call_.op_count &&
             (operation(c.op).kind != RowOp::net || first_block() >= operation(c.op).blocks));
    c.chunk = 0;
    c.block = first_block();
  }

  // Starts the copies of the cursor's block, and moves on.
  __device__ void prefetch(int stage) {
    if (cursor_.op < call_.op_count) {
      const RowOp& op = operation(cursor_.op);
      std::byte* to = ring_ + stage * call_.stage;
      const int count = units(op);
      const std::byte* from =
          packed<std::byte>(op.weight) +
          (static_cast<std::int64_t>(cursor_.chunk) * op.blocks + cursor_.block) * count *
              kUnitBytes;
      for (int i = 0; i < count; ++i)
        simt::cp_async16(to + i * kUnitBytes + lane_ * 16, from + i * kUnitBytes + lane_ * 16,
                         true);
      to += count * kUnitBytes;
      if (op.form == RowOp::fused || op.form == RowOp::head) {
        // first-layer sums of the condition and the bias: one row for all if they share an image
        const int pieces = (one_image_ ? 1 : kRows) * 4;
        for (int i = lane_; i < pieces; i += kWarp)
          simt::cp_async16(to + i / 4 * kRowBytes + i % 4 * 16,
                           hoisted(i / 4) + op.hoisted + cursor_.block * 16 + i % 4 * 4, true);
      } else if (op.form == RowOp::tail) {
        constexpr int kPieces = sizeof(typename P::Element);  // of 16 bytes in 16 numbers
        for (int i = lane_; i < kRows * kPieces; i += kWarp) {
          const std::int64_t row = tile_row_ + i / kPieces;
          simt::cp_async16(
              to + i / kPieces * kRowBytes + i % kPieces * 16,
              hidden(op.hidden, row < call_.rows ? row : 0, cursor_.block * 16) + i % kPieces * 16,
              row < call_.rows);
        }
      }
      cursor_.block += stride();
      if (cursor_.block >= op.blocks) {
        cursor_.block = first_block();
        if (++cursor_.chunk == chunks(op)) next_op(cursor_);
      }
    }
    simt::cp_async_commit();
  }

  // The stage of the warp's next block.
  __device__ const std::byte* next_stage() {
    switch (call_.stages) {
      case 2:
        simt::cp_async_wait<0>();
        break;
      case 3:
        simt::cp_async_wait<1>();
        break;
      default:
        simt::cp_async_wait<2>();
    }
    __syncwarp();  // all lanes' copies are here, and the stage before has been read
    prefetch((stage_ + call_.stages - 1) % call_.stages);
    const std::byte* stage = ring_ + stage_ * call_.stage;
    stage_ = (stage_ + 1) % call_.stages;
    return stage;
  }

  __device__ std::byte* hidden(int buffer, std::int64_t row, int column) const {
    return call_.hidden + buffer * call_.hidden_bytes +
           (row * call_.hidden_columns + column) *
               static_cast<std::int64_t>(sizeof(typename P::Element));
  }

  // --- subnets ---

  __device__ void net(const RowOp& op) {
    if (op.form != RowOp::tail) {
      gather(op);
      __syncthreads();
    }
    if (op.form == RowOp::head) {
      for (int block = first_block(); block < op.blocks; block += stride()) {
        float h[kRowTiles][2][4];
        first_layer(op, next_stage(), op.steps * kUnitBytes, h);
        store_hidden(op, block * 16, h);
      }
      __syncthreads();  // the fragments have been read
      return;
    }
    for (int chunk = 0; chunk < chunks(op); ++chunk) {
      float sums[kRowTiles][kTiles][4] = {};
      for (int block = first_block(); block < op.blocks; block += stride()) {
        const std::byte* stage = next_stage();
        typename P::A a[kRowTiles][P::kSteps];
        const std::byte* weights = stage;
        if (op.form == RowOp::fused) {
          float h[kRowTiles][2][4];
          first_layer(op, stage, units(op) * kUnitBytes, h);
          activate(h, op.activation, as_float(op.slope));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) P::split(h[m], a[m]);
          weights += op.steps * kUnitBytes;
        } else {
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            if (op.form == RowOp::tail) {
              P::load(stage + units(op) * kUnitBytes + m * 16 * kRowBytes, kRowBytes, lane_, a[m]);
            } else {
#pragma unroll
              for (int s = 0; s < P::kSteps; ++s) a[m][s] = fragment(block * P::kSteps + s, m);
            }
          }
        }
        last_layer(weights, a, sums);
      }
      reduce(op, chunk, sums);
    }
  }

  __device__ typename P::A fragment(int step, int row_tile) const {
    typename P::A a;
#pragma unroll
    for (int part = 0; part < P::kParts; ++part) {
      const uint4 r =
          fragments_[((step * kRowTiles + row_tile) * P::kParts + part) * kWarp + lane_];
      a.r[part][0] = r.x;
      a.r[part][1] = r.y;
      a.r[part][2] = r.z;
      a.r[part][3] = r.w;
    }
    return a;
  }

  // The passive slots of all rows as A operands.
  __device__ void gather(const RowOp& op) {
    const int* slots = table_ + op.slots;
    const int sixteens = (op.steps + P::kSteps - 1) / P::kSteps;
    for (int i = threadIdx.x; i < sixteens * kRowTiles * kWarp; i += blockDim.x) {
      const int lane = i % kWarp, row_tile = i / kWarp % kRowTiles, sixteen = i / kWarp / kRowTiles;
      const float* low = state(row_tile * 16 + lane / 4);
      const float* high = low + 8 * call_.state_stride;
      float v[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int slot = slots[sixteen * 16 + j * 8 + lane % 4 * 2 + k];
          v[j][k] = slot < 0 ? 0.0f : low[slot];
          v[j][2 + k] = slot < 0 ? 0.0f : high[slot];
        }
      }
      typename P::A a[P::kSteps];
      P::split(v, a);
#pragma unroll
      for (int s = 0; s < P::kSteps; ++s)
#pragma unroll
        for (int part = 0; part < P::kParts; ++part)
          fragments_[(((sixteen * P::kSteps + s) * kRowTiles + row_tile) * P::kParts + part) *
                         kWarp +
                     lane] =
              make_uint4(a[s].r[part][0], a[s].r[part][1], a[s].r[part][2], a[s].r[part][3]);
    }
  }

  // h = (sums of condition and bias) + W x for 16 hidden units.
  __device__ void first_layer(const RowOp& op, const std::byte* stage, int init,
                              float (&h)[kRowTiles][2][4]) {
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = one_image_ ? 0 : m * 16 + half * 8 + g;
        const std::byte* from = stage + init + row * kRowBytes + t * 8;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 v = *reinterpret_cast<const float2*>(from + j * 32);
          h[m][j][2 * half] = v.x;
          h[m][j][2 * half + 1] = v.y;
        }
      }
    for (int step = 0; step < op.steps; ++step) {
      const uint4 w = *reinterpret_cast<const uint4*>(stage + step * kUnitBytes + lane_ * 16);
      const typename P::B b0 = P::weight(w.x, w.y), b1 = P::weight(w.z, w.w);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const typename P::A a = fragment(step, m);
        P::multiply(h[m][0], a, b0);
        P::multiply(h[m][1], a, b1);
      }
    }
  }

  // sums += a W for up to kColumns outputs.
  __device__ void last_layer(const std::byte* weights,
                             const typename P::A (&a)[kRowTiles][P::kSteps],
                             float (&sums)[kRowTiles][kTiles][4]) {
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      float part[kRowTiles][2][4] = {};
#pragma unroll
      for (int s = 0; s < P::kSteps; ++s) {
        const uint4 w = *reinterpret_cast<const uint4*>(
            weights + (s * (kTiles / 2) + pair) * kUnitBytes + lane_ * 16);
        const typename P::B b0 = P::weight(w.x, w.y), b1 = P::weight(w.z, w.w);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          if constexpr (kShortSums<P>) {
            P::multiply(part[m][0], a[m][s], b0);
            P::multiply(part[m][1], a[m][s], b1);
          } else {
            P::multiply(sums[m][2 * pair], a[m][s], b0);
            P::multiply(sums[m][2 * pair + 1], a[m][s], b1);
          }
        }
      }
      if constexpr (kShortSums<P>) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[m][2 * pair + i / 4][i % 4] += part[m][i / 4][i % 4];
      }
    }
  }

  // Adds the warps' sums of outputs [chunk * kColumns, ...) to raw.
  __device__ void reduce(const RowOp& op, int chunk, const float (&sums)[kRowTiles][kTiles][4]) {
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float* to = sums_ + (warp_ * kRows + m * 16 + g) * kColumns + n * 8 + t * 2;
        *reinterpret_cast<float2*>(to) = make_float2(sums[m][n][0], sums[m][n][1]);
        *reinterpret_cast<float2*>(to + 8 * kColumns) = make_float2(sums[m][n][2], sums[m][n][3]);
      }
    __syncthreads();
    constexpr int kNumbers = kRows * kColumns;
    float* share = shares_ + parity_ * kNumbers;
    for (int i = threadIdx.x; i < kNumbers; i += blockDim.x) {
      float sum = sums_[i];
      for (int w = 1; w < warps_; ++w) sum += sums_[w * kNumbers + i];
      share[i] = sum;
    }
    team_sync();
    const float* bias = packed<float>(op.bias);
    for (int i = threadIdx.x; i < kNumbers; i += blockDim.x) {
      const int row = i / kColumns, column = chunk * kColumns + i % kColumns;
      if (column >= op.columns) continue;
      float sum = call_.split > 1 ? simt::cluster_peer(share, 0)[i] : share[i];
      for (int r = 1; r < call_.split; ++r) sum += simt::cluster_peer(share, r)[i];
      sum += op.form == RowOp::single && op.hoisted >= 0 ? hoisted(row)[op.hoisted + column]
                                                         : bias[column];
      raw_[row * call_.raw_stride + op.raw + column] = sum;
    }
    parity_ ^= 1;  // a slower block may still read this share
    __syncthreads();
  }

  __device__ void store_hidden(const RowOp& op, int column, float (&h)[kRowTiles][2][4]) {
    if (op.kept >= 0)
      each_pair(tile_row_, call_.rows, column, lane_, h,
                [&](std::int64_t row, int at, float& x, float& y) {
                  *reinterpret_cast<float2*>(call_.kept + op.kept * call_.kept_numbers +
                                             row * call_.hidden_columns + at) = make_float2(x, y);
                });
    if (op.norm >= 0)
      each_pair(tile_row_, call_.rows, column, lane_, h,
                [&](std::int64_t, int at, float& x, float& y) {
                  const float *scale = packed<float>(op.norm), *shift = scale + op.blocks * 16;
                  x = x * scale[at] + shift[at];
                  y = y * scale[at + 1] + shift[at + 1];
                });
    activate(h, op.activation, as_float(op.slope));
    each_pair(tile_row_, call_.rows, column, lane_, h,
              [&](std::int64_t row, int at, float& x, float& y) {
                P::store_pair(hidden(op.hidden, row, at), x, y);
              });
  }

  // --- half a warp per row ---

  // The sum over the lanes of half a warp, in all of them.
  __device__ float half_sum(float v) const {
    const unsigned lanes = 0xffffu << (lane_ & kHalf);
#pragma unroll
    for (int offset = kHalf / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(lanes, v, offset);
    return v;
  }

  __device__ void couple(const RowOp& op) {
    const int* slots = table_ + op.slots;
    const int lane = lane_ % kHalf;
    const float clamp = as_float(op.clamp);
    for (int row = threadIdx.x / kHalf; row < kRows; row += blockDim.x / kHalf) {
      float* x = state(row);
      float* s = raw_ + row * call_.raw_stride + op.raw;
      const float* t = raw_ + row * call_.raw_stride + op.shift;
      if (op.mode == 1) {
        for (int i = lane; i < op.count; i += kHalf) {
          float& v = x[slots[i]];
          v = call_.inverse ? v - t[i] : v + t[i];
        }
        continue;
      }
      float sum = 0;
      for (int i = lane; i < op.count; i += kHalf) {
        s[i] = soft_clamp(s[i], clamp, op.clamp_kind);
        sum += s[i];
      }
      sum = half_sum(sum);
      const float mean = op.mode == 2 ? sum / static_cast<float>(op.count) : 0.0f;
      for (int i = lane; i < op.count; i += kHalf) {
        float& v = x[slots[i]];
        const float scale = s[i] - mean;
        v = call_.inverse ? (v - t[i]) * expf(-scale) : fmaf(v, expf(scale), t[i]);
      }
      if (op.mode == 0 && lane == 0) log_[row] += sum;
    }
  }

  __device__ void linear(const RowOp& op) {
    const int dim = call_.dim;
    const float *weight = packed<float>(op.weight), *shift = packed<float>(op.bias);
    if (op.mode == 1) {
      for (int i = threadIdx.x; i < kRows * dim; i += blockDim.x) {
        float& v = state(i / dim)[i % dim];
        v = fmaf(v, weight[i % dim], shift[i % dim]);
      }
      return;
    }
    // Threads take outputs, and as many rows as there are threads per output leave them.
    const int columns = (dim + kWarp - 1) / kWarp * kWarp;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int groups = columns < threads ? threads / columns : 1;
    const int group = columns < threads ? thread / columns : 0;
    for (int k = columns < threads ? thread % columns : thread; k < dim && group < groups;
         k += blockDim.x) {
      for (int first = group * 4; first < kRows; first += groups * 4) {
        float sum[4] = {};
#pragma unroll 8
        for (int i = 0; i < dim; ++i) {
          const float w = __ldg(weight + static_cast<std::int64_t>(i) * dim + k);
#pragma unroll
          for (int r = 0; r < 4; ++r) sum[r] = fmaf(state(first + r)[i], w, sum[r]);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
          other_[(first + r) * call_.state_stride + k] = sum[r] + shift[k];
      }
    }
    float* swapped = state_;
    state_ = other_;
    other_ = swapped;
  }

  // The state of all rows, their log-scales and log-densities so far.
  __device__ void begin() {
    const int lane = lane_ % kHalf;
    for (int row = threadIdx.x / kHalf; row < kRows; row += blockDim.x / kHalf) {
      float* x = state(row);
      const std::int64_t index = tile_row_ + row;
      const bool exists = index < call_.rows;
      if (!call_.first || !exists) {
        for (int k = lane; k < call_.dim; k += kHalf)
          x[k] = exists ? call_.state[index * call_.dim + k] : 0.0f;
        if (lane == 0) log_[row] = exists ? call_.log_scale[index] : 0.0f;
        continue;
      }
      if (lane == 0) log_[row] = 0.0f;
      if (!call_.input) {
        draw(row, lane, x);
        continue;
      }
      const float* in = call_.input + (call_.first_row + index) * call_.dim;
      for (int k = lane; k < call_.dim; k += kHalf)
        x[call_.inverse ? __ldg(call_.output_index + k) : k] = in[k];
    }
  }

  // The latent of one row, and the log-density of its noise.
  __device__ void draw(int row, int lane, float* x) {
    const std::int64_t index = call_.first_row + tile_row_ + row;
    const std::int64_t image = index / call_.per_image;
    const int noise = call_.dim - call_.fixed_dims;
    std::uint64_t seed = call_.seed;
    std::int64_t number = call_.image_offset + image;
    std::int64_t hypothesis = call_.first_sample + index % call_.per_image;
    if (call_.counter) {
      seed += static_cast<std::uint64_t>(call_.counter[0]);
      number += call_.counter[1];
      hypothesis += call_.counter[2];
    }
    const bool zero = call_.include_mode && hypothesis == 0;
    const auto low = static_cast<std::uint32_t>(seed);
    const auto high = static_cast<std::uint32_t>(seed >> 32);
    float squares = 0;
    for (int group = lane; group * 4 < noise; group += kHalf) {
      const philox::Words w = philox::philox4x32(
          {{static_cast<std::uint32_t>(group), static_cast<std::uint32_t>(hypothesis),
            static_cast<std::uint32_t>(number), 0}},
          low, high);
      float z[4];
      philox::box_muller(w.w[0], w.w[1], &z[0], &z[1]);
      philox::box_muller(w.w[2], w.w[3], &z[2], &z[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = group * 4 + i;
        if (k >= noise) continue;
        const float v = zero ? 0.0f : z[i];
        squares = fmaf(v, v, squares);
        x[__ldg(call_.output_index + k)] = v;
      }
    }
    for (int k = lane; k < call_.fixed_dims; k += kHalf)
      x[__ldg(call_.output_index + noise + k)] = call_.fixed[image * call_.fixed_dims + k];
    squares = half_sum(squares);
    if (lane == 0 && rank_ == 0)
      call_.log_noise[tile_row_ + row] =
          -0.5f * squares - static_cast<float>(noise * 0.91893853320467274178);  // ln sqrt(2 pi)
  }

  __device__ void end() {
    const int lane = lane_ % kHalf;
    for (int row = threadIdx.x / kHalf; row < kRows; row += blockDim.x / kHalf) {
      const float* x = state(row);
      const std::int64_t index = tile_row_ + row;
      if (index >= call_.rows) continue;
      if (!call_.last) {
        for (int k = lane; k < call_.dim; k += kHalf) call_.state[index * call_.dim + k] = x[k];
        if (lane == 0) call_.log_scale[index] = log_[row];
        continue;
      }
      float* out = call_.output + (call_.first_row + index) * call_.dim;
      for (int k = lane; k < call_.dim; k += kHalf)
        out[k] = x[call_.inverse ? k : __ldg(call_.output_index + k)];
      if (lane > 0) continue;
      // Of the inverse, -log_det; the density of a drawn output is the noise's less log|dx/dz|.
      const float log_det = log_[row] + call_.constant;
      call_.log_det[call_.first_row + index] = !call_.input    ? call_.log_noise[index] + log_det
                                               : call_.inverse ? -log_det
                                                               : log_det;
    }
  }

  const RowsCall& call_;
  int* table_;
  float *state_, *other_, *raw_, *log_, *sums_, *shares_;
  uint4* fragments_;
  std::byte* ring_;
  int warps_, warp_, lane_, rank_, stage_ = 0, parity_ = 0;
  std::int64_t tile_row_;
  bool one_image_;
  Cursor cursor_;
};

template <class P, int kRowTiles>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    rows_kernel(const __grid_constant__ RowsCall call) {
  Rows<P, kRowTiles>(call).run();
}

// Lays the shared memory out for the most warps and stages that fit; false if none do.
template <class P, int kRowTiles>
bool lay_out(RowsCall& c, const Plan& plan, std::int64_t limit) {
  constexpr std::int64_t kRows = 16 * kRowTiles, kFloat = sizeof(float);
  for (c.warps = kMostWarps; c.warps >= 1; c.warps /= 2) {
    std::int64_t end = 0;
    const auto take = [&](std::int64_t bytes) {
      const std::int64_t from = end;
      end += (bytes + 15) / 16 * 16;
      return static_cast<int>(from);
    };
    c.state_stride = static_cast<int>(plan.dim) | 1;
    c.raw_stride = static_cast<int>(plan.raw) | 1;
    take(c.op_ints * static_cast<std::int64_t>(sizeof(int)));
    c.at_state = take(kRows * c.state_stride * kFloat);
    c.at_other = plan.linear ? take(kRows * c.state_stride * kFloat) : 0;
    c.at_raw = take(kRows * c.raw_stride * kFloat);
    c.at_log = take(kRows * kFloat);
    c.at_fragments = take(plan.steps * kRowTiles * P::kParts * kUnitBytes);
    c.at_sums = take(c.warps * kRows * kColumns * kFloat);
    c.at_shares = take(2 * kRows * kColumns * kFloat);
    c.stage = static_cast<int>(plan.units * kUnitBytes + kRows * kRowBytes);
    c.at_ring = take(0);
    for (c.stages = 4; c.stages >= 2; --c.stages) {
      const std::int64_t total = end + static_cast<std::int64_t>(c.warps) * c.stages * c.stage;
      if (total > limit) continue;
      c.shared = static_cast<int>(total);
      return true;
    }
  }
  return false;
}

template <class P, int kRowTiles>
cudaError_t launch(const RowsCall& c, int device, cudaStream_t stream) {
  const auto kernel = rows_kernel<P, kRowTiles>;
  static SharedMemory allowed;
  const int error = allowed.allow(reinterpret_cast<const void*>(kernel), device);
  if (error != cudaSuccess) return static_cast<cudaError_t>(error);
  constexpr std::int64_t kRows = 16 * kRowTiles;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((c.rows + kRows - 1) / kRows * c.split));
  config.blockDim = dim3(static_cast<unsigned>(c.warps * kWarp));
  config.dynamicSmemBytes = static_cast<std::size_t>(c.shared);
  config.stream = stream;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(c.split);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = c.split > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, c);
}

template <class P>
cudaError_t launch(RowsCall c, const Plan& plan, int device, cudaStream_t stream) {
  const DeviceLimits limits = device_limits(device);
  // All weights pass through a multiprocessor once per tile. Many rows: wide tiles; few rows:
  // narrow ones, whose hidden units are shared by as many multiprocessors as there are.
  const std::int64_t tiles = (c.rows + 15) / 16;
  c.split = 1;
  if (tiles > 2 * limits.processors && lay_out<P, 2>(c, plan, limits.shared))
    return launch<P, 2>(c, device, stream);
  if (!lay_out<P, 1>(c, plan, limits.shared)) return cudaErrorInvalidConfiguration;
  while (limits.clusters && c.split < 8 && tiles * c.split * 2 <= limits.processors) c.split *= 2;
  return launch<P, 1>(c, device, stream);
}

}  // namespace

bool fits(const Plan& plan, int device) {
  const std::int64_t limit = device_limits(device).shared;
  RowsCall trial{};
  for (const auto& launches : plan.launches)
    for (const Launch& launch : launches)
      if (const auto* rows = std::get_if<RowsLaunch>(&launch))
        trial.op_ints = std::max(trial.op_ints, static_cast<int>(rows->op_ints));
  switch (plan.precision) {
    case Precision::tf32x3:
      return lay_out<Tf32x3, 1>(trial, plan, limit);
    case Precision::tf32:
      return lay_out<Tf32, 1>(trial, plan, limit);
    case Precision::bf16:
      return lay_out<Bf16, 1>(trial, plan, limit);
  }
  return false;
}

int launch_rows(const RowsCall& call, const Plan& plan, int device, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (plan.precision) {
    case Precision::tf32x3:
      return launch<Tf32x3>(call, plan, device, on);
    case Precision::tf32:
      return launch<Tf32>(call, plan, device, on);
    case Precision::bf16:
      return launch<Bf16>(call, plan, device, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fasthyp::coupling::cuda
