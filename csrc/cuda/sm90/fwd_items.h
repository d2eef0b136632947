// An item of the forward's work and the tiles of keys it visits, derived from core/mask.h: found by a warp in shared
// memory, read by all others.
#pragma once

#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda::sm90 {

// A set of tiles: [0, prefix), [window.lo, window.hi) and [group.lo, group.hi), in this order.
struct TileSpans {
  int prefix = 0;
  Interval window, group;

  // Tiles of kCols columns that meet the spans.
  template <int kCols>
  __device__ static TileSpans meeting(const RowSpans& r) {
    TileSpans t;
    t.prefix = ceil_div(r.prefix.hi, kCols);
    t.window = follow<kCols>(t.prefix, r.window);
    t.group = follow<kCols>(t.window.hi, r.group);
    return t;
  }
  __device__ bool has(int tile) const { return tile < prefix || window.has(tile) || group.has(tile); }
  __device__ int end() const { return group.hi; }
  // The first tile behind `tile` (-1: the first of all); at least end() if there is none.
  __device__ int next(int tile) const {
    ++tile;
    if (tile >= prefix) tile = max_int(tile, window.lo);
    if (tile >= window.hi) tile = max_int(tile, group.lo);
    return tile;
  }

 private:
  template <int kCols>
  __device__ static Interval follow(int end, const Interval& columns) {
    if (columns.lo >= columns.hi) return {end, end};
    const int lo = max_int(columns.lo / kCols, end);
    return {lo, max_int(ceil_div(columns.hi, kCols), lo)};
  }
};

// What one computing warpgroup needs of an item's tiles.
struct GroupTiles {
  TileSpans kept;    // its queries keep some of
  int prefix;        // and all of [0, prefix)
  Interval covered;  // and of these

  template <int kCols>
  __device__ static GroupTiles make(const Mask& mask, int m0, int m1) {
    GroupTiles g;
    g.kept = TileSpans::meeting<kCols>(mask.rows(m0, m1));
    const RowSpans all = mask.common(m0, m1);
    g.prefix = all.prefix.hi / kCols;
    g.covered = {ceil_div(all.window.lo, kCols), all.window.hi / kCols};
    return g;
  }
  __device__ bool covers(int tile) const { return tile < prefix || covered.has(tile); }
  // The end of the run of kept tiles that `tile` is in.
  __device__ int run_end(int tile) const {
    int end = tile < kept.prefix ? kept.prefix : tile < kept.window.hi ? kept.window.hi : kept.group.hi;
    if (end == kept.window.lo) end = kept.window.hi;
    return end == kept.group.lo ? kept.group.hi : end;
  }
};

// Written by one warp for all others.
template <class C>
struct FwdItem {
  Job job;
  bool more;                          // false: the block is done
  GroupTiles groups[C::kGroups + 1];  // the last: of all of them

  __device__ const TileSpans& tiles() const { return groups[C::kGroups].kept; }

  // By one warp; all lanes pass the same.
  __device__ __forceinline__ void set(const WorkItem& item, const Sequence& s, int64_t index) {
    const int lane = lane_id(), first = item.block * C::kRows + (lane < C::kGroups ? lane * 64 : 0);
    const auto row = [&](int r) { return s.first_row + min_int(r, s.num_q); };
    const GroupTiles mine =
        GroupTiles::make<C::kCols>(s.mask, row(first), row(first + (lane < C::kGroups ? 64 : C::kRows)));
    if (lane <= C::kGroups) groups[lane] = mine;
    if (lane == 0) job = {item, s, index};
  }
};

}  // namespace hstu_ops::cuda::sm90
