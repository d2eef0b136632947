// Tiles between global and shared memory. Rows and columns that do not exist are filled with zeros on the way in (a NaN
// behind the end of a sequence would survive a product with 0) and left alone on the way out.
#pragma once

#include "core/params.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/memory.h"
#include "cuda/tile/layout.h"

namespace hstu_ops::cuda {

// One head of a [rows, heads, dim] tensor from some row on.
template <class T>
struct GlobalRows {
  T* data;
  int64_t row_stride;
  int dim;
  bool aligned;  // every row starts on 16 bytes

  __device__ GlobalRows(const View& view, int64_t row, int head, int dim)
      : data(static_cast<T*>(view.data) + row * view.row_stride + head * view.head_stride),
        row_stride(view.row_stride),
        dim(dim) {
    constexpr int kPer = 16 / static_cast<int>(sizeof(T));
    aligned =
        reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.row_stride % kPer == 0 && view.head_stride % kPer == 0;
  }
};

template <class T>
__device__ __forceinline__ uint4 gather_chunk(const T* from, int count) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  union {
    T x[kPer];
    uint4 chunk;
  } u;
  u.chunk = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kPer; ++i)
    if (i < count) u.x[i] = from[i];
  return u.chunk;
}

__device__ __forceinline__ bool exists(int row, int rows) {
  return static_cast<unsigned>(row) < static_cast<unsigned>(rows);
}

// Rows [first, first + kRows) of `from`, those outside [0, rows) zero. The caller commits and waits.
template <int kRows, int kThreads, class T, class Tile>
__device__ __forceinline__ void load_tile(const Tile& tile, const GlobalRows<T>& from, int first, int rows) {
  constexpr int kTotal = kRows * Tile::kChunks;
  constexpr int kPer = Tile::kPerChunk;
  if (from.aligned && first >= 0 && first + kRows <= rows && from.dim == Tile::kCols && kTotal % kThreads == 0) {
    constexpr int kStep = kThreads / Tile::kChunks;  // rows
    const int row = threadIdx.x / Tile::kChunks, chunk = threadIdx.x % Tile::kChunks;
    const T* source = from.data + (first + row) * from.row_stride + chunk * kPer;
    const int64_t step = kStep * from.row_stride;
#pragma unroll
    for (int i = 0; i < kTotal / kThreads; ++i) {
      ptx::cp_async_16(tile.at(row + i * kStep, chunk), source, 16);
      source += step;
    }
    return;
  }
  const int thread = ptx::thread_index();
  if (from.aligned) {
#pragma unroll 1
    for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; ++i) {
      const int at = i * kThreads + thread;
      if (kTotal % kThreads != 0 && at >= kTotal) break;
      const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
      const bool there = exists(first + row, rows) && chunk * kPer < from.dim;
      const int bytes = there ? min_int(from.dim - chunk * kPer, kPer) * static_cast<int>(sizeof(T)) : 0;
      const T* source = there ? from.data + (first + row) * from.row_stride + chunk * kPer : from.data;
      ptx::cp_async_16(tile.at(row, chunk), source, bytes);
    }
    return;
  }
#pragma unroll 1
  for (int at = thread; at < kTotal; at += kThreads) {
    const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
    const bool there = exists(first + row, rows);
    ptx::st_shared(tile.at(row, chunk),
                   gather_chunk(from.data + (there ? (first + row) * from.row_stride + chunk * kPer : 0),
                                there ? from.dim - chunk * kPer : 0));
  }
}

template <class T>
__device__ __forceinline__ void scatter_chunk(T* to, uint4 chunk, int count) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  union {
    T x[kPer];
    uint4 chunk;
  } u;
  u.chunk = chunk;
#pragma unroll
  for (int i = 0; i < kPer; ++i)
    if (i < count) to[i] = u.x[i];
}

// The reverse, by kThreads threads of which this one is `thread`: tile rows [tile_row, tile_row + kRows) to rows from
// `first` on, stopping at `rows`.
template <int kRows, int kThreads, class T, class Tile>
__device__ __forceinline__ void store_tile(const Tile& tile, int tile_row, const GlobalRows<T>& to, int first, int rows,
                                           int thread) {
  constexpr int kPer = Tile::kPerChunk;
#pragma unroll 4
  for (int at = thread; at < kRows * Tile::kChunks; at += kThreads) {
    const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
    const int count = to.dim - chunk * kPer;
    if (first + row >= rows || count <= 0) continue;
    const uint4 x = ptx::ld_shared_u4(tile.at(tile_row + row, chunk));
    T* target = to.data + (first + row) * to.row_stride + chunk * kPer;
    if (to.aligned && count >= kPer) {
      *reinterpret_cast<uint4*>(target) = x;
    } else {
      scatter_chunk(target, x, count);
    }
  }
}

// Accumulators, times factor(row), into rows from `row` and columns from `col` of a tile.
template <class T, int kM, int kN, class Tile, class Factor>
__device__ __forceinline__ void put_accumulator(const Tile& tile, int row, int col, const Accumulator<kM, kN>& acc,
                                                Factor&& factor) {
  const int lane_offset = lane_col() * static_cast<int>(sizeof(T)) % 16;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + m * 16 + h * 8 + lane_row();
      const float f = factor(m * 16 + h * 8);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float x = acc.x[m][n][2 * h] * f, y = acc.x[m][n][2 * h + 1] * f;
        const uint32_t at = tile.at(r, (col + n * 8 + lane_col()) / Tile::kPerChunk) + lane_offset;
        if constexpr (kIs16Bit<T>) {
          ptx::st_shared(at, pack(x, y, T{}));
        } else {
          ptx::st_shared(at, make_float2(x, y));
        }
      }
    }
}

// Adds one row of a 16-column pair of accumulator tiles, a and b, to 16 floats in global memory. A reduction
// instruction costs by rows touched: where it takes 16 bytes a lane, the four lanes of a row exchange halves so that
// one instruction covers 64 bytes of each row instead of 32.
__device__ __forceinline__ void add_row(float* row, float2 a, float2 b, bool exists) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const int t = lane_id() % 4;
  const auto exchange = [](float2& x, float2& y, bool high, int distance) {  // low lanes keep x, high lanes keep y
    const float2 give = high ? x : y;
    const float2 take = {__shfl_xor_sync(~0u, give.x, distance), __shfl_xor_sync(~0u, give.y, distance)};
    (high ? x : y) = take;
  };
  exchange(a, b, t >= 2, 2);      // lanes 0, 1 hold columns 2t and 2t + 4 of tile a, lanes 2, 3 those of tile b
  exchange(a, b, t % 2 != 0, 1);  // four neighbours each
  if (exists) ptx::red_add_v4(row + 4 * t, a.x, a.y, b.x, b.y);
#else
  if (!exists) return;
  ptx::red_add_v2(row + lane_col(), a.x, a.y);
  ptx::red_add_v2(row + 8 + lane_col(), b.x, b.y);
#endif
}

}  // namespace hstu_ops::cuda
