// The sigmoid to the accuracy that a type can hold.
#pragma once

#include <type_traits>

#include "cuda/ptx/math.h"

namespace hstu_ops::cuda {

template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (std::is_same_v<T, float>) return __fdividef(1.f, 1.f + expf(-x));
  return ptx::rcp_approx(1.f + ptx::ex2_approx(-1.4426950408889634f * x));
}

}  // namespace hstu_ops::cuda
