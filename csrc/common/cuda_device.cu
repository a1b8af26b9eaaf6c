#include "common/cuda_device.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace fasthyp {

int cuda_device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) return 0;
  check_cuda(error, "counting CUDA devices", -1);
  return count;
}

void check_cuda(int error, const std::string& what, int device) {
  if (error == cudaSuccess) return;
  std::string message = what;
  if (device >= 0) {
    message += " on CUDA device " + std::to_string(device);
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) == cudaSuccess)
      message += std::string(" (") + properties.name + ", sm_" + std::to_string(properties.major) +
                 std::to_string(properties.minor) + ")";
  }
  message += std::string(": ") + cudaGetErrorString(static_cast<cudaError_t>(error)) +
             "; the kernels are built for architectures " FASTHYP_CUDA_ARCHS;
  throw std::runtime_error(message);
}

DeviceLimits device_limits(int device) {
  DeviceLimits limits{};
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device),
             "asking for multiprocessors", device);
  check_cuda(
      cudaDeviceGetAttribute(&limits.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      "asking for shared memory", device);
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "asking for the architecture", device);
  limits.clusters = major >= 9;
  return limits;
}

int SharedMemory::allow(const void* kernel, int device) {
  const bool known = device < kDevices;
  if (known && allowed_[device].load()) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device_limits(device).shared);
  if (error == cudaSuccess && known) allowed_[device].store(true);
  return error;
}

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  check_cuda(cudaGetDevice(&current), "asking for the current device", -1);
  if (current == device) return;
  check_cuda(cudaSetDevice(device), "switching", device);
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace fasthyp
