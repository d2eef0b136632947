// Items of the work and the tiles each visits, with what every computing warpgroup keeps of a tile:
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

}  // namespace hstu_ops::cuda::sm90
