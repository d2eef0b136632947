// The time term of the relative bias: weight[bucket(query time - key time)], exact for any timestamps and boundaries.
//
// Where times rise, the corners of a tile have its smallest and its largest gap; a tile of one bucket needs one weight,
// a tile of few a comparison with each boundary between them (tile/time_steps.h). Elsewhere gaps are formed in 32 bits
// against a base time of the tile and looked up in a table of cells, [2^e (1 + f / 4), 2^e (1 + (f + 1) / 4)): a cell
// with at most one boundary answers with one comparison. For tables of more buckets than that can serve (2048 of a
// square root) cells hold a line instead, which gives the bucket or the one before it, and the boundary between them
// decides.
// Gaps that do not fit take a binary search in 64 bits.
#pragma once

#include "core/bias.h"
#include "core/jagged.h"
#include "cuda/ptx/memory.h"
#include "cuda/tile/layout.h"

namespace hstu_ops::cuda {

struct __align__(8) TimeCell {
  int threshold;  // gaps from here on are in the next bucket
  int bucket;     // of the cell's first gap; -1 where the cell holds several boundaries
};

// slope * distance + start, rounded down: the bucket of a gap or the one before it.
struct TimeLine {
  float slope, start;  // start < 0: there is no such line

  // A line that is off by least to most at the boundaries, of which the first is number `first`.
  __device__ static TimeLine centred(float slope, float least, float most, int first) {
    constexpr float kRoom = 0.9f;  // of 1, for rounding
    return {slope, most - least < kRoom ? max(first + 0.5f - 0.5f * (most + least), 0.f) : -1.f};
  }
  __device__ __forceinline__ int at(float distance) const { return __float2int_rd(fmaf(slope, distance, start)); }
};

// How many boundaries are <= gap, known to lie in [lo, hi]; boundary(i): number i.
template <class F>
__device__ __forceinline__ int search_boundaries(int64_t gap, int lo, int hi, F&& boundary) {
#pragma unroll 1
  while (lo < hi) {
    const int mid = (lo + hi) / 2;
    if (boundary(mid) <= gap) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

struct BucketRange {
  int first, last;
  bool known;
};

struct TimeTerm {
  static constexpr int kCells = 128;
  static constexpr int kSharedBytes = kCells * sizeof(TimeCell);

  const float* weight;  // null: absent
  const int64_t* boundaries;
  int count;
  const int64_t *query_times, *key_times;  // by row and column of the mask
  int first_query, last_query, last_key;   // beyond these there are no times
  uint32_t cells;                          // address in shared memory

  __device__ TimeTerm(const RelativeBiasParams& p, const Sequence& s, int head, void* shared)
      : weight(p.time_weight ? static_cast<const float*>(p.time_weight) + head * p.time_head_stride : nullptr),
        boundaries(p.time_boundaries),
        count(p.num_boundaries),
        query_times(own_times(p, s) ? p.query_timestamps + s.begin_q - s.first_row : p.timestamps + s.begin_kv),
        key_times(p.timestamps + s.begin_kv),
        first_query(own_times(p, s) ? s.first_row : max_int(s.first_row, 0)),
        last_query(s.mask.len - 1),
        last_key(s.mask.len - 1),
        cells(static_cast<uint32_t>(__cvta_generic_to_shared(shared))) {}

  // Have queries times of their own? A sequence without any must not read those of another.
  __device__ static bool own_times(const RelativeBiasParams& p, const Sequence& s) {
    return p.query_timestamps && s.num_q > 0;
  }

  // Of tables of more boundaries than this, cells hold lines (kLines).
  static constexpr int kMostCellBoundaries = 128;

  // This thread's share of the cells.
  template <bool kLines = false>
  __device__ __forceinline__ void make_cells(void* shared, int thread, int threads) const {
    for (int c = thread; c < kCells; c += threads) {
      if constexpr (kLines) {
        static_cast<TimeLine*>(shared)[c] = make_line(c);
      } else {
        static_cast<TimeCell*>(shared)[c] = make_cell(c);
      }
    }
  }

  __device__ int64_t query_time(int i) const { return __ldg(query_times + clamp_int(i, first_query, last_query)); }
  __device__ int64_t key_time(int j) const { return __ldg(key_times + clamp_int(j, 0, last_key)); }

  __device__ __forceinline__ TimeCell cell(int c) const {
    const int2 x = ptx::ld_shared_int_v2(cells + c * static_cast<int>(sizeof(TimeCell)));
    return {x.x, x.y};
  }
  // Cell 0 holds all gaps below 1.
  __device__ static __forceinline__ int cell_of(int gap) {
    return max_int((__float_as_int(__int2float_rz(gap)) >> 21) - 507, 0);
  }
  __device__ static int64_t first_gap(int cell) {
    return cell == 0 ? INT32_MIN : static_cast<int64_t>(ceilf(__int_as_float((cell + 507) << 21)));
  }
  __device__ TimeCell make_cell(int c) const {
    const int2 ends = buckets(first_gap(c), first_gap(c + 1) - 1);
    const int lo = ends.x, hi = ends.y;
    if (hi - lo > 1) return {INT32_MAX, -1};
    return {hi > lo ? static_cast<int>(min(boundaries[lo], static_cast<int64_t>(INT32_MAX))) : INT32_MAX, lo};
  }
  // Distance of a gap from the start of its cell.
  __device__ static __forceinline__ float distance(int gap) {
    const float x = __int2float_rz(gap);
    return x - __int_as_float(__float_as_int(x) & ~0x1fffff);
  }
  __device__ __forceinline__ TimeLine make_line(int c) const {
    constexpr int kMost = 64;
    const int64_t begin = first_gap(c), end = first_gap(c + 1);
    const int2 ends = buckets(begin, end - 1);
    const int lo = ends.x, hi = ends.y;
    if (hi - lo <= 1) return {0.f, static_cast<float>(lo)};
    if (hi - lo > kMost || c == 0) return {0.f, -1.f};
    const auto x = [&](int l) { return distance(static_cast<int>(boundaries[l])); };
    const float first = x(lo), slope = (hi - 1 - lo) / (x(hi - 1) - first);
    float least = 0.f, most = 0.f;
#pragma unroll 4
    for (int l = lo; l < hi; ++l) {
      const float off = slope * x(l) - (l - lo);
      least = l == lo ? off : min(least, off), most = l == lo ? off : max(most, off);
    }
    const TimeLine line = TimeLine::centred(slope, least, most, lo);
    // The start and the end of the cell may still be off.
    const int low = line.at(distance(static_cast<int>(begin))), high = line.at(distance(static_cast<int>(end - 1)));
    return low >= lo - 1 && low <= lo && high >= hi - 1 && high <= hi ? line : TimeLine{0.f, -1.f};
  }

  // Do the times of this thread's share of the queries, or keys, rise? Any thread that says no must be heard.
  template <bool kQueries>
  __device__ __forceinline__ bool rising(int thread, int threads) const {
    const int64_t* times = kQueries ? query_times : key_times;
    int falls = 0;  // not a conjunction: that would wait for one pair of times before it loads the next
#pragma unroll 8
    for (int i = (kQueries ? first_query : 0) + thread; i < last_key; i += threads)
      falls += __ldg(times + i) > __ldg(times + i + 1);
    return falls == 0;
  }

  // Of two gaps: the searches wait for memory together.
  __device__ __forceinline__ int2 buckets(int64_t a, int64_t b) const {
    int2 at = {0, 0};
#pragma unroll 1
    for (int step = 1 << (31 - __clz(count | 1)); step > 0; step /= 2) {
      if (at.x + step <= count && __ldg(boundaries + at.x + step - 1) <= a) at.x += step;
      if (at.y + step <= count && __ldg(boundaries + at.y + step - 1) <= b) at.y += step;
    }
    return at;
  }

  // Smallest and largest bucket of a tile of each lane, all with the same rows, if times of columns rise. Not known
  // where gaps could wrap around or times of columns are too far apart for 32 bits. Rows are queries unless
  // kTransposed.
  template <bool kTransposed, int kRows, int kCols>
  __device__ __forceinline__ BucketRange corners(int query, int key) const {
    long long lo = kTransposed ? key_time(key + lane_id() % kRows) : query_time(query + lane_id() % kRows), hi = lo;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      lo = min(lo, __shfl_xor_sync(~0u, lo, d));
      hi = max(hi, __shfl_xor_sync(~0u, hi, d));
    }
    const long long left = kTransposed ? query_time(query) : key_time(key),
                    right = kTransposed ? query_time(query + kCols - 1) : key_time(key + kCols - 1);
    return kTransposed ? between(left, right, lo, hi, right - left) : between(lo, hi, left, right, right - left);
  }
  // Of queries and keys between two times each; span: of the columns' times.
  __device__ __forceinline__ BucketRange between(long long first_query, long long last_query, long long first_key,
                                                 long long last_key, long long span) const {
    constexpr long long kFar = 1ll << 61;
    if (min(first_query, first_key) < -kFar || max(last_query, last_key) > kFar || span > INT32_MAX)
      return {0, 0, false};
    const int2 range = buckets(first_query - last_key, last_query - first_key);
    return {range.x, range.y, true};
  }

  __device__ __forceinline__ int search(int64_t gap, int lo, int hi) const {
    return search_boundaries(gap, lo, hi, [&](int i) { return __ldg(boundaries + i); });
  }
  // Knows nothing of cells that do not answer.
  template <bool kLines>
  __device__ __forceinline__ int bucket_of(int gap) const {
    const TimeCell c = cell(cell_of(gap));
    if constexpr (kLines) {
      const TimeLine line = {__int_as_float(c.threshold), __int_as_float(c.bucket)};
      return decide(gap, min_int(line.at(distance(gap)), count - 1));
    } else {
      return c.bucket + (gap >= c.threshold);
    }
  }
  // Negative where the gap's cell does not answer.
  template <bool kLines>
  __device__ __forceinline__ int known_bucket(int gap) const {
    return cell(cell_of(gap)).bucket < 0 ? -1 : bucket_of<kLines>(gap);
  }
  // The bucket of a gap out of `guess` and the one behind it.
  __device__ __forceinline__ int decide(int gap, int guess) const { return guess + (gap >= __ldg(boundaries + guess)); }
  // A line for gaps of the buckets [first, last] and how far they are from boundary `first`.
  __device__ __forceinline__ TimeLine line_through(int first, int last) const {
    constexpr int kMost = 128;
    if (last - first < 2 || last - first > kMost) return {0.f, -1.f};
    const int64_t origin = __ldg(boundaries + first);
    const int64_t span = __ldg(boundaries + last - 1) - origin;
    if (span <= 0) return {0.f, -1.f};
    const float slope = (last - 1 - first) / static_cast<float>(span);
    float least = 0.f, most = 0.f;  // as the first boundary's
    for (int l = first + lane_id(); l < last; l += 32) {
      const float off = slope * static_cast<float>(__ldg(boundaries + l) - origin) - (l - first);
      least = min(least, off), most = max(most, off);
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      least = min(least, __shfl_xor_sync(~0u, least, d));
      most = max(most, __shfl_xor_sync(~0u, most, d));
    }
    return TimeLine::centred(slope, least, most, first);
  }
  // Do all gaps in [lo, hi] lie in cells that answer with one comparison?
  __device__ __forceinline__ bool simple(int lo, int hi) const {
    bool yes = true;
    for (int c = cell_of(lo) + lane_id(); c <= cell_of(hi); c += 32) yes = yes && cell(c).bucket >= 0;
    return __all_sync(~0u, yes);
  }
};

// Tables that cells of one boundary each do not hold: some kernels are compiled for them apart.
inline bool has_many_boundaries(const RelativeBiasParams& p) {
  return p.time_weight && p.num_boundaries > TimeTerm::kMostCellBoundaries;
}
template <class T>
bool has_many_buckets(const RelativeBiasParams& p) {
  return kIs16Bit<T> && has_many_boundaries(p);
}

}  // namespace hstu_ops::cuda
