// What a warp knows of its tiles before it computes them. Tiles of one row of tiles are numbered along it; 32 of them
// are looked at together, one a lane.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/tile/position_bias.h"
#include "cuda/tile/time_buckets.h"

namespace hstu_ops::cuda {

struct BiasNote {
  static constexpr int kFirstBits = 20;
  static constexpr int kMostSteps = 6;  // beyond, looking up each element takes less than as many comparisons
  static constexpr int kMany = 255;
  static constexpr unsigned kElementwise = 1u << 29;

  unsigned code;

  __device__ int first() const { return static_cast<int>(code & ((1u << kFirstBits) - 1)); }
  // Boundaries between the smallest and the largest bucket; kMany: more than kMostSteps, or the corners do not tell.
  __device__ int steps() const { return static_cast<int>(code >> kFirstBits & 255); }
  __device__ bool diagonal() const { return code >> 28 & 1; }  // see PositionTerm::diagonal
  __device__ bool elementwise() const {
    return (code & kElementwise) != 0;
  }  // the position term is there but not diagonal
};

// One warp's notes, in shared memory: registers are scarcer.
class BiasNotes {
 public:
  static constexpr int kBytes = 33 * 4;

  __device__ BiasNotes(uint32_t notes, int warp) : codes_(notes + warp * kBytes) {}

  // Before the first tile of an item.
  __device__ __forceinline__ void reset() const {
    if (lane_id() == 0) ptx::st_shared(codes_ + 128, ~0u);
  }
  __device__ __forceinline__ BiasNote at(int tile) const {
    return {static_cast<unsigned>(ptx::ld_shared_int(codes_ + tile % 32 * 4))};
  }

  // For tile number `tile`, whose first elements are `at`; the others are beside it, in columns unless kTransposed.
  template <bool kTransposed, int kRows, int kCols>
  __device__ __forceinline__ void prepare(const Mask& mask, const PositionTerm& position, const TimeTerm& time,
                                          bool sorted, int tile, TileOrigin at) const {
    if (tile / 32 == ptx::ld_shared_int(codes_ + 128)) return;
    const int shift = (lane_id() - tile % 32) * kCols;
    (kTransposed ? at.query : at.key) += shift;
    unsigned code = 0;
    if (position.weight)
      code = position.diagonal(mask, at, kTransposed ? kCols : kRows, kTransposed ? kRows : kCols)
                 ? 1u << 28
                 : BiasNote::kElementwise;
    if (time.weight) {
      const BucketRange range = time.template corners<kTransposed, kRows, kCols>(at.query, at.key);
      const int steps = range.last - range.first;
      if (sorted && range.known && steps <= BiasNote::kMostSteps && range.last < 1 << BiasNote::kFirstBits) {
        code |= static_cast<unsigned>(range.first) | static_cast<unsigned>(steps) << BiasNote::kFirstBits;
      } else {
        code |= static_cast<unsigned>(BiasNote::kMany) << BiasNote::kFirstBits;
      }
    }
    __syncwarp();  // all have seen the old number
    ptx::st_shared(codes_ + lane_id() * 4, code);
    if (lane_id() == 0) ptx::st_shared(codes_ + 128, static_cast<uint32_t>(tile / 32));
    __syncwarp();
  }

 private:
  uint32_t codes_;  // of 32 tiles, [32 c, 32 c + 32), and then c
};

}  // namespace hstu_ops::cuda
