// How a computing warp of the Hopper backward adds a bias: its scores, 16 keys by 64 queries, begin from the bias over
// alpha, to which the product is added. Before it registers are free; behind it there would be none. (In the kernel for
// dQ scores are 16 queries by 64 keys: kTransposed is false.)
#pragma once

#include "cuda/ptx/math.h"
#include "cuda/sm90/fwd_bias_start.h"
#include "cuda/sm90/score_factors.h"

namespace hstu_ops::cuda::sm90 {

// Dense bias, from global memory into the registers of the scores. row, col: of the warp's tile; queries and keys or,
// if kTransposed, the reverse.
template <bool kTransposed>
__device__ __forceinline__ void start_from_dense(const DenseBias& bias, int row, int col, const ScoreFactors& factors,
                                                 Accumulator<1, 8>& s) {
  const int lane = ptx::thread_index() % 32;
  row += lane / 4, col += lane % 4 * 2;
  const int64_t down = kTransposed ? 1 : bias.row_stride, right = kTransposed ? bias.row_stride : 1;
  const float* corner = bias.data + row * down + col * right;
  s.each([&](float& x, int i, int j) {
    const bool inside = row + i >= 0 && row + i < bias.size && col + j >= 0 && col + j < bias.size;
    x = ptx::ld_global_if(inside, corner + i * down + j * right);
  });
  s.each([&](float& x, int, int) { x = ptx::max_or_nan(x, factors.least) * factors.bias; });
}

}  // namespace hstu_ops::cuda::sm90
