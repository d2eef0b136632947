// Gradient of a dense bias. A block of threads owns one tile of [size, size] and sums it over the sequences and heads
// that share it, recomputing their scores: every element is written once, zeros included, in a fixed order and without
// atomics.
#pragma once

#include "core/launch.h"
#include "cuda/errors.h"
#include "cuda/sm80/config.h"
#include "cuda/tile/bias.h"
#include "cuda/tile/load.h"
#include "cuda/tile/product.h"
#include "cuda/tile/score.h"
#include "cuda/tile/walk.h"

namespace hstu_ops::cuda::sm80 {

template <class T_, int kDim_>
struct DenseGradConfig {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr bool kBig = kDim * sizeof(T) > 512;
  static constexpr int kWarps = kBig ? 2 : 4, kThreads = 32 * kWarps, kRows = 16 * kWarps, kCols = kBig ? 16 : 32;
  static constexpr int kTileBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes = 2 * (kRows + kCols) * kTileBytes;
  static_assert(kSharedBytes <= kSmallSharedMemory - kExtraBytes);
};

struct DenseGradArguments {
  AttentionBwdParams params;
  int row_tiles, col_tiles;
};

template <class C>
struct DenseGradTile {
  using T = typename C::T;
  using Scores = Accumulator<1, C::kCols / 8>;

  const AttentionBwdParams& params;
  const int row, col;  // of the tile
  SmemTile<T, C::kDim> q, g, k, v;
  Scores sum;

  __device__ DenseGradTile(const AttentionBwdParams& params, int row, int col, unsigned char* shared)
      : params(params), row(row), col(col) {
    q.base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    g.base = q.base + C::kRows * C::kTileBytes;
    k.base = g.base + C::kRows * C::kTileBytes;
    v.base = k.base + C::kCols * C::kTileBytes;
    sum.clear();
  }

  __device__ void load(const Sequence& s, int head) const {
    const AttentionProblem& a = params.problem;
    load_tile<C::kRows, C::kThreads>(q, GlobalRows<T>(a.q, s.begin_q, head, a.dim_qk), row - s.first_row, s.num_q);
    load_tile<C::kRows, C::kThreads>(g, GlobalRows<T>(params.grad_out, s.begin_q, head, a.dim_v), row - s.first_row,
                                     s.num_q);
    load_tile<C::kCols, C::kThreads>(k, GlobalRows<T>(a.k, s.begin_kv, head, a.dim_qk), col, s.mask.len);
    load_tile<C::kCols, C::kThreads>(v, GlobalRows<T>(a.v, s.begin_kv, head, a.dim_v), col, s.mask.len);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }

  __device__ void add(const Sequence& sequence, int index, int head) {
    const AttentionProblem& a = params.problem;
    if (!sequence.mask.touches(max_int(row, sequence.first_row), row + C::kRows, col,
                               min_int(col + C::kCols, sequence.mask.len)))
      return;
    __syncthreads();  // the previous sequence or head is done with shared memory
    load(sequence, head);
    __syncthreads();
    const int warp_row = threadIdx.x / 32 * 16;
    Scores s, d;
    multiply_rows<T, C::kDim>(s, q, warp_row, k, 0);
    multiply_rows<T, C::kDim>(d, g, warp_row, v, 0);
    const DenseBias bias(a.dense, index, head);
    const DenseBias::Tile<false, 1, C::kCols / 8> tile(bias, 0, {row + warp_row, col}, 0);
    tile.add(s, static_cast<float>(a.alpha) * Score<T>::kArgument, Score<T>::kArgument);
    Score<T>::differentiate(s, d);
    mask_rows(sequence.mask, row + warp_row, col, d);
    const RowScale scale(a.scale, index, sequence.begin_q);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = row + warp_row + h * 8 + lane_row() - sequence.first_row;
      const float f = query >= 0 && query < sequence.num_q ? Score<T>::kSlope * scale(query) : 0.f;
#pragma unroll
      for (int n = 0; n < C::kCols / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) sum.x[0][n][2 * h + c] += f == 0.f ? 0.f : d.x[0][n][2 * h + c] * f;
    }
  }

  __device__ void store(float* to) {
    const int size = params.problem.dense.size;
    const int i0 = row + static_cast<int>(threadIdx.x / 32) * 16 + lane_row(), j0 = col + lane_col();
    sum.each([&](float& x, int i, int j) {
      if (i0 + i < size && j0 + j < size) to[static_cast<int64_t>(i0 + i) * size + j0 + j] = x;
    });
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    dense_bias_grad_kernel(const __grid_constant__ DenseGradArguments arguments) {
  extern __shared__ __align__(128) unsigned char memory[];
  const AttentionBwdParams& params = arguments.params;
  const AttentionProblem& a = params.problem;
  const DenseBiasParams& dense = a.dense;
  const int64_t tiles = int64_t{arguments.row_tiles} * arguments.col_tiles;
  const int tile = static_cast<int>(blockIdx.x % tiles), matrix = static_cast<int>(blockIdx.x / tiles);
  const int own_heads = dense.head_stride ? a.heads : 1;
  const int b0 = dense.batch_stride ? matrix / own_heads : 0, b1 = dense.batch_stride ? b0 + 1 : a.jagged.batch;
  const int h0 = dense.head_stride ? matrix % own_heads : 0, h1 = dense.head_stride ? h0 + 1 : a.heads;
  DenseGradTile<C> grad(params, tile / arguments.col_tiles * C::kRows, tile % arguments.col_tiles * C::kCols, memory);
#pragma unroll 1
  for (int b = b0; b < b1; ++b) {
    const Sequence sequence = load_sequence(a.jagged, a.mask, b);
#pragma unroll 1
    for (int h = h0; h < h1; ++h) grad.add(sequence, b, h);
  }
  grad.store(static_cast<float*>(params.grad_bias) + static_cast<int64_t>(matrix) * dense.size * dense.size);
}

template <class T, int kDim>
Status dense_bias_grad(const AttentionBwdParams& params, cudaStream_t stream) {
  using C = DenseGradConfig<T, kDim>;
  const DenseBiasParams& dense = params.problem.dense;
  const DenseGradArguments arguments{params, ceil_div(dense.size, C::kRows), ceil_div(dense.size, C::kCols)};
  const int64_t matrices =
      int64_t{dense.batch_stride ? params.problem.jagged.batch : 1} * (dense.head_stride ? params.problem.heads : 1);
  const int64_t blocks = matrices * arguments.row_tiles * arguments.col_tiles;
  if (blocks == 0) return {};
  if (blocks > 0x7fffffff) return {"the gradient of a dense bias of this size needs more than 2^31 blocks of threads"};
  HSTU_TRY(
      cudaFuncSetAttribute(dense_bias_grad_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  dense_bias_grad_kernel<C><<<static_cast<unsigned>(blocks), C::kThreads, C::kSharedBytes, stream>>>(arguments);
  HSTU_TRY(cudaGetLastError());
  return {};
}

}  // namespace hstu_ops::cuda::sm80
