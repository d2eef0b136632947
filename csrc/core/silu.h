// SiLU and its derivative, from the value and its sigmoid, so that each backend may compute the sigmoid its own fastest
// way. V is a float, a double or a vector of them.
#pragma once

#include "core/macros.h"

namespace hstu_ops {

template <class V>
HSTU_HD V silu(V x, V sigmoid) {
  return x * sigmoid;
}

// Not 0 at x = 0 (it is 1/2): a backward must zero masked entries itself.
template <class V>
HSTU_HD V silu_grad(V x, V sigmoid) {
  return sigmoid + x * sigmoid * (1 - sigmoid);
}

}  // namespace hstu_ops
