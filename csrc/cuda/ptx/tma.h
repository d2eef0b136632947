// The copy engine: boxes of a tensor into shared memory, completion counted by an Mbarrier.
#pragma once

#include <cuda.h>

#include "cuda/ptx/mbarrier.h"

namespace hstu_ops::ptx {

__device__ __forceinline__ void tma_load_3d(uint32_t shared, const CUtensorMap& map, Mbarrier& full, int x, int y,
                                            int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared),
      "l"(&map), "r"(full.address()), "r"(x), "r"(y), "r"(z)
      : "memory");
}

}  // namespace hstu_ops::ptx
