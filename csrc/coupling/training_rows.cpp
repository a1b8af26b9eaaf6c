#include "coupling/training_rows.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace fasthyp::coupling {

namespace {

constexpr std::int64_t kImageBytes = std::int64_t(16) << 20;  // hoisted sums held at a time
constexpr std::int64_t kSlabBytes = std::int64_t(64) << 20;   // gradients of all slabs
constexpr std::int64_t kBatchBytes = std::int64_t(64) << 20;  // wide steps: what is kept of rows
// Hoisted sums, and their gradients, are many numbers. Where rows share few conditions, each row
// reads its own, if its weights are few enough for their gradients to stay in the cache.
constexpr std::int64_t kSharing = 2;  // rows of a condition, on average, that are worth it
constexpr int kRowCond = 256;         // numbers of a condition that is read by row, at most

}  // namespace

template <class T>
Images find_images(const Flow& flow, std::int64_t images, std::int64_t per_image, const T* cond) {
  Images found{images, per_image, {}};
  if (flow.hoisted_width == 0 || per_image != 1) return found;
  Distinct d =
      find_distinct(reinterpret_cast<const std::byte*>(cond), images, flow.cond_dim * sizeof(T));
  if (static_cast<std::int64_t>(d.first.size()) * kSharing <= images)
    found.distinct = std::move(d);
  else
    found.by_row = !flow.gated && flow.cond_dim <= kRowCond;
  return found;
}

template <class T>
Rows arrange(const Flow& flow, const std::vector<StepPlan>& plans, Images found, const T* cond) {
  std::int64_t images = found.count;
  Rows r;
  r.count = images * found.per_image;
  if (found.by_row) r.by_row = cond;
  std::int64_t hoisted = 0, slab = 1, kept = 1;
  for (const StepPlan& p : plans) {
    hoisted = std::max(hoisted, p.hoisted_width);
    slab = std::max(slab, p.slab_numbers);
    if (p.wide) kept = std::max<std::int64_t>(kept, p.record + p.grads);
  }
  r.image_of.resize(r.count);
  for (std::int64_t i = 0; i < r.count; ++i) r.image_of[i] = i / found.per_image;
  std::vector<std::int64_t> first;  // distinct rows of cond
  if (found.distinct) {
    Distinct& d = *found.distinct;
    images = static_cast<std::int64_t>(d.first.size());
    first = std::move(d.first);
    if (!std::is_sorted(d.index.begin(), d.index.end())) {
      r.order.resize(r.count);
      std::iota(r.order.begin(), r.order.end(), 0);
      std::stable_sort(r.order.begin(), r.order.end(),
                       [&](std::int64_t a, std::int64_t b) { return d.index[a] < d.index[b]; });
    }
    std::sort(d.index.begin(), d.index.end());
    r.image_of = std::move(d.index);
  }
  if (hoisted > 0) {
    r.cond_ld = round_up(flow.cond_dim, 16);
    r.cond = Memory(images * r.cond_ld * static_cast<std::int64_t>(sizeof(T)));
    for (std::int64_t i = 0; i < images; ++i) {
      T* to = reinterpret_cast<T*>(r.cond.data()) + i * r.cond_ld;
      const T* from = cond + (first.empty() ? i : first[i]) * flow.cond_dim;
      std::fill(std::copy_n(from, flow.cond_dim, to), to + r.cond_ld, T(0));
    }
  }
  std::vector<std::int64_t> row_of(images + 1, 0);  // first row of each image
  for (std::int64_t i = 0; i < r.count; ++i) ++row_of[r.image_of[i] + 1];
  for (std::int64_t i = 0; i < images; ++i) row_of[i + 1] += row_of[i];

  const std::int64_t limit =
      hoisted > 0 ? std::max<std::int64_t>(
                        1, kImageBytes / (hoisted * static_cast<std::int64_t>(sizeof(T))))
                  : images;
  for (std::int64_t i = 0; i < images; i += limit) {
    const std::int64_t n = std::min(limit, images - i);
    r.chunks.push_back({i, n, row_of[i], row_of[i + n] - row_of[i], 0, 0});
  }
  std::int64_t most_rows = 0;
  for (const auto& c : r.chunks) most_rows = std::max(most_rows, c.rows);
  // Many slabs keep threads evenly busy, large ones read and write gradients less often.
  r.slab_rows = std::clamp<std::int64_t>(round_up((most_rows + 11) / 12, 12), 24, 384);
  const std::int64_t most_slabs =
      std::max<std::int64_t>(1, kSlabBytes / (slab * static_cast<std::int64_t>(sizeof(T))));
  r.slab_rows = std::max(r.slab_rows, round_up((most_rows + most_slabs - 1) / most_slabs, 12));
  r.slabs = (most_rows + r.slab_rows - 1) / r.slab_rows;
  const std::int64_t slab_bytes = r.slab_rows * kept * static_cast<std::int64_t>(sizeof(T));
  r.batch_slabs = std::clamp<std::int64_t>(kBatchBytes / slab_bytes, 1, r.slabs);

  r.segment_of.resize(r.count);
  r.segments_of.resize(images + 1);
  std::int64_t segment = -1;
  for (auto& c : r.chunks) {
    c.first_segment = segment + 1;
    for (std::int64_t i = 0; i < c.rows; ++i) {
      const std::int64_t row = c.first + i;
      const bool starts = i == 0 || r.image_of[row] != r.image_of[row - 1];
      if (starts || i % r.slab_rows == 0) ++segment;
      if (starts) r.segments_of[r.image_of[row]] = segment;
      r.segment_of[row] = segment;
    }
    c.segments = segment + 1 - c.first_segment;
    r.most_images = std::max(r.most_images, c.images);
    r.most_segments = std::max(r.most_segments, c.segments);
  }
  r.segments_of[images] = segment + 1;
  return r;
}

template Images find_images(const Flow&, std::int64_t, std::int64_t, const float*);
template Images find_images(const Flow&, std::int64_t, std::int64_t, const double*);
template Rows arrange(const Flow&, const std::vector<StepPlan>&, Images, const float*);
template Rows arrange(const Flow&, const std::vector<StepPlan>&, Images, const double*);

}  // namespace fasthyp::coupling
