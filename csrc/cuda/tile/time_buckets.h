// The time term of the relative bias: weight[bucket(query time - key time)], exact for any timestamps and boundaries.
//
// A tile whose smallest and largest gap share a bucket needs one weight. Elsewhere gaps are formed in 32 bits against a
// base time of the tile and looked up in a table of cells, [2^e (1 + f / 4), 2^e (1 + (f + 1) / 4)): a cell with at most
// one boundary answers with one comparison. Gaps that do not fit take a binary search in 64 bits.
#pragma once

#include "core/bias.h"
#include "core/jagged.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/table_grad.h"

namespace hstu_ops::cuda {

struct __align__(16) TimeCell {
  int threshold;       // gaps from here on are in the next bucket; or, if bucket < 0, the last bucket of the cell
  int bucket;          // of the cell's first gap; ~bucket where the cell holds several boundaries
  float below, above;  // weights on either side of the threshold
};

struct TimeTerm {
  static constexpr int kCells = 128;
  static constexpr int kSharedBytes = kCells * sizeof(TimeCell);

  const float* weight;  // null: absent
  const int64_t* boundaries;
  int count;
  const int64_t *query_times, *key_times;  // by row and column of the mask
  int first_query, last_query, last_key;   // beyond these there are no times
  const TimeCell* cells;

  __device__ TimeTerm(const RelativeBiasParams& p, const Sequence& s, int head, void* shared)
      : weight(p.time_weight ? static_cast<const float*>(p.time_weight) + head * p.time_head_stride : nullptr),
        boundaries(p.time_boundaries),
        count(p.num_boundaries),
        query_times(p.query_timestamps ? p.query_timestamps + s.begin_q - s.first_row : p.timestamps + s.begin_kv),
        key_times(p.timestamps + s.begin_kv),
        first_query(p.query_timestamps ? s.first_row : max_int(s.first_row, 0)),
        last_query(s.mask.len - 1),
        last_key(s.mask.len - 1),
        cells(static_cast<const TimeCell*>(shared)) {
    if (weight)
      for (int c = threadIdx.x; c < kCells; c += blockDim.x) static_cast<TimeCell*>(shared)[c] = make_cell(c);
  }

  __device__ int64_t query_time(int i) const { return __ldg(query_times + clamp_int(i, first_query, last_query)); }
  __device__ int64_t key_time(int j) const { return __ldg(key_times + clamp_int(j, 0, last_key)); }

  // Cell 0 holds all gaps below 1.
  __device__ static __forceinline__ int cell_of(int gap) {
    return max_int((__float_as_int(__int2float_rz(gap)) >> 21) - 507, 0);
  }
  __device__ static int64_t first_gap(int cell) {
    return cell == 0 ? INT32_MIN : static_cast<int64_t>(ceilf(__int_as_float((cell + 507) << 21)));
  }
  __device__ TimeCell make_cell(int c) const {
    const int lo = time_bucket(first_gap(c), boundaries, count), hi = time_bucket(first_gap(c + 1) - 1, boundaries, count);
    if (hi - lo > 1) return {hi, ~lo, 0.f, 0.f};
    return {hi > lo ? static_cast<int>(min(boundaries[lo], static_cast<int64_t>(INT32_MAX))) : INT32_MAX, lo, weight[lo], weight[max_int(hi, lo)]};
  }

