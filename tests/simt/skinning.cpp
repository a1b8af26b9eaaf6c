// skinning SEED INPUT OUTPUT: skins the bodies in a raw file with the CUDA kernels on the host.
// Input: 15 int64 (is_double, shapes, joints, pose_blend, points, outputs, bodies, betas, poses,
// rotation, translated, targets, rows, bones: numbers of them, camera numbers), then parents, rest,
// rest_shapes, row_starts, rows, columns, base, starts, bones, weights, targets and lift where
// there are targets, betas, pose, transl, cameras, gradients by the outputs, joints and
// projections. Output: outputs, joints, projections, and the gradients by betas, pose, transl and
// cameras, as in csrc/skinning.
#include "skinning/skinning.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

int main(int argc, char** argv) try {
  using namespace fasthyp::skinning;
  if (argc != 4) return 2;
  simt::set_seed(std::strtoull(argv[1], nullptr, 10));
  std::ifstream in(argv[2], std::ios::binary);
  std::int64_t n[15];
  in.read(reinterpret_cast<char*>(n), sizeof n);
  const std::int64_t size = n[0] ? 8 : 4, joints = n[2], points = n[4], outputs = n[5];
  // Heap blocks of the exact size, so that AddressSanitizer sees any access beyond them.
  std::vector<std::unique_ptr<char[]>> kept;
  const auto read = [&](std::int64_t count, std::int64_t element) -> void* {
    kept.emplace_back(new char[count * element]);
    in.read(kept.back().get(), count * element);
    return kept.back().get();
  };
  const auto index = [&](std::int64_t count) {
    return static_cast<const std::int32_t*>(read(count, 4));
  };
  Call call{};
  Model& m = call.model;
  m.is_double = n[0] != 0;
  m.shapes = static_cast<int>(n[1]);
  m.joints = static_cast<int>(joints);
  m.pose_blend = n[3] != 0;
  m.points = points;
  m.outputs = outputs;
  m.parents = index(joints);
  m.rest = read(joints * 3, size);
  m.rest_shapes = read(joints * 3 * n[1], size);
  m.row_starts = index(m.tiles() + 1);
  m.rows = index(n[12]);
  m.columns = read(n[12] * kColumns, size);
  m.base = read(m.tiles() * kColumns, size);
  m.starts = index(points + 1);
  m.bones = index(n[13]);
  m.weights = read(n[13] * 2, size);
  m.targets = n[11] ? index(points) : nullptr;
  m.lift = n[11] ? read(outputs, size) : nullptr;
  call.bodies = n[6];
  call.rotation = static_cast<Rotation>(n[9]);
  const std::int64_t numbers = joints * numbers_of(call.rotation);
  call.betas = read(n[7] * n[1], size);
  call.pose = read(n[8] * numbers, size);
  call.transl = n[10] ? read(n[6] * 3, size) : nullptr;
  call.betas_stride = n[7] == 1 ? 0 : n[1];
  call.pose_stride = n[8] == 1 ? 0 : numbers;
  call.transl_stride = 3;
  call.camera_numbers = static_cast<int>(n[14]);
  call.camera = read(n[6] * n[14], size);
  call.camera_stride = n[14];
  call.out_grad = read(n[6] * outputs * 3, size);
  call.joints_grad = read(n[6] * joints * 3, size);
  const void* projected_grad = n[14] ? read(n[6] * outputs * 2, size) : nullptr;
  if (!in) throw std::runtime_error("input too short");
  const std::int64_t out_bytes = n[6] * outputs * 3 * size, joint_bytes = n[6] * joints * 3 * size;
  const std::unique_ptr<char[]> out(new char[out_bytes]), posed(new char[joint_bytes]);
  call.out = out.get();
  call.joints = posed.get();
  const std::int64_t flat_bytes = n[14] ? n[6] * outputs * 2 * size : 0;
  const std::unique_ptr<char[]> flat(new char[flat_bytes]);
  call.projected = n[14] ? flat.get() : nullptr;
  const auto workspace = [&](bool backward) {
    const std::int64_t bytes = workspace_bytes_cuda(m, n[6], backward, n[14] != 0);
    std::unique_ptr<std::byte[]> memory(new std::byte[bytes]);
    std::fill_n(memory.get(), bytes, std::byte{0xff});  // NaN
    return memory;
  };
  forward_cuda(call, workspace(false).get(), 0, nullptr);
  const std::int64_t grad_bytes[4] = {n[6] * n[1] * size, n[6] * numbers * size, n[6] * 3 * size,
                                      n[6] * n[14] * size};
  std::unique_ptr<char[]> grads[4];
  for (int i = 0; i < 4; ++i) grads[i].reset(new char[grad_bytes[i]]);
  call.betas_grad = grads[0].get();
  call.pose_grad = grads[1].get();
  call.transl_grad = grads[2].get();
  call.projected_grad = projected_grad;
  call.camera_grad = grads[3].get();
  backward_cuda(call, workspace(true).get(), 0, nullptr);
  std::ofstream file(argv[3], std::ios::binary);
  file.write(out.get(), out_bytes);
  file.write(posed.get(), joint_bytes);
  file.write(flat.get(), flat_bytes);
  for (int i = 0; i < 4; ++i) file.write(grads[i].get(), grad_bytes[i]);
  return file.good() ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
