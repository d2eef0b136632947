// The time term of the relative bias: weight[bucket(query time - key time)], exact for any timestamps and boundaries.
//
// A tile whose smallest and largest gap share a bucket needs one weight. Elsewhere gaps are formed in 32 bits against a
// base time of the tile and looked up in a table of cells, [2^e (1 + f / 4), 2^e (1 + (f + 1) / 4)): a cell with at
// most one boundary answers with one comparison. Gaps that do not fit take a binary search in 64 bits.
#pragma once

#include "core/bias.h"
#include "core/jagged.h"
#include "cuda/ptx/memory.h"
#include "cuda/tile/layout.h"

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
  uint32_t cells;                          // address in shared memory

  __device__ TimeTerm(const RelativeBiasParams& p, const Sequence& s, int head, void* shared)
      : weight(p.time_weight ? static_cast<const float*>(p.time_weight) + head * p.time_head_stride : nullptr),
        boundaries(p.time_boundaries),
        count(p.num_boundaries),
        query_times(p.query_timestamps ? p.query_timestamps + s.begin_q - s.first_row : p.timestamps + s.begin_kv),
        key_times(p.timestamps + s.begin_kv),
        first_query(p.query_timestamps ? s.first_row : max_int(s.first_row, 0)),
        last_query(s.mask.len - 1),
        last_key(s.mask.len - 1),
        cells(static_cast<uint32_t>(__cvta_generic_to_shared(shared))) {
    if (weight)
      for (int c = threadIdx.x; c < kCells; c += blockDim.x) static_cast<TimeCell*>(shared)[c] = make_cell(c);
  }

  __device__ int64_t query_time(int i) const { return __ldg(query_times + clamp_int(i, first_query, last_query)); }
  __device__ int64_t key_time(int j) const { return __ldg(key_times + clamp_int(j, 0, last_key)); }

  __device__ __forceinline__ TimeCell cell(int c) const {
    const uint4 x = ptx::ld_shared_u4(cells + c * static_cast<int>(sizeof(TimeCell)));
    return {static_cast<int>(x.x), static_cast<int>(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
  }
  // Cell 0 holds all gaps below 1.
  __device__ static __forceinline__ int cell_of(int gap) {
    return max_int((__float_as_int(__int2float_rz(gap)) >> 21) - 507, 0);
  }
  __device__ static int64_t first_gap(int cell) {
    return cell == 0 ? INT32_MIN : static_cast<int64_t>(ceilf(__int_as_float((cell + 507) << 21)));
  }
  __device__ TimeCell make_cell(int c) const {
    const int lo = time_bucket(first_gap(c), boundaries, count),
              hi = time_bucket(first_gap(c + 1) - 1, boundaries, count);
    if (hi - lo > 1) return {hi, ~lo, 0.f, 0.f};
    return {hi > lo ? static_cast<int>(min(boundaries[lo], static_cast<int64_t>(INT32_MAX))) : INT32_MAX, lo,
            weight[lo], weight[max_int(hi, lo)]};
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
  // These two know nothing of cells with several boundaries, but the first can say so.
  __device__ __forceinline__ int bucket_of(int gap, bool& known) const {
    const TimeCell c = cell(cell_of(gap));
    known = known && c.bucket >= 0;
    return c.bucket + (gap >= c.threshold);
  }
  __device__ __forceinline__ float weight_of(int gap) const {
    // The threshold first and one of the weights then: whole cells in flight would take four registers each.
    const uint32_t c = cells + cell_of(gap) * static_cast<int>(sizeof(TimeCell));
    return ptx::ld_shared(c + (gap >= ptx::ld_shared_int(c) ? 12 : 8));
  }
  // Do all gaps in [lo, hi] lie in cells that answer with one comparison?
  __device__ __forceinline__ bool simple(int lo, int hi) const {
    bool yes = true;
    for (int c = cell_of(lo) + lane_id(); c <= cell_of(hi); c += 32) yes = yes && cell(c).bucket >= 0;
    return __all_sync(~0u, yes);
  }
};

}  // namespace hstu_ops::cuda
