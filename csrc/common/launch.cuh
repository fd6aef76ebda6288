// Host side of every launcher: errors as exceptions, and the right device. Included by .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/vector.cuh"

namespace hybrid_ops {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// A function of the driver, found through the runtime, so that nothing links to libcuda.
inline void* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error(std::string("the driver has no ") + name);
  return function;
}

// Makes `device` current for a scope; costs one query where it already is.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = previous_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Lets a kernel have so much dynamic shared memory; the runtime is asked only where that is more than before on this
// device.
template <auto kKernel>
void allow_shared_memory(int bytes, int device) {
  static std::array<std::atomic<int>, 64> allowed{};  // by device
  static std::mutex mutex;
  std::atomic<int>& most = allowed.at(device);
  if (most >= bytes) return;
  const std::scoped_lock lock(mutex);
  if (most >= bytes) return;
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  most = bytes;
}

// Before a kernel's launch: how many percent of L1 are to be shared memory, of which it may otherwise find as little as
// the kernel before it left, and have fewer CTAs at a time.
template <auto kKernel>
void prefer_shared_memory(int percent, int device) {
  static std::array<std::atomic<bool>, 64> done{};  // by device
  if (done.at(device)) return;
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, percent), "cudaFuncSetAttribute");
  done.at(device) = true;
}

// Lets a kernel's CTAs take places while the kernel before is in its last ones, and has said let_next_kernel_start():
// so it must wait_for_kernel_before() before it touches memory.
inline cudaLaunchAttribute early_launch() {
  cudaLaunchAttribute early{.id = cudaLaunchAttributeProgrammaticStreamSerialization};
  early.val.programmaticStreamSerializationAllowed = 1;
  return early;
}

template <typename Params>
void launch_early(void (*kernel)(Params), dim3 grid, dim3 threads, cudaStream_t stream, const Params& p,
                  const char* name, int shared_bytes = 0) {
  cudaLaunchAttribute early = early_launch();
  const cudaLaunchConfig_t config{.gridDim = grid,
                                  .blockDim = threads,
                                  .dynamicSmemBytes = static_cast<std::size_t>(shared_bytes),
                                  .stream = stream,
                                  .attrs = &early,
                                  .numAttrs = 1};
  check(cudaLaunchKernelEx(&config, kernel, p), name);
}

// Whether four neighbours of a row of tokens always lie in one aligned piece of memory; strides of elements, last of
// neighbours.
inline bool vectors_aligned(std::uintptr_t pointer, const std::array<std::int64_t, 4>& strides, DType dtype) {
  const int itemsize = dtype == DType::float32 ? 4 : 2;
  return strides[3] == 1 && (strides[0] | strides[1] | strides[2]) % kPerVector == 0 &&
         pointer % (kPerVector * itemsize) == 0;
}

}  // namespace hybrid_ops
