// Who does what. Work items are (block of rows, head) of real sequences only: every warp finds its item from the
// offsets by itself, without shared memory, host or a second kernel. Items are walked in groups of sequences and heads
// whose keys fit the L2, longest first inside a group; the last group is wider, so that a launch ends with short items.
// Any content of the offsets gives a complete walk: a block of threads takes items until there are none.
#pragma once

#include <climits>

#include "core/jagged.h"
#include "cuda/tile/lane.h"

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
  int group = 1;             // sequences a group, a power of two up to 128
  int head_group = 1;        // heads a group, a divisor of `heads`
  int last_group = INT_MAX;  // sequences from here on are one group, with all heads
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

// Blocks of the sequences [first, first + 4) of this lane. All offsets are on their way before the first is used.
template <int kRows, class Int>
__device__ __forceinline__ void load_counts(const Schedule& s, const Int* offsets, int first, int (&count)[4]) {
  Int at[5];
#pragma unroll
  for (int k = 0; k < 5; ++k) at[k] = offsets[min_int(first + k, s.batch)];
  int64_t begin = clamped_offset(at[0], first, s.batch, s.total);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t end = clamped_offset(at[k + 1], first + k + 1, s.batch, s.total);
    count[k] = first + k < s.batch ? ceil_div(row_range(begin, end).size, kRows) : 0;
    begin = end;
  }
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

// Finds items; keeps what it has learned for the next one. kAscending: the lowest block of a sequence is its longest.
template <int kRows, bool kAscending>
class WorkFinder {
 public:
  __device__ explicit WorkFinder(const Schedule& schedule) : s_(schedule) {}

  // Item `index`, no lower than the one before; block -1 past the last one.
  __device__ __forceinline__ WorkItem find(int64_t index) {
    WorkItem item = {0, 0, -1};
    if (index > 0xffffffff) return item;  // only ill-formed offsets make so many items
    const unsigned heads = s_.heads, tile = static_cast<unsigned>(index) / heads;
    item.head = static_cast<int>(static_cast<unsigned>(index) - tile * heads);
    while (tile >= chunk_end_)
      if (!next_chunk()) return item;
    if (tile >= group_end_) find_group(tile);
    const unsigned size = group_end_ - group_begin_;
    unsigned rank = tile - group_begin_;
    if (s_.head_group < s_.heads && !is_last_) {  // one group of heads of these sequences after the other
      const unsigned local = rank * heads + item.head, hg = s_.head_group;
      const unsigned before = local / (size * hg), inside = local - before * size * hg;
      rank = inside / hg;
      item.head = static_cast<int>(before * hg + inside % hg);
    }
    int count[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) count[k] = in_group(k) ? count_[k] : 0;
    pick_descending(count, static_cast<int>(kAscending ? size - 1 - rank : rank), item.sequence, item.block);
    item.sequence += chunk_;
    return item;
  }

 private:
  __device__ bool in_group(int k) const {
    const int i = 4 * lane_id() + k;
    return i >= group_ && i < stop_;
  }
  __device__ __forceinline__ bool next_chunk() {
    chunk_ += kChunk;
    if (chunk_ >= s_.batch) return false;
    const int first = chunk_ + 4 * lane_id();
    if (s_.offsets.is_int64) {
      load_counts<kRows>(s_, static_cast<const int64_t*>(s_.offsets.data), first, count_);
    } else {
      load_counts<kRows>(s_, static_cast<const int32_t*>(s_.offsets.data), first, count_);
    }
    const int mine = count_[0] + count_[1] + count_[2] + count_[3];
    const int inclusive = warp_inclusive_sum(mine);
    before_ = chunk_end_ + inclusive - mine;
    group_end_ = chunk_end_;
    chunk_end_ += __shfl_sync(~0u, inclusive, 31);
    return true;
  }
  __device__ __forceinline__ void find_group(unsigned tile) {
    unsigned end = before_;
    int at = kChunk;  // first sequence of this lane that ends past `tile`
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      end += count_[k];
      if (at == kChunk && end > tile) at = 4 * lane_id() + k;
    }
    group_ = __reduce_min_sync(~0u, at);
    is_last_ = chunk_ + group_ >= s_.last_group;
    group_ = is_last_ ? s_.last_group - chunk_ : group_ & -s_.group;
    stop_ = is_last_ ? kChunk : group_ + s_.group;
    unsigned kept = 0, skipped = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      kept += in_group(k) ? count_[k] : 0;
      skipped += 4 * lane_id() + k < group_ ? count_[k] : 0;
    }
    const unsigned chunk_begin = __shfl_sync(~0u, before_, 0);
    group_begin_ = chunk_begin + __reduce_add_sync(~0u, skipped);
    group_end_ = group_begin_ + __reduce_add_sync(~0u, kept);
  }

  const Schedule& s_;
  int count_[4] = {0, 0, 0, 0};               // blocks of this lane's sequences
  int chunk_ = -kChunk;                       // first sequence examined
  int group_ = 0, stop_ = 0;                  // first of the group and the one behind it, from there
  bool is_last_ = false;                      // the group
  unsigned before_ = 0, chunk_end_ = 0;       // blocks before this lane's sequences, and up to the end of the chunk
  unsigned group_begin_ = 0, group_end_ = 0;  // blocks before and up to the end of the group
};

