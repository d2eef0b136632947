// Launches of persistent kernels; what the forward needs besides is in fwd_launch.h.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "cuda/errors.h"

namespace hstu_ops::cuda::sm90 {

// Once for each device, before all else: the kernel may have its shared memory, always as much.
template <auto kKernel>
Status allow_shared_memory(int device, int bytes) {
  static std::atomic<uint64_t> allowed{0};
  if (device < 64 && (allowed >> device & 1)) return {};
  HSTU_TRY(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (device < 64) allowed |= uint64_t{1} << device;
  return {};
}

// early: this kernel may start once all blocks of the one before it in the stream have called launch_dependents() or
// left; it must itself call wait_for_prerequisites().
template <auto kKernel, class Arguments>
Status launch(const Arguments& arguments, int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
              bool early = false) {
  if (shared_bytes > 0) {
    int device = 0;
    HSTU_TRY(cudaGetDevice(&device));
    if (Status s = allow_shared_memory<kKernel>(device, shared_bytes); !s.ok()) return s;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(blocks), config.blockDim = threads, config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = &attribute, config.numAttrs = early;
  HSTU_TRY(cudaLaunchKernelEx(&config, kKernel, arguments));
  return {};
}

}  // namespace hstu_ops::cuda::sm90
