// Where things live: a tile in shared memory, and which elements of an accumulator tile a lane holds.
// Used by every kernel; the layouts themselves are known only here and in tile/product.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/macros.h"
#include "cuda/tile/lane.h"

namespace hstu_ops::cuda {

template <class T>
constexpr bool kIs16Bit = sizeof(T) == 2;

// [rows][kCols] of T. Rows are cut into 16-byte chunks; a chunk's place in its row is XORed with the row, so that eight
// consecutive rows of one chunk, the access of every product, fall into different banks.
template <class T, int kCols_>
struct SmemTile {
  static constexpr int kCols = kCols_;
  static constexpr int kPitch = kCols * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kPitch / 16;
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kSwizzled = kChunks < 8 ? kChunks - 1 : 7;  // bits of the chunk index that move
  static_assert(kCols * sizeof(T) % 32 == 0 && (kChunks & (kChunks - 1)) == 0, "rows are a power of two of chunks");

  uint32_t base;

  __device__ static int twist(int row) {
    return kChunks >= 8 ? row & 7 : kChunks == 4 ? (row >> 1) & 3 : (row >> 2) & 1;
  }
  __device__ uint32_t at(int row, int chunk) const { return base + row * kPitch + ((chunk ^ twist(row)) << 4); }
  __device__ SmemTile stage(int index, int rows) const { return {base + static_cast<uint32_t>(index * rows * kPitch)}; }
};

// One lane's walk over a tile: it starts at (row, chunk), chunk being lane-dependent and below kSpan, and moves by
// compile-time steps: rows in eights, chunks in multiples of kSpan. A step costs at most one XOR.
template <class Tile>
struct Cursor {
  uint32_t start;

  __device__ Cursor(const Tile& tile, int row, int chunk) : start(tile.at(row, chunk)) {}
  // The swizzled bits of an address are those of the chunk alone, so the XOR applies to the address itself.
  __device__ __forceinline__ uint32_t at(int rows, int chunks) const {
    constexpr int kLow = Tile::kSwizzled;
    return (start ^ ((chunks & kLow) << 4)) + ((chunks & ~kLow) << 4) + rows * Tile::kPitch;
  }
};

// Accumulators of kM x kN tensor core tiles of 16 x 8: element e of tile (m, n) is row m * 16 + e / 2 * 8 + lane / 4,
// column n * 8 + lane % 4 * 2 + e % 2. The fp32 products keep the same layout.
template <int kM, int kN>
struct Accumulator {
  float x[kM][kN][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = 0.f;
  }
  // f(element, row, column) with row and column relative to the tile; row - lane / 4 and column - lane % 4 * 2 are
  // constants.
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(x[m][n][e], m * 16 + e / 2 * 8, n * 8 + e % 2);
  }
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    const_cast<Accumulator*>(this)->each(f);
  }
  // f(element, m, n, e) for kCount columns of tensor core tiles from column `first` on, a multiple of kCount that is
  // not known at compile time: for loops that would fill the instruction cache if they were unrolled.
  template <int kCount, class F>
  __device__ __forceinline__ void each_from(int first, F&& f) {
#pragma unroll
    for (int from = 0; from < kN; from += kCount)
      if (from == first)
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int n = from; n < from + kCount; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) f(x[m][n][e], m, n, e);
  }
  template <int kCount, class F>
  __device__ __forceinline__ void each_from(int first, F&& f) const {
    const_cast<Accumulator*>(this)->template each_from<kCount>(first, f);
  }
  // f(the lane's four elements, n) for the same.
  template <int kCount, class F>
  __device__ __forceinline__ void each_block_from(int first, F&& f) {
    static_assert(kM == 1);
#pragma unroll
    for (int from = 0; from < kN; from += kCount)
      if (from == first)
#pragma unroll
        for (int n = from; n < from + kCount; ++n) f(x[0][n], n);
  }
  // Element `at` of [kM][kN][4] for an index not known at compile time: slow, but the accumulator stays in registers.
  __device__ __forceinline__ float pick(int at) const {
    float y = 0.f;
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i)
      if (i == at) y = x[i / (kN * 4)][i / 4 % kN][i % 4];
    return y;
  }
};

// Row and column, in the tile, of a lane's element `at`.
template <int kN>
__device__ __forceinline__ int element_row(int at, int lane) {
  return at / (4 * kN) * 16 + at % 4 / 2 * 8 + lane / 4;
}
template <int kN>
__device__ __forceinline__ int element_col(int at, int lane) {
  return at / 4 % kN * 8 + at % 2 + lane % 4 * 2;
}

__device__ __forceinline__ uint32_t pack(float lo, float hi, __half) {
  const __half2 h = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&h);
}
__device__ __forceinline__ uint32_t pack(float lo, float hi, __nv_bfloat16) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&h);
}

__device__ __forceinline__ float2 unpack(uint32_t x, __half) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }
__device__ __forceinline__ float2 unpack(uint32_t x, __nv_bfloat16) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&x));
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}

}  // namespace hstu_ops::cuda
