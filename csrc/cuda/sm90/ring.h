// A place in a ring of shared-memory stages. Used by both directions.
#pragma once

namespace hstu_ops::cuda::sm90 {

// A stage of a ring and the parity of its current round.
template <int kStages>
struct Ring {
  int stage = 0;
  unsigned round = 0;

  __device__ void next() {
    if (++stage == kStages) stage = 0, round ^= 1;
  }
};

}  // namespace hstu_ops::cuda::sm90
