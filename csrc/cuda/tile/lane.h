// The lane of a thread, and what it holds of an 8 x 8 tensor core tile of an accumulator.
#pragma once

namespace hstu_ops::cuda {

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int lane_row() { return lane_id() / 4; }
__device__ __forceinline__ int lane_col() { return lane_id() % 4 * 2; }

}  // namespace hstu_ops::cuda
