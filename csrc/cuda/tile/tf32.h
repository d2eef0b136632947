// fp32 whose products round both factors to TF32: 8 bits of exponent, 10 of mantissa. As an element type it selects
// kernels; in memory it is a float.
#pragma once

#include "core/macros.h"

namespace hstu_ops::cuda {

struct Tf32 {
  float value;

  Tf32() = default;
  HSTU_HD explicit Tf32(float value) : value(value) {}
};

}  // namespace hstu_ops::cuda
