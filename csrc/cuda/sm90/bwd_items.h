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

  // A bit for each group.
  __device__ void set_kept(unsigned groups) { code_ |= groups; }
  __device__ void set_covered(unsigned groups) { code_ |= groups << 3; }
  // Nothing is kept, but visited all the same: a bit that says no more, for covered() is asked where something is kept.
  __device__ void set_visited() { code_ |= 8; }
  // No earlier block of keys keeps any of it.
  __device__ void set_first() { code_ |= 64; }
  __device__ void set_last() { code_ |= 128; }
  __device__ int tile() const { return code_ >> 8; }
  __device__ bool kept(int group) const { return code_ >> group & 1; }
  __device__ bool covered(int group) const { return code_ >> group & 8; }
  __device__ bool first() const { return code_ & 64; }
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
  bool more;  // false: the block is done
};

// Of its keys, where a bias needs them: low words of their times; the smallest and the largest of each 16
// (bias_notes.h).
template <class C>
struct BwdRows {
  int times[C::kTimeRows];
  longlong2 ends[C::kTimeRows / 16 + 1];
};

// 32 tiles in a row of an item, found by that warp for the one that loads them.
struct TilePart {
  BwdTile tiles[32];  // visited or not
  bool last;          // of the item
};

// A tile of queries being noted: its first row of the mask, the smallest and the largest time (BiasShape::time).
struct BwdColumns {
  BwdTile tile;
  longlong2 ends;
  int row;
};

// Tile `index` as the item's keys see it.
template <class C>
__device__ BwdTile classify_queries(const Job& job, int index) {
  const Sequence& s = job.sequence;
  BwdTile tile(index);
  if (index * C::kQueries >= s.num_q) return tile;
  const int m0 = s.first_row + index * C::kQueries, m1 = m0 + C::kQueries;
  const int n0 = job.item.block * C::kKeys;
  const auto each = [&](auto&& holds) {
    unsigned groups = 0;
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
      const int n = n0 + (C::kSplitKeys ? group * 64 : 0);
      groups |= holds(n, n + 64) << group;
    }
    return groups;
  };
  const RowSpans some = s.mask.rows(m0, m1);
  tile.set_kept(each([&](int a, int b) { return some.meets(a, min_int(b, s.mask.len)); }));
  const RowSpans all = s.mask.common(m0, m1);
  tile.set_covered(each([&](int a, int b) { return all.covers(a, b); }));
  if (C::kFinishes && tile.visited() && !some.meets(0, n0)) tile.set_first();
  // Blocks of targets that other targets do not keep: where parts have an order, every block from a tile's first one on
  // has its turn.
  if (C::kOrdered && !tile.visited() && n0 < m1 && some.meets(0, n0)) tile.set_visited();
  return tile;
}

}  // namespace hstu_ops::cuda::sm90
