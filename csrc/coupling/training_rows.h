// The rows of a call in training, in the order in which they are worked on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "coupling/training.h"

namespace fasthyp::coupling {

// Memory for numbers of either type, not set to anything.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::int64_t bytes) : data_(new (std::align_val_t(64)) std::byte[bytes + 64]) {}
  std::byte* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<std::byte, Free> data_;
};

// Rows in the order in which they are worked on: those of an image together. Images go in chunks,
// whose hoisted sums fit into memory; the rows of a chunk in slabs, each of which sums up weight
// gradients of its own. None of it depends on the number of threads.
struct Rows {
  struct Chunk {
    std::int64_t first_image, images, first, rows, first_segment, segments;
  };
  std::int64_t count = 0;
  std::vector<std::int64_t> order;        // empty: the same
  std::vector<std::int64_t> image_of;     // per row
  std::vector<std::int64_t> segment_of;   // per row
  std::vector<std::int64_t> segments_of;  // per image, its first one; and the end
  std::vector<Chunk> chunks;
  std::int64_t slab_rows = 1;
  std::int64_t batch_slabs = 1;  // of wide steps
  std::int64_t most_images = 0, most_segments = 0, slabs = 0;
  Memory cond;  // (images, cond_ld)
  std::int64_t cond_ld = 0;
  const void* by_row = nullptr;  // the caller's condition, where it is read by row
};

// The images of a call. Callers that know nothing of images repeat the condition for every
// hypothesis.
struct Images {
  std::int64_t count, per_image;
  std::optional<Distinct> distinct;  // then per_image is 1
  bool by_row = false;               // see StepPlan; then per_image is 1
};

template <class T>
Images find_images(const Flow& flow, std::int64_t images, std::int64_t per_image, const T* cond);

template <class T>
Rows arrange(const Flow& flow, const std::vector<StepPlan>& plans, Images found, const T* cond);

}  // namespace fasthyp::coupling
