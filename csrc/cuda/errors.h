// CUDA errors as values.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/launch.h"

// Returns a Status from the calling function if the call failed, and clears the error.
#define HSTU_TRY(call)                                                                       \
  do {                                                                                       \
    const cudaError_t error = (call);                                                        \
    if (error != cudaSuccess) {                                                              \
      cudaGetLastError();                                                                    \
      return ::hstu_ops::Status{std::string(#call) + ": " + cudaGetErrorName(error) + ": " + \
                                cudaGetErrorString(error)};                                  \
    }                                                                                        \
  } while (false)
