// Tiles between global and shared memory. Rows and columns that do not exist are filled with zeros on the way in (a NaN
// behind the end of a sequence would survive a product with 0) and left alone on the way out.
#pragma once

#include <type_traits>

#include "core/params.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
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

// Two such tensors that are loaded together, and what their tiles have in common: kept in shared memory, so that a tile
// costs little more than its copies.
template <class T>
struct RowPair {
  const T *a, *b;  // as GlobalRows::data
  int stride_a, stride_b, rows;
  bool plain;  // whole tiles of `cols` columns can be copied without a look at their chunks

  __device__ void set(const GlobalRows<T>& from_a, const GlobalRows<T>& from_b, int rows_, int cols) {
    a = from_a.data, b = from_b.data, rows = rows_;
    stride_a = static_cast<int>(from_a.row_stride), stride_b = static_cast<int>(from_b.row_stride);
    plain = from_a.aligned && from_b.aligned && from_a.dim == cols && from_b.dim == cols &&
            stride_a == from_a.row_stride && stride_b == from_b.row_stride;
  }
};

// Rows [first, first + kRows) of both, first >= 0; slow() is called where load_tile has to be.
template <int kRows, int kThreads, class T, class Tile, class Slow>
__device__ __forceinline__ void load_pair(const Tile& to_a, const Tile& to_b, const RowPair<T>& from, int first,
                                          Slow&& slow) {
  constexpr int kTotal = kRows * Tile::kChunks, kStep = kThreads / Tile::kChunks;  // rows
  if (kTotal % kThreads != 0 || kStep % 8 != 0 || !from.plain || first + kRows > from.rows) {
    slow();
    return;
  }
  const int thread = ptx::thread_index(), row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
  const auto copy = [&](const Tile& to, const T* data, int stride) {
    const T* source = data + static_cast<int64_t>(first + row) * stride + chunk * Tile::kPerChunk;
    const uint32_t target = to.at(row, chunk);
#pragma unroll
    for (int i = 0; i < kTotal / kThreads; ++i)
      ptx::cp_async_16(target + i * kStep * Tile::kPitch, source + i * static_cast<int64_t>(kStep * stride), 16);
  };
  copy(to_a, from.a, from.stride_a);
  copy(to_b, from.b, from.stride_b);
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

// store(whether each 16 bytes of columns either lie on 16 bytes or do not exist, as a constant): then they are stored
// without a branch, so that what one store waits for is hidden behind others.
template <class T, class F>
__device__ __forceinline__ void by_chunks(const GlobalRows<T>& to, F&& store) {
  if (to.aligned && to.dim % (16 / sizeof(T)) == 0) {
    store(std::true_type{});
  } else {
    store(std::false_type{});
  }
}

// The first `left` of a chunk's columns, if there are any.
template <class HasChunks, class T>
__device__ __forceinline__ void store_chunk(HasChunks, T* target, int left, uint4 chunk) {
  if (HasChunks::value) {
    ptx::st_global_if(left > 0, target, chunk);
  } else {
    scatter_chunk(target, chunk, left);
  }
}

// The reverse of load_tile, by kThreads threads of which this one is `thread`: tile rows [tile_row, tile_row + kRows)
// to rows from `first` on, stopping at `rows`.
template <int kRows, int kThreads, class T, class Tile>
__device__ __forceinline__ void store_tile(const Tile& tile, int tile_row, const GlobalRows<T>& to, int first, int rows,
                                           int thread) {
  constexpr int kPer = Tile::kPerChunk;
  by_chunks(to, [&](auto has_chunks) {
#pragma unroll 4
    for (int at = thread; at < kRows * Tile::kChunks; at += kThreads) {
      const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
      const int left = first + row < rows ? to.dim - chunk * kPer : 0;
      const uint4 x = ptx::ld_shared_u4(tile.at(tile_row + row, chunk));
      T* const target = to.data + (first + row) * to.row_stride + chunk * kPer;
      store_chunk(has_chunks, target, left, x);
    }
  });
}

// Accumulators, times factor(row), into rows from `row` and columns from `col` of a tile.
template <class T, int kM, int kN, class Tile, class Factor>
__device__ __forceinline__ void put_accumulator(const Tile& tile, int row, int col, const Accumulator<kM, kN>& acc,
                                                Factor&& factor) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kIs16Bit<T> && kN % 2 == 0) {
    const int lane = lane_id();
    const Cursor<Tile> to(tile, row + lane % 16, col / 8 + lane / 16);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t blocks[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* x = &acc.x[m][n + i / 2][i % 2 * 2];
          const float f = factor(m * 16 + i % 2 * 8);
          blocks[i] = pack(x[0] * f, x[1] * f, T{});
        }
        ptx::stmatrix_x4(to.at(m * 16, n), blocks);
      }
    return;
  }
#endif
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

}  // namespace hstu_ops::cuda
