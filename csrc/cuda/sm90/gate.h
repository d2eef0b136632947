// Stages of shared memory that one side fills and the other empties.
#pragma once

#include "cuda/ptx/mbarrier.h"

namespace hstu_ops::cuda::sm90 {

template <int kStages>
struct Gate {
  ptx::Mbarrier full[kStages], empty[kStages];

  __device__ void init(int fills, int empties) {
    for (int i = 0; i < kStages; ++i) full[i].init(fills), empty[i].init(empties);
  }
};

}  // namespace hstu_ops::cuda::sm90
