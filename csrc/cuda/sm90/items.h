// Items of the forward's work and the tiles of keys each visits, with what every computing warpgroup keeps of a tile:
// found by some warps in shared memory, read by all. Derived from core/mask.h.
#pragma once

#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda::sm90 {

// A tile of keys of an item and, for each computing warpgroup, whether its queries keep any of it and all of it.
class FwdTile {
 public:
  FwdTile() = default;
  __device__ explicit FwdTile(int tile) : code_(tile << 8) {}

  __device__ void set_group(int group, bool kept, bool covered) { code_ |= (kept | covered << 1) << 2 * group; }
  __device__ void set_last() { code_ |= 128; }
  __device__ int tile() const { return code_ >> 8; }
  __device__ bool kept(int group) const { return code_ >> 2 * group & 1; }
  __device__ bool covered(int group) const { return code_ >> 2 * group & 2; }
  __device__ bool last() const { return code_ & 128; }
  __device__ bool visited() const { return code_ & 127; }
  __device__ FwdTile of_lane(int lane) const {
    FwdTile t;
    t.code_ = __shfl_sync(~0u, code_, lane);
    return t;
  }

 private:
  int code_ = 0;
};

// An item, found by one warp for all others.
struct FwdJob {
  Job job;
  bool more;                // false: the block is done
  bool any_tile;            // false: the item's queries keep nothing
  FwdTile first_tiles[32];  // the item's first tiles, visited or not
};

// Tile `index` as the item's queries see it.
template <class C>
__device__ FwdTile classify(const Job& job, int index) {
  const Sequence& s = job.sequence;
  const int n0 = index * C::kCols, n1 = n0 + C::kCols, first = job.item.block * C::kRows;
  FwdTile tile(index);
#pragma unroll 1
  for (int group = 0; group < C::kGroups; ++group) {
    const int m0 = s.first_row + first + group * 64, m1 = s.first_row + min_int(first + group * 64 + 64, s.num_q);
    tile.set_group(group, s.mask.touches(m0, m1, n0, min_int(n1, s.mask.len)), s.mask.covers(m0, m1, n0, n1));
  }
  return tile;
}

// The tiles of keys an item visits, in order; 32 are classified at once, one a lane.
template <class C>
class FwdWalk {
 public:
  __device__ explicit FwdWalk(const FwdJob& job) : job_(job.job), mine_(job.first_tiles[lane_id()]) {
    visited_ = __ballot_sync(~0u, mine_.visited());
    skip_unvisited();
  }

  // False: no more.
  __device__ __forceinline__ bool next(FwdTile& tile) {
    if (visited_ == 0) return false;
    tile = mine_.of_lane(__ffs(visited_) - 1);
    visited_ &= visited_ - 1;
    skip_unvisited();
    if (visited_ == 0) tile.set_last();
    return true;
  }

 private:
  __device__ void skip_unvisited() {
    for (; visited_ == 0 && upcoming_ * C::kCols < job_.sequence.mask.len; upcoming_ += 32) {
      mine_ = classify<C>(job_, upcoming_ + lane_id());
      visited_ = __ballot_sync(~0u, mine_.visited());
    }
  }

  const Job& job_;
  FwdTile mine_;
  int upcoming_ = 32;
  unsigned visited_ = 0;
};

}  // namespace hstu_ops::cuda::sm90