  // How many of the boundaries are <= gap, known to lie in [lo, hi].
  __device__ __forceinline__ int search(int64_t gap, int lo, int hi) const {
#pragma unroll 1
    while (lo < hi) {
      const int mid = (lo + hi) / 2;
      if (__ldg(boundaries + mid) <= gap) {
        lo = mid + 1;
      } else {
        hi = mid;
      }
    }
    return lo;
  }
  // These two know nothing of cells with several boundaries.
  __device__ __forceinline__ int bucket_of(int gap) const {
    const TimeCell c = cells[cell_of(gap)];
    return c.bucket + (gap >= c.threshold);
  }
  __device__ __forceinline__ float weight_of(int gap) const {
    const TimeCell c = cells[cell_of(gap)];
    return gap >= c.threshold ? c.above : c.below;
  }
  // Do all gaps in [lo, hi] lie in cells that answer with one comparison?
  __device__ __forceinline__ bool simple(int lo, int hi) const {
    bool yes = true;
    for (int c = cell_of(lo) + lane_id(); c <= cell_of(hi); c += 32) yes = yes && cells[c].bucket >= 0;
    return __all_sync(~0u, yes);
  }
};

// A lane's sum over elements of one bucket that has not been added to the table yet.
struct TimeRun {
  int head, bucket = 0;
  float factor, sum = 0.f;

  __device__ __forceinline__ void turn(const TableSums& sums, int to) {
    if (to == bucket) return;
    sums.add(head, bucket, sum * factor);
    bucket = to;
    sum = 0.f;
  }
  // Where the whole warp holds one bucket a single addition does.
  __device__ __forceinline__ void finish(const TableSums& sums) {
    if (__reduce_min_sync(~0u, bucket) == __reduce_max_sync(~0u, bucket)) {
#pragma unroll
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane_id() != 0) sum = 0.f;
    }
    sums.add(head, bucket, sum * factor);
    sum = 0.f;
  }
};

// The times of one warp's tile, spread over its lanes; rows are queries unless kTransposed.
template <bool kTransposed, int kRows, int kCols>
struct TileTimes {
  static_assert(kRows <= 32 && kCols <= 64, "one row and two columns a lane");
  static constexpr int kWords = (kCols + 31) / 32;

  int row, col[kWords];  // relative to the time of the first key
  int query, key;
  bool fast;         // 32 bits and one comparison are enough
  int bucket, last;  // smallest and largest bucket of the tile

