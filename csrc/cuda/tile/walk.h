// Which tiles a block of threads visits and which elements of them count: everything here is derived from core/mask.h.
#pragma once

#include "core/mask.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/memory.h"
#include "cuda/tile/layout.h"

namespace hstu_ops::cuda {

// A tile to visit, in one register.
class TileState {
 public:
  __device__ TileState() : code_(-1) {}
  __device__ TileState(int tile, bool mine, bool covered) : code_(tile * 4 + (mine ? 2 : 0) + (covered ? 1 : 0)) {}

  __device__ bool exists() const { return code_ >= 0; }  // false: no more
  __device__ int tile() const { return code_ >> 2; }
  __device__ bool mine() const { return code_ & 2; }     // this warp keeps an element of it
  __device__ bool covered() const { return code_ & 1; }  // this warp keeps all of its elements

 private:
  int code_;
};

// The tiles out of [0, count) that a block visits, in order. classify(tile) says {visited by the block, kept by this
// warp, covered for this warp}; 32 tiles are classified at once, one a lane. The first answer is the same in all warps.
struct Classes {
  bool visited, mine, covered;
};

// kInShared: what a warp knows of them is kept in shared memory, where registers are scarcer.
template <bool kInShared, class Classify>
class TileWalk {
 public:
  __device__ TileWalk(int count, const Classify& classify) : classify_(classify), count_(count) {
    if (kInShared) ptx::st_shared(place(), known_);
  }

  __device__ __forceinline__ TileState next() {
    if (!kInShared) return next(known_);
    const uint32_t place = TileWalk::place();
    __syncwarp();  // all lanes have written the same
    uint4 known = ptx::ld_shared_u4(place);
    const TileState tile = next(known);
    ptx::st_shared(place, known);
    return tile;
  }

 private:
  // known: tiles visited, kept by this warp, covered, of the 32 before the one it ends with.
  __device__ __forceinline__ TileState next(uint4& known) {
    while (known.x == 0) {
      const int tile = static_cast<int>(known.w) + lane_id();
      if (static_cast<int>(known.w) >= count_) return {};
      known.w += 32;
      Classes c = {false, false, false};
      if (tile < count_) c = classify_(tile);
      known.x = __ballot_sync(~0u, c.visited);
      known.y = __ballot_sync(~0u, c.mine);
      known.z = __ballot_sync(~0u, c.covered);
    }
    const int bit = __ffs(known.x) - 1;
    known.x &= known.x - 1;
    return {static_cast<int>(known.w) - 32 + bit, (known.y >> bit & 1) != 0, (known.z >> bit & 1) != 0};
  }
  __device__ static __forceinline__ uint32_t place() {
    constexpr int kMostWarps = 8;
    __shared__ uint4 places[kMostWarps];
    return static_cast<uint32_t>(__cvta_generic_to_shared(places)) + ptx::thread_index() / 32 * 16;
  }

  Classify classify_;
  int count_;
  uint4 known_ = {0, 0, 0, 0};
};

__device__ __forceinline__ uint64_t bits_below(int n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }

__device__ __forceinline__ uint64_t interval_bits(const Interval& s, int first) {
  return bits_below(s.hi - first) & ~bits_below(s.lo - first);
}

// The same without branches, for lo >= 0.
__device__ __forceinline__ uint64_t span_bits(int lo, int hi, int first) {
  lo = max_int(lo - first, 0), hi = max_int(hi - first, 0);
  const unsigned low = ptx::bit_mask(lo, max_int(hi - lo, 0));
  lo = max_int(lo - 32, 0), hi = max_int(hi - 32, 0);
  return low | uint64_t{ptx::bit_mask(lo, max_int(hi - lo, 0))} << 32;
}

// Which of the columns [first, first + 64) a row keeps.
__device__ __forceinline__ uint64_t row_bits(const Mask& mask, int row, int first) {
  const RowSpans r = mask.row(row);
  return interval_bits(r.prefix, first) | interval_bits(r.window, first) | interval_bits(r.group, first);
}

// Zeroes what 16 kM rows do not keep of 8 kN columns: bits are those of row `lane`.
template <int kM, int kN>
__device__ __forceinline__ void mask_rows(uint64_t bits, Accumulator<kM, kN>& acc) {
  static_assert(kM <= 2 && kN <= 8, "one row a lane, 64 columns a word");
  const unsigned words[2] = {static_cast<unsigned>(bits), static_cast<unsigned>(bits >> 32)};
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int w = 0; w < (kN + 3) / 4; ++w) {
        const unsigned mine = __shfl_sync(~0u, words[w], m * 16 + h * 8 + lane_row()) >> lane_col();
#pragma unroll
        for (int n = w * 4; n < min_int(w * 4 + 4, kN); ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (!(mine >> (n % 4 * 8 + c) & 1)) acc.x[m][n][2 * h + c] = 0.f;
      }
}

template <int kM, int kN>
__device__ __forceinline__ void mask_rows(const Mask& mask, int row, int col, Accumulator<kM, kN>& acc) {
  mask_rows(row_bits(mask, row + lane_id(), col), acc);
}

// Which of the mask's columns [col, col + 32) the rows [row, row + 8 kN) keep: one row a lane.
template <int kN>
struct ColumnBits {
  unsigned words[(kN + 3) / 4];

  ColumnBits() = default;
  __device__ __forceinline__ ColumnBits(const Mask& mask, int row, int end_row, int col) {
#pragma unroll
    for (int i = 0; i < (kN + 3) / 4; ++i) {
      const int at = row + i * 32 + lane_id();
      words[i] = at < end_row ? static_cast<unsigned>(row_bits(mask, at, col)) : 0;
    }
  }
};

// The same for a transposed tile: its rows are columns [col, col + 16 kM) of the mask. Zeroes both accumulators.
template <int kM, int kN>
__device__ __forceinline__ void mask_columns(const ColumnBits<kN>& bits, Accumulator<kM, kN>& a,
                                             Accumulator<kM, kN>& b) {
  static_assert(kM <= 2, "32 columns of the mask a word");
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const unsigned mine = __shfl_sync(~0u, bits.words[n / 4], n % 4 * 8 + lane_col() + c) >> lane_row();
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (!(mine >> (m * 16 + h * 8) & 1)) a.x[m][n][2 * h + c] = b.x[m][n][2 * h + c] = 0.f;
    }
}

template <int kM, int kN>
__device__ __forceinline__ void mask_columns(const Mask& mask, int row, int end_row, int col, Accumulator<kM, kN>& a,
                                             Accumulator<kM, kN>& b) {
  mask_columns(ColumnBits<kN>(mask, row, end_row, col), a, b);
}

}  // namespace hstu_ops::cuda
