// The CUDA runtime as the rest of the project sees it; needs no CUDA header.
#pragma once

#include <atomic>
#include <string>

namespace fasthyp {

// CUDA devices that this process can use; 0 where there is no driver or no device.
int cuda_device_count();

// Throws std::runtime_error for a CUDA error code other than 0: what was done, on which device,
// what went wrong, and which architectures the kernels were built for.
void check_cuda(int error, const std::string& what, int device);

// What launches are fitted to.
struct DeviceLimits {
  int processors;  // multiprocessors
  int shared;      // bytes of shared memory that a block may ask for
  bool clusters;   // of blocks that read each other's shared memory
};
DeviceLimits device_limits(int device);

// Lets a kernel use all the shared memory that a block may ask for. One per kernel, static;
// remembers the devices, so that a launch in a captured stream asks nothing.
class SharedMemory {
 public:
  // Returns a CUDA error code.
  int allow(const void* kernel, int device);

 private:
  static constexpr int kDevices = 64;
  std::atomic<bool> allowed_[kDevices] = {};
};

// Makes a device current, and the one before it again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace fasthyp