template <int kRows, bool kAscending>
__device__ __forceinline__ WorkItem find_work_inline(const Schedule& s, int64_t index) {
  return WorkFinder<kRows, kAscending>(s).find(index);
}

// The same, not inlined: it shares no registers with the rest of a kernel.
template <int kRows, bool kAscending>
__device__ __noinline__ WorkItem find_work(const Schedule& s, int64_t index) {
  return find_work_inline<kRows, kAscending>(s, index);
}

// ---- host ----

// Keys and values of a group take about 16 MB: what an L2 holds beside everything else.
inline void set_groups(Schedule& s, const AttentionProblem& a, int bytes_a_row) {
  constexpr double kBytes = 16e6;
  const JaggedParams& j = a.jagged;
  const double bytes = static_cast<double>(j.total_kv) * bytes_a_row / max_int(j.batch, 1);
  while (s.group < kChunk && 2 * s.group * s.heads * bytes <= kBytes) s.group *= 2;
  s.head_group = s.heads;
  while (s.head_group > 1 && (s.heads % s.head_group != 0 || s.group * s.head_group * bytes > kBytes)) --s.head_group;
}

inline int element_bytes(DType type) { return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2; }

// heads: of an item; the number of an item's head is then that of so many.
inline Schedule key_schedule(const AttentionProblem& a, int heads = 1) {
  Schedule s;
  s.offsets = a.jagged.offsets;
  s.total = a.jagged.total_kv;
  s.batch = a.jagged.batch;
  s.heads = ceil_div(a.heads, heads);
  set_groups(s, a, heads * (a.dim_qk + a.dim_v) * element_bytes(a.dtype));
  return s;
}

inline Schedule query_schedule(const AttentionProblem& a, int heads = 1) {
  Schedule s = key_schedule(a, heads);
  if (a.jagged.offsets_q) s.offsets = a.jagged.offsets_q;
  s.total = a.jagged.total_q;
  return s;
}

// The last group then has so many items of `rows` rows that `processors` are busy with them for as long as `lengths` of
// the longest take; all: and so has every other group. No group crosses a chunk.
inline void widen_last_group(Schedule& s, int rows, int processors, bool all = false, double lengths = 0.75) {
  const double mean = static_cast<double>(s.total) / max_int(s.batch, 1);
  int wide = s.group;
  while (wide < kChunk && wide * s.heads * mean / 2 < lengths * rows * processors) wide *= 2;
  if (all) s.group = wide;
  s.last_group = max_int((s.batch - wide) / s.group * s.group, (s.batch - 1) / kChunk * kChunk);
}

constexpr int kMostBlocks = 0x7fffffff;  // of a grid

// Items of well-formed offsets at most; a grid of at least one block.
inline int64_t most_items(int64_t total, int batch, int rows, int heads) {
  const int64_t items = (total / rows + batch) * heads;
  return items < 1 ? 1 : items < kMostBlocks ? items : kMostBlocks;
}

}  // namespace hstu_ops::cuda
