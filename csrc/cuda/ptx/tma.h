// The copy engine: boxes of a tensor into shared memory, completion counted by an Mbarrier; contiguous floats
// written or added to global memory, completion waited for by the thread that asked.
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

// global[i] += shared[i]; both on 16 bytes, `bytes` a multiple of 16.
__device__ __forceinline__ void bulk_add(float* global, uint32_t shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}
// global[i] = shared[i], likewise.
__device__ __forceinline__ void bulk_store(float* global, uint32_t shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the last kPending committed groups have read shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// They have written global memory as well.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace hstu_ops::ptx
