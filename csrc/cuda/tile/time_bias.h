// Time terms of one warp's tile of many buckets, or of which the corners do not tell: each element is looked up.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/tile/kept_buckets.h"
#include "cuda/tile/table_grad.h"
#include "cuda/tile/time_buckets.h"

namespace hstu_ops::cuda {

// Buckets a tile's scratch has room for.
template <class Slots, class = void>
constexpr int kSlots = 64;
template <class Slots>
constexpr int kSlots<Slots, std::void_t<decltype(Slots::kCount)>> = Slots::kCount;

// The times of one warp's tile, spread over its lanes; rows are queries unless kTransposed. kLines: see TimeTerm.
template <bool kTransposed, int kRows, int kCols, bool kLines = false>
struct TileTimes {
  static_assert(kRows <= 32 && kCols <= 64, "one row and two columns a lane");
  static constexpr int kWords = (kCols + 31) / 32;

  int row, col[kWords];  // relative to the time of the first key
  int query, key;
  enum Way { kSearch, kCells, kLine } way;  // how elements are looked up: with the latter two 32 bits are enough
  int bucket, last;                         // smallest and largest bucket of the tile
  TimeLine line;                            // for kLine: of all its gaps, from the boundary behind `bucket` on

  __device__ __forceinline__ TileTimes(const TimeTerm& t, int query, int key) : query(query), key(key) {
    const int lane = lane_id();
    const int64_t base = t.key_time(key);
    bool fits = true;
    row = relative(kTransposed ? t.key_time(key + lane % kRows) : t.query_time(query + lane % kRows), base, fits);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int at = w * 32 + lane % min_int(kCols, 32);
      col[w] = relative(kTransposed ? t.query_time(query + at) : t.key_time(key + at), base, fits);
    }
    choose_way(t, __all_sync(~0u, fits));
  }
  // The same where the lane's times are known, all within 2^30 of the first key's.
  __device__ __forceinline__ TileTimes(const TimeTerm& t, int query, int key, int row, const int (&cols)[kWords])
      : row(row), query(query), key(key) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) col[w] = cols[w];
    choose_way(t, true);
  }

  // s += argument * weight[bucket]. Buckets found are kept in `slots` for the gradient, if there are any.
  template <int kM, int kN, class Slots = NoSlots>
  __device__ __forceinline__ void add(const TimeTerm& t, Accumulator<kM, kN>& s, float argument,
                                      const Slots& slots = {}) const {
    constexpr bool kKeep = !kLines && !std::is_same_v<Slots, NoSlots>;
    using Kept = KeptBuckets<kM, kN>;
    if (way == kSearch) {
      add_searching(t, s, argument);
      if constexpr (kKeep) Kept::store_nothing(slots);
    } else if constexpr (kKeep) {
      Kept kept;
      int element = 0;
      each_bucket(t, s, [&](float& x, int at) {
        x = fmaf(argument, __ldg(t.weight + at), x);
        kept.put(slots, element++, at - bucket);
      });
      kept.finish(slots, bucket, last - bucket + 1);
    } else {
      each_bucket(t, s, [&](float& x, int at) { x = fmaf(argument, __ldg(t.weight + at), x); });
    }
  }

  // Bucket of the lane's element `at`, as pick() counts them, however far apart its times.
  template <int kN>
  __device__ __forceinline__ int find(const TimeTerm& t, int at) const {
    const int lane = ptx::thread_index() % 32;
    const int i = element_row<kN>(at, lane), j = element_col<kN>(at, lane);
    return find(t, kTransposed ? j : i, kTransposed ? i : j);
  }
  __device__ __forceinline__ int find(const TimeTerm& t, int i, int j) const {
    return t.search(time_gap(t.query_time(query + i), t.key_time(key + j)), bucket, last);
  }

  // Adds ds to a table, if `add` has kept its buckets; else false.
  template <class T, int kM, int kN, class Slots>
  __device__ static __forceinline__ bool add_kept(const Accumulator<kM, kN>& ds, const TableTarget& to,
                                                  const Slots& slots) {
    if constexpr (kIs16Bit<T> && !kLines) return KeptBuckets<kM, kN>().sum(slots, ds, to);
    return false;
  }
  // Adds ds, of 16-bit types, to a table where elements are searched for: as many buckets at a time as there is room
  // for. False: they are not, or ds is not finite.
  template <int kM, int kN, class Slots>
  __device__ __forceinline__ bool add_searched(const TimeTerm& t, const Accumulator<kM, kN>& ds, const TableTarget& to,
                                               const Slots& slots) const {
    const unsigned top = __reduce_max_sync(~0u, KeptBuckets<kM, kN>::largest(ds));
    if (way != kSearch || top >= 0x7f800000) return false;
    if (top == 0) return true;
#pragma unroll 1
    for (int begin = bucket; begin <= last; begin += Slots::kCount) {
      const int count = min_int(last - begin + 1, Slots::kCount);
      const KeyedSums<Slots> sums(slots, top, count);
      sums.clear();
#pragma unroll 1
      for (int at = 0; at < kM * kN * 4; ++at) {
        const int k = find<kN>(t, at) - begin;
        if (k >= 0 && k < count) sums.add(k, ds.pick(at));
      }
      sums.each(count, [&](int k, float sum) { to.add(begin + k, sum); });
    }
    return true;
  }
  // Adds ds to a table.
  template <class T, int kM, int kN, class Slots>
  __device__ __forceinline__ void add_grad(const TimeTerm& t, const Accumulator<kM, kN>& ds, const TableTarget& to,
                                           const Slots& slots) const {
    if constexpr (kIs16Bit<T> && !kLines) {  // what could be counted has been: KeptBuckets
      add_running(t, ds, to);
      return;
    }
    const unsigned top = __reduce_max_sync(~0u, KeptBuckets<kM, kN>::largest(ds));
    if (top == 0) return;
    if (way != kSearch && last - bucket < kSlots<Slots> && top < 0x7f800000) {
      add_counting<kIs16Bit<T> ? 1 : 2>(t, ds, to, slots, top);
    } else {
      add_running(t, ds, to);
    }
  }

 private:
  __device__ __forceinline__ void choose_way(const TimeTerm& t, bool fits) {
    way = kSearch, bucket = 0, last = t.count;
    if (!fits) return;
    int lo = row, hi = row, col_lo = col[0], col_hi = col[0];
#pragma unroll
    for (int w = 1; w < kWords; ++w) col_lo = min_int(col_lo, col[w]), col_hi = max_int(col_hi, col[w]);
    lo = __reduce_min_sync(~0u, lo), hi = __reduce_max_sync(~0u, hi);
    col_lo = __reduce_min_sync(~0u, col_lo), col_hi = __reduce_max_sync(~0u, col_hi);
    const int gap_lo = kTransposed ? col_lo - hi : lo - col_hi, gap_hi = kTransposed ? col_hi - lo : hi - col_lo;
    const int lowest = t.template known_bucket<kLines>(gap_lo), highest = t.template known_bucket<kLines>(gap_hi);
    if (lowest >= 0 && highest >= 0 && (lowest == highest || t.simple(gap_lo, gap_hi))) {
      bucket = lowest, last = highest;
      way = kCells;
      return;
    }
    const int2 range = t.buckets(gap_lo, gap_hi);
    bucket = range.x, last = range.y;
    if (kLines) line = t.line_through(bucket, last);
    if (kLines && line.start >= 0.f) way = kLine;
  }

  // Any buckets, one element at a time.
  template <int kM, int kN>
  __device__ __forceinline__ void add_running(const TimeTerm& t, const Accumulator<kM, kN>& ds,
                                              const TableTarget& to) const {
    TableRun run;
#pragma unroll 1
    for (int at = 0; at < kM * kN * 4; ++at) {
      run.turn(to, find<kN>(t, at));
      run.sum += ds.pick(at);
    }
    run.finish(to);
  }

  // f(x, its bucket) for all elements; not for kSearch.
  template <int kM, int kN, class F>
  __device__ __forceinline__ void each_bucket(const TimeTerm& t, Accumulator<kM, kN>& s, F&& f) const {
    if (way == kCells) {
      each_found(s, f, [&](int gap) { return t.template bucket_of<kLines>(gap); });
    } else if constexpr (kLines) {
      const int origin = static_cast<int>(__ldg(t.boundaries + bucket));
      each_found(s, f, [&](int gap) {
        return t.decide(gap, clamp_int(line.at(__int2float_rz(gap - origin)), bucket, last - 1));
      });
    }
  }
  template <int kM, int kN, class F, class Find>
  __device__ __forceinline__ void each_found(Accumulator<kM, kN>& s, F&& f, Find&& find) const {
    int rows[2 * kM];
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) rows[r] = __shfl_sync(~0u, row, r * 8 + lane_row());
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int at = __shfl_sync(~0u, col[n / 4], n % 4 * 8 + lane_col() + c);
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r)
          f(s.x[r / 2][n][r % 2 * 2 + c], find(kTransposed ? at - rows[r] : rows[r] - at));
        __syncwarp();  // keeps look-ups of later columns, and their registers, from being moved up here
      }
  }

  // Sums per bucket as integers in shared memory, which adds those at full speed and in any order to the same result:
  // values are scaled to 20 bits below the largest, and with two digits their remainders to 20 more.
  template <int kDigits, int kM, int kN, class Slots>
  __device__ __forceinline__ void add_counting(const TimeTerm& t, const Accumulator<kM, kN>& ds, const TableTarget& to,
                                               const Slots& slots, unsigned top) const {
    static_assert(kRows * kCols <= 1024, "sums of that many 20-bit values fit");
    constexpr float kDigit = 1 << 20;
    const int exponent = max_int(static_cast<int>(top >> 23), 20);
    const float scale = __int_as_float((273 - exponent) << 23), unscale = __int_as_float((exponent - 19) << 23);
    for (int i = lane_id(); i <= last - bucket; i += 32)
      for (int d = 0; d < kDigits; ++d) ptx::st_shared(slots.at(d * kSlots<Slots> + i), 0u);
    __syncwarp();
    each_bucket(t, const_cast<Accumulator<kM, kN>&>(ds), [&](float& d, int at) {
      const float x = d * scale;
      if (x == 0.f) return;  // a time past the end of the sequence may lie in any bucket
      const int digit = __float2int_rn(x);
      ptx::red_shared_add(slots.at(at - bucket), digit);
      if (kDigits == 2)
        ptx::red_shared_add(slots.at(kSlots<Slots> + at - bucket),
                            __float2int_rn((x - static_cast<float>(digit)) * kDigit));
    });
    __syncwarp();
    for (int i = lane_id(); i <= last - bucket; i += 32) {
      float sum = static_cast<float>(ptx::ld_shared_int(slots.at(i)));
      if (kDigits == 2) sum += static_cast<float>(ptx::ld_shared_int(slots.at(kSlots<Slots> + i))) / kDigit;
      to.add(bucket + i, sum * unscale);
    }
    __syncwarp();
  }

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
      __syncwarp();  // as above, for what the search reads
      const int lane = ptx::thread_index() % 32;
      const int i = element_row<kN>(at, lane), j = element_col<kN>(at, lane);
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
};

}  // namespace hstu_ops::cuda
