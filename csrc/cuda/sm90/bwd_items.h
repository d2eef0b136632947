// Items of the backward's work (a block of keys of one head) and the tiles of queries each visits: the transposed view
// of sm90/items.h.
#pragma once

#include "cuda/sm90/items.h"

namespace hstu_ops::cuda::sm90 {

using BwdTile = FwdTile;  // of queries; "kept" and "covered" are about the keys of each warpgroup
using BwdJob = FwdJob;

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
