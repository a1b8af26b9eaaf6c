// Compiled once per SIMD level. Each lane of a vector holds another body; two vectors make a group.
//
// Points of a tile are first placed in the body at rest: a product of the group's features with the
// tile's columns. For a few bodies there are vectors over the columns and over the coordinates of a
// point instead. Both add in the same order, so that a result does not depend on how many bodies
// there are.
#include "skinning/cpu_joints.h"
#include "skinning/cpu_points.h"

namespace fasthyp::FASTHYP_SIMD {
namespace {

template <class T>
constexpr Functions kFunctions = {kGroup<T>, pose<T>, points<T>, points_backward<T>,
                                  pose_backward<T>};

}  // namespace

extern const skinning::Kernels skinning_kernels;
const skinning::Kernels skinning_kernels = {kFunctions<float>, kFunctions<double>};

}  // namespace fasthyp::FASTHYP_SIMD
