// Launches of persistent kernels. Used by the backward.
#pragma once

#include <cuda_runtime.h>

#include "cuda/errors.h"

namespace hstu_ops::cuda::sm90 {

// kAfter: this kernel may start once all blocks of the one before it in the stream have called launch_dependents() or
// left; it must itself call wait_for_prerequisites().
template <bool kAfter, class Arguments>
Status launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads, int shared_bytes,
              cudaStream_t stream) {
  if (shared_bytes > 0)
    HSTU_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(blocks), config.blockDim = threads, config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = &attribute, config.numAttrs = kAfter;
  HSTU_TRY(cudaLaunchKernelEx(&config, kernel, arguments));
  return {};
}

}  // namespace hstu_ops::cuda::sm90
