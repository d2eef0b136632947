// Items of the backward's work (a block of keys of one head) and the tiles of queries each visits: found by some warps
// in shared memory, read by all. Derived from core/mask.h.
#pragma once

#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda::sm90 {

// A tile of queries of an item and, for each computing warpgroup, whether it keeps any of its keys and all of them.
class BwdTile {
 public:
  BwdTile() = default;
  __device__ explicit BwdTile(int tile) : code_(tile << 8) {}

  __device__ void set_group(int group, bool kept, bool covered) { code_ |= (kept | covered << 1) << 2 * group; }
  __device__ void set_last() { code_ |= 128; }
  __device__ int tile() const { return code_ >> 8; }
  __device__ bool kept(int group) const { return code_ >> 2 * group & 1; }
  __device__ bool covered(int group) const { return code_ >> 2 * group & 2; }
  __device__ bool last() const { return code_ & 128; }
  __device__ bool visited() const { return code_ & 127; }
  __device__ BwdTile of_lane(int lane) const {
    BwdTile t;
    t.code_ = __shfl_sync(~0u, code_, lane);
    return t;
  }

 private:
  int code_ = 0;
};

// An item, found by one warp for all others.
struct BwdJob {
  Job job;
  bool more;                // false: the block is done
  bool any_tile;            // false: nothing keeps the item's keys
  bool rising;              // the times of its queries do not fall
  BwdTile first_tiles[32];  // the item's first tiles, visited or not
};

// Tile `index` as the item's keys see it.
template <class C>
__device__ BwdTile classify_queries(const Job& job, int index) {
  const Sequence& s = job.sequence;
  BwdTile tile(index);
  if (index * C::kQueries >= s.num_q) return tile;
  const int m0 = s.first_row + index * C::kQueries, m1 = m0 + C::kQueries;
#pragma unroll 1
  for (int group = 0; group < C::kGroups; ++group) {
    const int n0 = job.item.block * C::kKeys + (C::kSplitKeys ? group * 64 : 0), n1 = n0 + 64;
    tile.set_group(group, s.mask.touches(m0, m1, n0, min_int(n1, s.mask.len)), s.mask.covers(m0, m1, n0, n1));
  }
  return tile;
}

// The tiles of queries an item visits, in order; 32 are classified at once, one a lane.
template <class C>
class BwdWalk {
 public:
  __device__ explicit BwdWalk(const BwdJob& job) : job_(job.job), mine_(job.first_tiles[lane_id()]) {
    visited_ = __ballot_sync(~0u, mine_.visited());
    skip_unvisited();
  }

  // False: no more.
  __device__ __forceinline__ bool next(BwdTile& tile) {
    if (visited_ == 0) return false;
    tile = mine_.of_lane(__ffs(visited_) - 1);
    visited_ &= visited_ - 1;
    skip_unvisited();
    if (visited_ == 0) tile.set_last();
    return true;
  }

 private:
  __device__ void skip_unvisited() {
    for (; visited_ == 0 && upcoming_ * C::kQueries < job_.sequence.num_q; upcoming_ += 32) {
      mine_ = classify_queries<C>(job_, upcoming_ + lane_id());
      visited_ = __ballot_sync(~0u, mine_.visited());
    }
  }

  const Job& job_;
  BwdTile mine_;
  int upcoming_ = 32;
  unsigned visited_ = 0;
};

}  // namespace hstu_ops::cuda::sm90
