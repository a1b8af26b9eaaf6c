// One step of a flow in training: compiled once per SIMD level.
//
// A thread owns a slab of rows and takes them through the step a tile at a time. All layers of the
// tile's subnets are kept (its records); then gradients go back through them, a chunk of a layer's
// units at a time, which meet everything that needs them while they are in the cache: the layer's
// own weight gradient, that of the layer before, the sums per image. Where weights are too many for
// that (wide steps), records and gradients of many rows are kept, and the threads then sum up parts
// of the weight gradients over all of these rows. Every sum is made in an order that depends on
// shapes alone.
#include <algorithm>

#include "coupling/cpu_outer.h"
#include "coupling/cpu_step.h"
#include "coupling/cpu_step_gradient.h"
#include "coupling/training.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

using coupling::Target;

template <class S>
void forward(const StepJob& job, std::int64_t slab) {
  StepRows<S>(job).forward(slab);
}
template <class S>
void backward(const StepJob& job, std::int64_t slab) {
  StepGradient<S>(job).backward(slab);
}

// One block of a transposed matrix, and its bias of zeros.
template <class S>
void transpose(const coupling::Transpose& t, const std::byte* packed, std::byte* to, int block) {
  const Matrix &m = *t.matrix, &back = *t.back;
  const S* from = reinterpret_cast<const S*>(packed + m.weight);
  const std::int64_t stored = m.cond_padded + m.in_padded;
  S* out = reinterpret_cast<S*>(to + back.weight) + std::int64_t(block) * back.in * back.block;
  const int first = block * back.block, count = std::min(back.block, back.out - first);
  for (int b = 0; b < m.blocks; ++b) {
    const int outputs = std::min(m.block, m.out - b * m.block);
    const S* w = from + (b * stored + t.first + first) * m.block;
    S* column = out + std::int64_t(b) * m.block * back.block;
    for (int o = 0; o < outputs; ++o, column += back.block) {
      for (int i = 0; i < count; ++i) column[i] = w[i * m.block + o];
      std::fill(column + count, column + back.block, S(0));
    }
  }
  std::fill_n(reinterpret_cast<S*>(to + back.bias) + first, back.block, S(0));
}

template <class S>
void hoist(const StepJob& job, const Matrix& m, bool gate, int block) {
  const std::int64_t width = job.plan->hoisted_width;
  for (std::int64_t image = 0; image < job.images; image += kTile) {
    const int count = static_cast<int>(std::min<std::int64_t>(kTile, job.images - image));
    S* out = static_cast<S*>(job.hoisted) + image * width + m.hoisted + block * m.block;
    Product<Plain<S>>(m, job.packed,
                      {static_cast<const S*>(job.cond) + image * job.cond_ld, job.cond_ld, count})
        .condition_sums(block, out, width);
    if (!gate) continue;
    for (int r = 0; r < count; ++r)
      for (int n = 0; n < m.block; n += kLanes<S>)
        store<S>(out + r * width + n, sigmoid<S>(load<S>(out + r * width + n)));
  }
}

// The gradients of an image's hoisted sums, over its segments, to where the sums were.
template <class S>
void combine(const StepJob& job, std::int64_t image, const std::int64_t* segments_of) {
  const StepPlan& plan = *job.plan;
  const std::int64_t width = plan.hoisted_width;
  const S* segments = static_cast<const S*>(job.segments);
  S* to = static_cast<S*>(job.hoisted) + image * width;
  const auto columns = [&](std::int64_t at, int count, bool gate) {
    for (std::int64_t n = at; n < at + count; n += kLanes<S>) {
      Vec<S> sum = splat<S>(0);
      for (std::int64_t s = segments_of[image]; s < segments_of[image + 1]; ++s)
        sum = sum + load<S>(segments + (s - job.first_segment) * width + n);
      if (gate) {
        const Vec<S> y = load<S>(to + n);
        sum = sum * (splat<S>(1) - y) * y;
      }
      store<S>(to + n, sum);
    }
  };
  for (const NetPlan& net : plan.nets)
    for (const LayerPlan& layer : net.layers) {
      const Matrix& m = layer.dense.matrix;
      if (m.cond_padded > 0) columns(m.hoisted, m.out_padded(), false);
      if (layer.dense.gate) columns(layer.dense.gate->hoisted, m.out_padded(), true);
    }
}

// Slab numbers [begin, end), over all slabs, to the first one.
template <class S>
void reduce(const StepJob& job, std::int64_t begin, std::int64_t end, std::int64_t slabs) {
  S* to = static_cast<S*>(job.slabs);
  const std::int64_t stride = job.plan->slab_numbers;
  for (std::int64_t n = begin; n < end; n += 16) {  // whole cache lines
    Vec<S> sum[16 / kLanes<S>];
    for (int i = 0; i < 16 / kLanes<S>; ++i) sum[i] = load<S>(to + n + i * kLanes<S>);
    for (std::int64_t s = 1; s < slabs; ++s)
      for (int i = 0; i < 16 / kLanes<S>; ++i)
        sum[i] = sum[i] + load<S>(to + s * stride + n + i * kLanes<S>);
    for (int i = 0; i < 16 / kLanes<S>; ++i) store<S>(to + n + i * kLanes<S>, sum[i]);
  }
}

