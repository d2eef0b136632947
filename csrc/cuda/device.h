// The current device.
#pragma once

#include <cuda_runtime.h>

namespace hstu_ops::cuda {

// `otherwise`: if it does not answer.
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess
             ? value
             : otherwise;
}

}  // namespace hstu_ops::cuda
