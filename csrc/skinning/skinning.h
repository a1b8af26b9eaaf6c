// Linear blend skinning of SMPL-like bodies: points that follow the bones of a kinematic tree.
//
// A point is a linear function of the features of a body, [shape coefficients, rotations of the
// joints but the first, minus the identity], plus a constant, moved by a weighted sum of the bones'
// transformations. Vertices are such points, each its own output. A joint that a linear regressor
// takes from the vertices is a sum of a few such points, usually one for each bone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/host_device.h"

namespace fasthyp::skinning {

// How the rotation of a joint is given. The last three are two vectors each, made orthogonal: the
// first two columns of the matrix one after the other, the same row by row, its first two rows.
enum class Rotation : int { axis_angle = 0, matrix = 1, columns = 2, interleaved = 3, rows = 4 };
inline constexpr int kRotations = 5;
FASTHYP_HD int numbers_of(Rotation rotation) {
  return rotation == Rotation::axis_angle ? 3 : rotation == Rotation::matrix ? 9 : 6;
}

// Points are stored in tiles. A last tile is filled up with points of zeros.
inline constexpr int kTile = 8;
inline constexpr int kColumns = 3 * kTile;

// All arrays are contiguous and of one type, float or double, unless said.
struct Model {
  bool is_double;
  int shapes;                   // number of shape coefficients
  int joints;                   // at least 1
  bool pose_blend;              // whether the rotations are features
  const std::int32_t* parents;  // (joints); of a joint but the first, one before it
  const void* rest;             // (joints, 3), of the body whose shape is zero
  const void* rest_shapes;      // (joints, 3, shapes)
  std::int64_t points;
  // A tile keeps columns for the features that move its points.
  const std::int32_t* row_starts;  // (tiles + 1), where those of a tile are listed
  const std::int32_t* rows;        // (row_starts[tiles]), features
  const void* columns;         // (row_starts[tiles], kColumns), coordinates of a point side by side
  const void* base;            // (tiles, kColumns)
  const std::int32_t* starts;  // (points + 1), where the bones of a point are listed
  const std::int32_t* bones;   // (starts[points])
  const void* weights;         // (starts[points], 2): of a bone's rotation and translation
  // Points of one output after the other; null: each point is an output.
  const std::int32_t* targets;  // (points)
  std::int64_t outputs;
  const void* lift;  // (outputs), what a body's translation is multiplied with; null: 1

  FASTHYP_HD int features() const { return shapes + (pose_blend ? 9 * (joints - 1) : 0); }
  FASTHYP_HD std::int64_t tiles() const { return (points + kTile - 1) / kTile; }
};

// What a camera is made of: 3 numbers, s and t of the weak perspective s (x + t); or 7, t, f and c
// of the perspective f (X + t) / (Z + t_z) + c.
inline constexpr int kWeak = 3, kPerspective = 7;

struct Call {
  Model model;
  std::int64_t bodies;
  const void* betas;                                      // (bodies, shapes)
  const void* pose;                                       // (bodies, joints, numbers_of(rotation))
  const void* transl;                                     // (bodies, 3); null: none
  std::int64_t betas_stride, pose_stride, transl_stride;  // from body to body; 0: one for all
  Rotation rotation;
  int camera_numbers;          // 0: none
  const void* camera;          // (bodies, camera_numbers)
  std::int64_t camera_stride;  // as those before
  // Results; null: not wanted. `projected` needs a camera and `out`; backward, `out` is an input.
  void* out;        // (bodies, outputs, 3)
  void* joints;     // (bodies, joints, 3)
  void* projected;  // (bodies, outputs, 2)
  // Of the backward pass: gradients by the results, null for zero, and those that are wanted.
  const void* out_grad;
  const void* joints_grad;
  const void* projected_grad;
  void* betas_grad;   // (bodies, shapes)
  void* pose_grad;    // (bodies, joints, numbers_of(rotation))
  void* transl_grad;  // (bodies, 3)
  void* camera_grad;  // (bodies, camera_numbers); with projected_grad
};

void forward(const Call& call, int threads);
void backward(const Call& call, int threads);

// On the device that holds the arrays, on that stream (a cudaStream_t), without waiting for it.
void forward_cuda(const Call& call, std::byte* workspace, int device, void* stream);
void backward_cuda(const Call& call, std::byte* workspace, int device, void* stream);
// Bytes of workspace, aligned to 16, for a call of so many bodies.
std::int64_t workspace_bytes_cuda(const Model& model, std::int64_t bodies, bool backward,
                                  bool projected);

// --- what a SIMD level provides (cpu_kernels.cpp) ---

// Bodies are done in groups, one in each lane of some vectors. What belongs to a group: features,
// transformations of the bones (12 numbers: rotation by rows, translation), local rotations (9),
// joints at rest (3) and posed (3), translation, of `lanes` numbers each.
struct GroupSizes {
  int features, bones, local, rest, posed, transl, total;
  FASTHYP_HD explicit GroupSizes(const Model& m)
      : features(0),
        bones(m.features()),
        local(bones + 12 * m.joints),
        rest(local + 9 * m.joints),
        posed(rest + 3 * m.joints),
        transl(posed + 3 * m.joints),
        total(transl + 3) {}
};

// The gradients of a group by its features, its bones and its translation.
struct GradSizes {
  int features, bones, transl, total;
  FASTHYP_HD explicit GradSizes(const Model& m)
      : features(0), bones(m.features()), transl(bones + 12 * m.joints), total(transl + 3) {}
};

// Memory of whole cache lines; `groups` begins with the first group of the call, the others with
// the first that is done.
struct Memory {
  void* groups;
  void* work;   // of a thread: work_numbers
  void* grads;  // of the groups that are done, GradSizes each
};

struct Functions {
  int lanes;  // bodies in a group
  // Fills in a group and writes its posed joints.
  void (*pose)(const Call&, std::int64_t group, const Memory&);
  // The outputs of some groups that lie in some tiles; all tiles where outputs are sums of points.
  void (*points)(const Call&, std::int64_t group, int groups, std::int64_t tile, std::int64_t tiles,
                 const Memory&);
  // Adds to their gradients what comes through those points.
  void (*points_backward)(const Call&, std::int64_t group, int groups, std::int64_t tile,
                          std::int64_t tiles, const Memory&);
  // Writes the gradients of a group's inputs.
  void (*pose_backward)(const Call&, std::int64_t group, const Memory&);
};
struct Kernels {
  Functions f32, f64;
};

// Numbers per lane of a thread's own memory.
inline std::int64_t work_numbers(const Model& m) {
  return 3 * kColumns + (m.targets ? 3 * m.outputs : 0) + 12 * m.joints;
}

}  // namespace fasthyp::skinning
