// Who does what. Work items are (block of rows, head) of real sequences only: every warp finds its item from the
// offsets by itself, without shared memory, host or a second kernel. Items are walked in groups of sequences whose keys
// fit the L2, longest first inside a group. Any content of the offsets gives a complete walk: a block of threads takes
// items until there are none.
#pragma once

#include "core/jagged.h"
#include "cuda/tile/layout.h"

namespace hstu_ops::cuda {

struct WorkItem {
  int sequence, head, block;
};

// An item and its sequence: what a block of threads works on, kept in shared memory.
struct Job {
  WorkItem item;
  Sequence sequence;
  int64_t index;  // of the item
  bool ordered;   // blocks take turns at dQ
};

struct Schedule {
  IntArray offsets;  // of the rows that are cut into blocks
  int64_t total = 0;
  int batch = 0, heads = 1;
  int group = 1;  // sequences a group, a power of two up to 128
};

constexpr int kChunk = 128;  // sequences examined at a time, four a lane

__device__ __forceinline__ int warp_inclusive_sum(int x) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int y = __shfl_up_sync(~0u, x, d);
    if (lane_id() >= d) x += y;
  }
  return x;
}

// Blocks of the sequences [first, first + 4) of this lane.
template <int kRows>
__device__ __forceinline__ void load_counts(const Schedule& s, int first, int (&count)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
    count[k] = first + k < s.batch ? ceil_div(row_range(s.offsets, first + k, s.batch, s.total).size, kRows) : 0;
}

// Item `rank` of the sequences with count[] blocks, the highest blocks first: a lane's four sequences start at 4 *
// lane.
__device__ __forceinline__ void pick_descending(const int (&count)[4], int rank, int& sequence, int& block) {
  const auto at_least = [&](int level) {
    int sum = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += max_int(count[k] - level, 0);
    return __reduce_add_sync(~0u, sum);
  };
  int lo = 0, hi = __reduce_max_sync(~0u, max_int(max_int(count[0], count[1]), max_int(count[2], count[3])));
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    (at_least(mid) > rank ? lo : hi) = mid;
  }
  block = lo;
  rank -= at_least(lo + 1);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const unsigned has = __ballot_sync(~0u, count[k] > lo);
    const bool mine = count[k] > lo && __popc(has & ((1u << lane_id()) - 1)) == rank;
    const unsigned found = __ballot_sync(~0u, mine);
    if (found) sequence = 4 * (__ffs(found) - 1) + k;
    rank -= __popc(has);
  }
}

// Item `index`; block -1 past the last one. kAscending: the lowest block of a sequence is its longest.
template <int kRows, bool kAscending>
__device__ __forceinline__ WorkItem find_work_inline(const Schedule& s, int64_t index) {
  WorkItem item = {0, 0, -1};
  if (index > 0xffffffff) return item;  // only ill-formed offsets make so many items
  const unsigned heads = s.heads, tile = static_cast<unsigned>(index) / heads;
  item.head = static_cast<int>(static_cast<unsigned>(index) - tile * heads);
  int64_t before = 0;
  for (int chunk = 0; chunk < s.batch; chunk += kChunk) {
    int count[4];
    load_counts<kRows>(s, chunk + 4 * lane_id(), count);
    const int mine = count[0] + count[1] + count[2] + count[3];
    const int inclusive = warp_inclusive_sum(mine);
    const int total = __shfl_sync(~0u, inclusive, 31);
    if (tile >= before + total) {
      before += total;
      continue;
    }
    int rank = static_cast<int>(tile - before);
    int end = inclusive - mine, at = kChunk;  // first sequence of this lane that ends past `rank`
#pragma unroll
    for (int k = 3; k >= 0; --k) {
      int sum = end;
#pragma unroll
      for (int i = 0; i <= k; ++i) sum += count[i];
      if (sum > rank) at = 4 * lane_id() + k;
    }
    const int first = __reduce_min_sync(~0u, at) / s.group * s.group;
    int skipped = 0, kept = 0;  // blocks before and in the group
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = 4 * lane_id() + k;
      if (i < first) skipped += count[k];
      if (i < first || i >= first + s.group) count[k] = 0;
      kept += count[k];
    }
    rank -= __reduce_add_sync(~0u, skipped);
    if (kAscending) rank = __reduce_add_sync(~0u, kept) - 1 - rank;
    pick_descending(count, rank, item.sequence, item.block);
    item.sequence += chunk;
    return item;
  }
  return item;
}

// The same, not inlined: it shares no registers with the rest of a kernel.
template <int kRows, bool kAscending>
__device__ __noinline__ WorkItem find_work(const Schedule& s, int64_t index) {
  return find_work_inline<kRows, kAscending>(s, index);
}

// ---- host ----

// Keys and values of the sequences of a group take about 16 MB: what an L2 holds beside everything else.
inline int sequences_a_group(const AttentionProblem& a, int element_bytes) {
  constexpr double kBytes = 16e6;
  const JaggedParams& j = a.jagged;
  const double bytes =
      static_cast<double>(j.total_kv) * a.heads * (a.dim_qk + a.dim_v) * element_bytes / max_int(j.batch, 1);
  int group = 1;
  while (group < kChunk && 2 * group * bytes <= kBytes) group *= 2;
  return group;
}

inline int element_bytes(DType type) { return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2; }

inline Schedule key_schedule(const AttentionProblem& a) {
  return {a.jagged.offsets, a.jagged.total_kv, a.jagged.batch, a.heads, sequences_a_group(a, element_bytes(a.dtype))};
}

inline Schedule query_schedule(const AttentionProblem& a) {
  Schedule s = key_schedule(a);
  if (a.jagged.offsets_q) s.offsets = a.jagged.offsets_q;
  s.total = a.jagged.total_q;
  return s;
}

// Items of well-formed offsets at most; a grid of at least one block.
inline int64_t most_items(int64_t total, int batch, int rows, int heads) {
  const int64_t items = (total / rows + batch) * heads;
  constexpr int64_t kMost = 0x7fffffff;
  return items < 1 ? 1 : items < kMost ? items : kMost;
}

}  // namespace hstu_ops::cuda