// Rows [begin, end) of a target.
template <class S>
void write(const StepJob& job, const Target& t, int begin, int end) {
  constexpr int kRowsAtOnce = 128;  // images
  const S* slab = static_cast<const S*>(job.slabs);
  S* to = static_cast<S*>(job.grad_weights) + t.to;
  const std::int64_t width = job.plan->hoisted_width;
  const auto row = [&](int i) {
    return to + std::int64_t(t.row_slots ? t.row_slots[i] : i) * t.columns;
  };
  switch (t.from) {
    case Target::From::rows:  // see sum_rows
      break;
    case Target::From::zero:
      std::fill(to + std::int64_t(begin) * t.columns, to + std::int64_t(end) * t.columns, S(0));
      break;
    case Target::From::vector:
      for (int i = begin; i < end; ++i) *row(i) = slab[t.at + i];
      break;
    case Target::From::matrix: {
      const S* from = slab + t.sums.at;
      const std::ptrdiff_t down = t.sums.transposed ? 1 : t.sums.ld,
                           right = t.sums.transposed ? t.sums.ld : 1;
      if (!t.sums.transposed && !t.column_slots) {
        for (int i = begin; i < end; ++i) std::copy_n(from + i * down, t.columns, row(i));
        break;
      }
      for (int j = 0; j < t.columns; ++j)
        for (int i = begin; i < end; ++i)
          row(i)[t.column_slots ? t.column_slots[j] : j] = from[i * down + j * right];
      break;
    }
    case Target::From::cond_vector:
      for (int i = begin; i < end; ++i) {
        S sum = 0;
        for (std::int64_t image = 0; image < job.images; image += kRowsAtOnce) {
          S part = 0;
          const std::int64_t last = std::min<std::int64_t>(image + kRowsAtOnce, job.images);
          for (std::int64_t k = image; k < last; ++k)
            part += static_cast<const S*>(job.hoisted)[k * width + t.at + i];
          sum += part;
        }
        to[i] = job.add ? to[i] + sum : sum;
      }
      break;
    case Target::From::cond_matrix: {
      thread_local Scratch scratch;
      scratch.reserve(Scratch::bytes<S>((end - begin) * job.cond_ld));
      S* sums = scratch.take<S>((end - begin) * job.cond_ld);
      for (std::int64_t image = 0; image < job.images; image += kRowsAtOnce)
        outer<S>(static_cast<const S*>(job.hoisted) + image * width + t.at + begin, width,
                 end - begin, static_cast<const S*>(job.cond) + image * job.cond_ld, job.cond_ld,
                 t.columns,
                 static_cast<int>(std::min<std::int64_t>(kRowsAtOnce, job.images - image)), sums,
                 job.cond_ld, image > 0);
      for (int i = begin; i < end; ++i)
        for (int j = 0; j < t.columns; ++j) {
          const S v = sums[(i - begin) * job.cond_ld + j];
          row(i)[j] = job.add ? row(i)[j] + v : v;
        }
      break;
    }
  }
}

// Rows [begin, end) of a target that is summed up over the rows of a batch.
template <class S>
void sum_rows(const StepJob& job, const Target& t, int begin, int end) {
  const S* inputs = nullptr;
  std::ptrdiff_t ld = 0;
  switch (t.input) {
    case Target::Input::record:
      inputs = static_cast<const S*>(job.records) + t.record;
      ld = job.record_ld;
      break;
    case Target::Input::passive:
      ld = job.flow->dim;
      inputs =
          static_cast<const S*>(job.state) + job.batch_first * ld + job.plan->coupling->passive_at;
      break;
    case Target::Input::cond:
      ld = job.flow->cond_dim;
      inputs = static_cast<const S*>(job.cond) + job.batch_first * ld;
      break;
  }
  thread_local Scratch scratch;
  outer_rows<S>(static_cast<const S*>(job.grads) + t.grad + begin, job.grads_ld, end - begin,
                inputs, ld, t.columns, job.batch_rows,
                static_cast<S*>(job.grad_weights) + t.to + std::int64_t(begin) * t.columns,
                t.columns, job.add, scratch);
}

// Gradients of the condition of some images, one block of its numbers.
template <class S>
void cond_grad(const StepJob& job, std::int64_t image, int block) {
  const StepPlan& plan = *job.plan;
  const int rows = static_cast<int>(std::min<std::int64_t>(kTile, job.images - image));
  S sums[kTile * 3 * kLanes<S>];
  const auto add = [&](const Matrix& m, std::int64_t column) {
    const S* g = static_cast<const S*>(job.hoisted) + image * plan.hoisted_width + column;
    const Product<Plain<S>> product(m, job.back, {g, plan.hoisted_width, rows});
    product.sums(block, sums, m.block);
    const int first = block * m.block, count = std::min(m.block, m.out - first);
    for (int r = 0; r < rows; ++r) {
      S* to = static_cast<S*>(job.grad_cond) + (image + r) * job.flow->cond_dim + first;
      for (int k = 0; k < count; ++k) to[k] += sums[r * m.block + k];
    }
  };
  for (const NetPlan& net : plan.nets)
    for (const LayerPlan& layer : net.layers) {
      if (layer.cond_back) add(*layer.cond_back, layer.dense.matrix.hoisted);
      if (layer.gate_back) add(*layer.gate_back, layer.dense.gate->hoisted);
    }
}

}  // namespace

extern const coupling::TrainingKernels coupling_training_kernels;
const coupling::TrainingKernels coupling_training_kernels = {
    {{transpose<float>, hoist<float>, forward<float>, backward<float>, combine<float>,
      reduce<float>, write<float>, sum_rows<float>, cond_grad<float>},
     {transpose<double>, hoist<double>, forward<double>, backward<double>, combine<double>,
      reduce<double>, write<double>, sum_rows<double>, cond_grad<double>}}};

}  // namespace fasthyp::FASTHYP_SIMD