  __device__ __forceinline__ TileTimes(const TimeTerm& t, int query, int key)
      : query(query), key(key), fast(false), bucket(0), last(0) {
    if (!t.weight) return;
    const int lane = lane_id();
    const int64_t base = t.key_time(key);
    bool fits = true;
    row = relative(kTransposed ? t.key_time(key + lane % kRows) : t.query_time(query + lane % kRows), base, fits);
    int lo = row, hi = row, col_lo = INT32_MAX, col_hi = INT32_MIN;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int at = w * 32 + lane % min_int(kCols, 32);
      col[w] = relative(kTransposed ? t.query_time(query + at) : t.key_time(key + at), base, fits);
      col_lo = min_int(col_lo, col[w]);
      col_hi = max_int(col_hi, col[w]);
    }
    fast = __all_sync(~0u, fits);
    if (fast) {
      lo = __reduce_min_sync(~0u, lo), hi = __reduce_max_sync(~0u, hi);
      col_lo = __reduce_min_sync(~0u, col_lo), col_hi = __reduce_max_sync(~0u, col_hi);
      const int gap_lo = kTransposed ? col_lo - hi : lo - col_hi, gap_hi = kTransposed ? col_hi - lo : hi - col_lo;
      fast = t.simple(gap_lo, gap_hi);
      bucket = t.bucket_of(gap_lo);
      last = t.bucket_of(gap_hi);
    }
    if (!fast) find_range(t);
  }

  __device__ bool constant() const { return bucket == last; }

  // s += argument * weight[bucket]
  template <int kM, int kN>
  __device__ __forceinline__ void add(const TimeTerm& t, Accumulator<kM, kN>& s, float argument) const {
    if (!fast) {
      add_searching(t, s, argument);
      return;
    }
    int rows[2 * kM];
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) rows[r] = __shfl_sync(~0u, row, r * 8 + lane_row());
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int at = __shfl_sync(~0u, col[n / 4], n % 4 * 8 + lane_col() + c);
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r) {
          float& x = s.x[r / 2][n][r % 2 * 2 + c];
          x = fmaf(argument, t.weight_of(kTransposed ? at - rows[r] : rows[r] - at), x);
        }
      }
  }

  // Bucket of one element, however far apart.
  __device__ __forceinline__ int find(const TimeTerm& t, int i, int j) const {
    return t.search(time_gap(t.query_time(query + i), t.key_time(key + j)), bucket, last);
  }

  // Adds ds to `sums`, runs of one bucket at a time; what a lane has not written yet stays in `run`.
  template <int kM, int kN>
  __device__ __forceinline__ void add_grad(const TimeTerm& t, const Accumulator<kM, kN>& ds, const TableSums& sums, TimeRun& run) const {
    if (constant()) {
      run.turn(sums, bucket);
      ds.each([&](float x, int, int) { run.sum += x; });
    } else if (!fast) {
#pragma unroll 1
      for (int at = 0; at < kM * kN * 4; ++at) {
        const int i = element_row<kN>(at), j = element_col<kN>(at);
        run.turn(sums, find(t, kTransposed ? j : i, kTransposed ? i : j));
        run.sum += ds.pick(at);
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) {
        const int own = __shfl_sync(~0u, row, r * 8 + lane_row());
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int at = __shfl_sync(~0u, col[n / 4], n % 4 * 8 + lane_col() + c);
            run.turn(sums, t.bucket_of(kTransposed ? at - own : own - at));
            run.sum += ds.x[r / 2][n][r % 2 * 2 + c];
          }
      }
    }
  }

 private:
  __device__ static __forceinline__ int relative(int64_t time, int64_t base, bool& fits) {
    const int64_t d = time_gap(time, base);
    fits = fits && d > -(1 << 30) && d < (1 << 30);
    return static_cast<int>(d);
  }
  // One element at a time: rare, so the loop over a lane's elements is kept rolled.
  template <int kM, int kN>
  __device__ __forceinline__ void add_searching(const TimeTerm& t, Accumulator<kM, kN>& s, float argument) const {
#pragma unroll 1
    for (int at = 0; at < kM * kN * 4; ++at) {
      const int i = element_row<kN>(at), j = element_col<kN>(at);
      const float w = argument * __ldg(t.weight + find(t, kTransposed ? j : i, kTransposed ? i : j));
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (at == (m * kN + n) * 4 + e) s.x[m][n][e] += w;
    }
  }
  // Smallest and largest gap in 64 bits; where they could wrap around, every bucket is possible.
  __device__ __forceinline__ void find_range(const TimeTerm& t) {
    constexpr int kQueries = kTransposed ? kCols : kRows, kKeys = kTransposed ? kRows : kCols;
    long long q_lo = INT64_MAX, q_hi = INT64_MIN, k_lo = INT64_MAX, k_hi = INT64_MIN;
    for (int i = lane_id(); i < 64; i += 32) {
      const long long q = t.query_time(query + i % kQueries), k = t.key_time(key + i % kKeys);
      q_lo = min(q_lo, q), q_hi = max(q_hi, q), k_lo = min(k_lo, k), k_hi = max(k_hi, k);
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      q_lo = min(q_lo, __shfl_xor_sync(~0u, q_lo, d));
      q_hi = max(q_hi, __shfl_xor_sync(~0u, q_hi, d));
      k_lo = min(k_lo, __shfl_xor_sync(~0u, k_lo, d));
      k_hi = max(k_hi, __shfl_xor_sync(~0u, k_hi, d));
    }
    constexpr long long kFar = 1ll << 62;
    const bool safe = q_lo > -kFar && k_lo > -kFar && q_hi < kFar && k_hi < kFar;
    bucket = safe ? t.search(q_lo - k_hi, 0, t.count) : 0;
    last = safe ? t.search(q_hi - k_lo, 0, t.count) : t.count;
  }
};

}  // namespace hstu_ops::cuda
