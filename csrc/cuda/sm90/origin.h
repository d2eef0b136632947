// Where the operands of products in shared memory are described from.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/ptx/wgmma.h"

namespace hstu_ops::cuda::sm90 {

// kOnce: from a descriptor made once, by a dozen instructions that wait for each other; otherwise from nothing.
template <bool kOnce>
struct Origin {
  const ptx::Descriptor first;

  __device__ explicit Origin(uint32_t base) : first(ptx::uniform(base)) {}
  __device__ ptx::Descriptor descriptor(uint32_t base, uint32_t panel, int panel_bytes) const {
    return first.moved(panel - base, panel_bytes);
  }
};
template <>
struct Origin<false> {
  __device__ explicit Origin(uint32_t) {}
  __device__ ptx::Descriptor descriptor(uint32_t, uint32_t panel, int panel_bytes) const {
    return ptx::Descriptor(panel, panel_bytes);
  }
};

}  // namespace hstu_ops::cuda::sm90
