// The sigmoid to the accuracy that a type can hold.
#pragma once

#include <type_traits>

namespace hstu_ops::cuda {

template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.f, 1.f + (std::is_same_v<T, float> ? expf(-x) : __expf(-x)));
}

}  // namespace hstu_ops::cuda
