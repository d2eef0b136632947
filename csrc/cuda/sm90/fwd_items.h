// An item of the work of a kernel whose rows are queries, and the tiles of keys it visits, derived from core/mask.h:
// found by a warp in shared memory, read by all others.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda::sm90 {

constexpr int kItems = 3;  // the item in work and the next two: a longer queue would leave blocks idle at the end

// The next item is found when the loading warp has so many tiles of this one left; or, after a short one, as soon as
// there is room for it: finding takes 3 to 4 us.
constexpr int kLateTiles = 8, kShortTiles = 4;

// A set of tiles: three intervals in order.
struct TileSpans {
  Interval prefix, window, group;

  // Tiles of kCols columns that meet the spans.
  template <int kCols>
  __device__ static TileSpans meeting(const RowSpans& r) {
    TileSpans t;
    t.prefix = {0, ceil_div(r.prefix.hi, kCols)};
    t.window = follow<kCols>(t.prefix.hi, r.window);
    t.group = follow<kCols>(t.window.hi, r.group);
    return t;
  }
  // Those in [lo, hi).
  __device__ void clip(int lo, int hi) {
    const auto cut = [&](Interval& x, int end) {
      x = x.meets(lo, hi) ? Interval{max_int(x.lo, lo), min_int(x.hi, hi)} : Interval{end, end};
    };
    cut(prefix, lo), cut(window, prefix.hi), cut(group, window.hi);
  }
  __device__ bool has(int tile) const { return prefix.has(tile) || window.has(tile) || group.has(tile); }
  __device__ int end() const { return group.hi; }
  __device__ int size() const { return prefix.size() + window.size() + group.size(); }
  // The first tile behind `tile` (-1: the first of all); at least end() if there is none.
  __device__ int next(int tile) const {
    tile = max_int(tile + 1, prefix.lo);
    if (tile >= prefix.hi) tile = max_int(tile, window.lo);
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

// Tiles that are kept whole: [0, prefix) and an interval.
struct CoveredTiles {
  int prefix;
  Interval window;

  __device__ bool has(int tile) const { return tile < prefix || window.has(tile); }
  // The same in registers that all lanes share.
  __device__ CoveredTiles uniform() const {
    return {ptx::uniform(prefix), {ptx::uniform(window.lo), ptx::uniform(window.hi)}};
  }
};

// What one computing warpgroup needs of an item's tiles.
struct GroupTiles {
  TileSpans kept;  // its queries keep some of
  CoveredTiles covered;

  template <int kCols>
  __device__ static GroupTiles make(const Mask& mask, int m0, int m1) {
    GroupTiles g;
    const int lo = max_int(m0, 0), hi = min_int(m1, mask.len);  // the same in both: what they share is computed once
    g.kept = TileSpans::meeting<kCols>(mask.rows(lo, hi));
    const RowSpans all = lo == m0 && hi == m1 ? mask.common(lo, hi) : RowSpans{};
    g.covered.prefix = all.prefix.hi / kCols;
    g.covered.window = {ceil_div(all.window.lo, kCols), all.window.hi / kCols};
    return g;
  }
  __device__ bool covers(int tile) const { return covered.has(tile); }
  __device__ bool none() const { return kept.next(-1) >= kept.end(); }
  // The end of the run of kept tiles that `tile` is in.
  __device__ int run_end(int tile) const {
    int end = tile < kept.prefix.hi ? kept.prefix.hi : tile < kept.window.hi ? kept.window.hi : kept.group.hi;
    if (end == kept.window.lo) end = kept.window.hi;
    return end == kept.group.lo ? kept.group.hi : end;
  }
};

// Written by one warp for all others.
template <class C>
struct FwdItem {
  Job job;
  int first;  // query of the first row, a multiple of 64, negative in front of the sequence
  bool more;  // false: the block is done
  static constexpr int kGroups = C::kRows / 64;
  GroupTiles groups[kGroups + 1];  // of 64 rows each; the last: of all of them
  // Where a bias needs them, of the queries: low words of their times; the first and the last time of each 16.
  int times[C::kTimeRows];
  longlong2 ends[C::kTimeRows / 16 + 1];

  __device__ const TileSpans& tiles() const { return groups[kGroups].kept; }
  __device__ int row() const { return job.sequence.first_row + first; }  // of the mask
  // Whether the item after this one waits for the loading warp to get near the end of this one.
  __device__ bool paced() const { return tiles().size() > kShortTiles; }

  // By one warp; all lanes pass the same. Keeps part `part` of `parts` of the tiles.
  __device__ __forceinline__ void set(const WorkItem& item, const Sequence& s, int64_t index, int part, int parts) {
    // The rows that are missing in a sequence's last item would leave warpgroups idle over all its keys: they are
    // missing in its first item instead, which has the fewest.
    const int missing = (kGroups - ceil_div(s.num_q, 64) % kGroups) % kGroups * 64;
    const int lane = lane_id(), begin = item.block * C::kRows - missing;
    const auto row = [&](int r) { return s.first_row + clamp_int(begin + r, 0, s.num_q); };
    const int m0 = lane < kGroups ? lane * 64 : 0, m1 = lane < kGroups ? m0 + 64 : C::kRows;
    const GroupTiles mine = GroupTiles::make<C::kCols>(s.mask, row(m0), row(m1));
    if (lane <= kGroups) groups[lane] = mine;
    if (lane == 0) job = {item, s, index}, first = begin;
    if (parts == 1) return;
    __syncwarp();
    const int lo = tiles().next(-1), size = max_int(tiles().end() - lo, 0);
    const int at = static_cast<int>(int64_t{size} * part / parts),
              end = static_cast<int>(int64_t{size} * (part + 1) / parts);
    __syncwarp();
    if (lane <= kGroups) groups[lane].kept.clip(lo + at, lo + end);
  }
};

}  // namespace hstu_ops::cuda::sm90
