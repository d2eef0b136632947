// dQ on its way: from accumulators to shared memory, from there added to fp32 sums in global memory by the copy engine
// (bwd_finish.h), and in the end to the type and strides of grad_q, by the kernel that sums or by one of its own.
//
// The sums are [heads][dim / 64][total_q][64]: 64 rows of 64 columns lie together. A row's sixteen chunks of four are
// ordered for the accumulators' sake: a lane's four values of 16 columns are one chunk, and odd rows have their chunks
// 4..7 before 0..3, so that eight lanes of two rows write to different banks.
#pragma once

#include "core/launch.h"
#include "cuda/ptx/dependent.h"
#include "cuda/sm90/bwd_scratch.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/launch.h"
#include "cuda/tile/load.h"

namespace hstu_ops::cuda::sm90 {

// Where the sums of a row of one part (64 columns) of a head start.
__host__ __device__ inline int64_t sum_row(int64_t total, int parts, int head, int part, int64_t row) {
  return ((static_cast<int64_t>(head) * parts + part) * total + row) * kPanel;
}

// Chunk of a row that holds columns 16 block + 2 lane + {0, 1, 8, 9}.
__host__ __device__ inline int sum_chunk(int64_t row, int block, int lane) {
  return (block * 4 + lane) ^ (static_cast<int>(row & 1) << 2);
}

// One warp's 16 rows of 64 columns, times factor, to shared memory; global_row is that of the first of the 64 rows.
__device__ __forceinline__ void put_sums(uint32_t shared, int warp_row, int64_t global_row, const float (&sums)[32],
                                         float factor) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp_row + h * 8 + lane_row();
    const uint32_t start = shared + row * 256 + sum_chunk(global_row + row, 0, lane_id() % 4) * 16;
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const auto value = [&](int i) { return __float_as_uint(sums[block * 8 + i % 2 + i / 2 * 4 + 2 * h] * factor); };
      ptx::st_shared((start ^ (block % 2 * 64)) + block / 2 * 128, make_uint4(value(0), value(1), value(2), value(3)));
    }
  }
}

// ---- the conversion of all ----

struct SumsArguments {
  View to;
  const float* sums;
  int64_t total;
  int heads, dim, parts;
  TableGrads tables;
  TableCopies copies;  // of their sums, if there are any
};

// A thread takes 16 columns of a row, a block 64 rows; the last rows first, which the L2 may still hold.
template <class T>
__global__ void __launch_bounds__(256) convert_sums_kernel(const __grid_constant__ SumsArguments a) {
  ptx::wait_for_prerequisites();
  const bool aligned =
      reinterpret_cast<uintptr_t>(a.to.data) % 16 == 0 && a.to.row_stride % 8 == 0 && a.to.head_stride % 8 == 0;
  if (a.copies.sums)
    for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < a.copies.stride; i += int64_t{gridDim.x} * 256) {
      float sum = 0.f;
      for (unsigned c = 0; c < a.copies.count; ++c) sum += a.copies.sums[c * a.copies.stride + i];
      const bool position = i < a.tables.position.entries;
      (position ? a.tables.position.sums + i : a.tables.time.sums + (i - a.tables.position.entries))[0] = sum;
    }
  const int64_t last = (a.total - 1) / 64, slices = a.heads * a.parts, count = (last + 1) * slices;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t row = (last - i / slices) * 64 + threadIdx.x / 4;
    const int block = threadIdx.x % 4, slice = static_cast<int>(i % slices), part = slice % a.parts;
    const int col = part * kPanel + block * 16;
    if (col >= a.dim || row >= a.total) continue;
    const float4* from =
        reinterpret_cast<const float4*>(a.sums + sum_row(a.total, a.parts, slice / a.parts, part, row));
    uint32_t low[4], high[4];
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const float4 x = from[sum_chunk(row, block, lane)];
      low[lane] = pack(x.x, x.y, T{}), high[lane] = pack(x.z, x.w, T{});
    }
    T* to = static_cast<T*>(a.to.data) + row * a.to.row_stride + slice / a.parts * a.to.head_stride + col;
    const uint4 chunks[2] = {make_uint4(low[0], low[1], low[2], low[3]),
                             make_uint4(high[0], high[1], high[2], high[3])};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (aligned && col + k * 8 + 8 <= a.dim) {
        ptx::st_global(to + k * 8, chunks[k]);
      } else {
        scatter_chunk(to + k * 8, chunks[k], a.dim - col - k * 8);
      }
    }
  }
}

template <class T>
Status convert_sums(const SumsArguments& a, int processors, cudaStream_t stream) {
  const int64_t blocks = (a.total + 63) / 64 * a.heads * a.parts, most = processors * 32;
  return launch<convert_sums_kernel<T>>(a, blocks < most ? blocks : most, 256, 0, stream, true);
}

}  // namespace hstu_ops::cuda::sm90
