// Tiles of few buckets of time, whose times the loading warp has left in shared memory: one comparison of every element
// with each boundary between them, as tile/time_steps.h does.
#pragma once

#include "cuda/sm90/table_grads_config.h"
#include "cuda/tile/position_bias.h"
#include "cuda/tile/time_bias.h"

namespace hstu_ops::cuda::sm90 {

// A warp's 16 queries and 64 keys, whose times rise and are less than 2^31 apart: low words of their differences do.
class StepGaps {
 public:
  using Tile = Accumulator<1, 8>;

  // queries: from those of the warp on.
  __device__ __forceinline__ StepGaps(uint32_t queries, StepTimes keys) {
    const int lane = ptx::thread_index() & 31;
    keys_ = keys.at((lane & 3) * 2);
    const int left = ptx::ld_shared_int(keys.left());
#pragma unroll
    for (int h = 0; h < 2; ++h) rows_[h] = minus(ptx::ld_shared_int(queries + ((lane >> 2) + h * 8) * 4), left);
  }

 protected:
  // Times of the lane's two columns of a tensor core tile.
  __device__ int2 keys(int n) const { return ptx::ld_shared_int_v2(keys_ + n * 32); }
  __device__ int row(int h) const { return rows_[h]; }

 private:
  uint32_t keys_;  // times of the lane's first columns
  int rows_[2];    // of its rows, less that of the first key
};

class StepBoundaries : StepGaps {
 public:
  using StepGaps::StepGaps;

  // s += argument weight[bucket], where weight[first] is there already: the next weights replace one another.
  __device__ __forceinline__ void add(const TimeTerm& t, int first, int steps, float argument, Tile& s) const {
#pragma unroll 1
    for (int i = first; i < first + steps; ++i) {
      const float change = argument * (__ldg(t.weight + i + 1) - __ldg(t.weight + i));
      each_above(t, i, s, [=](float& x, int) { x += change; });
    }
  }
  // Adds the sums of ds by bucket, the total of which is known.
  __device__ __forceinline__ void sum(const TimeTerm& t, int first, int steps, const Tile& ds, float total,
                                      const TableTarget& to, const BucketSums& sums) const {
#pragma unroll 1
    for (int i = first; i < first + steps; ++i) {
      float part[4] = {};  // one sum would wait for itself
      each_above(t, i, const_cast<Tile&>(ds), [&](float& x, int e) { part[e] += x; });
      const float above = (part[0] + part[1]) + (part[2] + part[3]);
      sums.put(to, i, total - above);
      total = above;
    }
    sums.put(to, first + steps, total);
  }

 private:
  // f(x, its element of four) for the elements whose gap is at least boundary i.
  template <class F>
  __device__ __forceinline__ void each_above(const TimeTerm& t, int i, Tile& s, F&& f) const {
    const int boundary = static_cast<int>(__ldg(t.boundaries + i));
    const int limits[2] = {minus(row(0), boundary), minus(row(1), boundary)};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int2 times = keys(n);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if ((e % 2 ? times.y : times.x) <= limits[e / 2]) f(s.x[0][n][e], e);
    }
  }
};

// Many buckets. The cells that were looked up for the bias are kept for the gradient, which is summed by cell.
template <class C>
class StepCells : StepGaps {
 public:
  // Of the lane's elements, from the tile's first cell on, two in a word.
  using Kept = uint32_t[16];

  __device__ __forceinline__ StepCells(uint32_t queries, StepTimes keys, CellBuckets<typename C::Cells> buckets)
      : StepGaps(queries, keys), buckets_(buckets) {
    const int left = ptx::ld_shared_int(keys.left());
    first_ = cells().cell(minus(minus(ptx::ld_shared_int(queries), left), ptx::ld_shared_int(keys.at(kTableTile - 1))));
    last_ = cells().cell(minus(ptx::ld_shared_int(queries + 15 * 4), left)) + 4;
  }

  // s += argument weight[bucket]; rolled as fwd_bias_time.h's look-ups.
  __device__ __forceinline__ void add(Tile& s, Kept& kept) const {
#pragma unroll 1
    for (int first = 0; first < 8; first += kBatch) {
      int gap[kBatch][4];
      uint32_t at[kBatch][4];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int2 times = keys(first + n);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          gap[n][e] = minus(row(e / 2), e % 2 ? times.y : times.x);
          at[n][e] = cells().cell(gap[n][e]);
        }
      }
      float w[kBatch][4];
      cells().weigh(gap, at, w);
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) at[n][e] -= first_;
      s.each_from<kBatch>(first, [&](float& x, int, int n, int e) {
        x += w[n % kBatch][e];
        if (e % 2) kept[n * 2 + e / 2] = at[n % kBatch][e - 1] / 4 | at[n % kBatch][e] << 14;
      });
    }
  }

  // Adds the sums of ds by bucket, of as many cells at a time as there is room for; false: ds is not finite.
  __device__ __forceinline__ bool sum(const Tile& ds, const Kept& kept, const TableTarget& to,
                                      const TableSlots<C>& slots) const {
    const unsigned top = __reduce_max_sync(~0u, KeptBuckets<1, 8>::largest(ds));
    if (top >= 0x7f800000) return false;
    if (top == 0) return true;
    const int count = static_cast<int>(last_ - first_) / 4 + 1;
    const KeyedSums<TableSlots<C>> sums(slots, top, TableSlots<C>::kCount);  // one of each cell: they are many
#pragma unroll 1
    for (int begin = 0; begin < count; begin += TableSlots<C>::kCount) {
      const int end = min_int(count - begin, TableSlots<C>::kCount), number = cells().number(first_) + begin;
      sums.clear();
#pragma unroll 1
      for (int first = 0; first < 8; first += kBatch) {
        float x[kBatch][4];
        uint32_t words[kBatch][2];
        ds.each_from<kBatch>(first, [&](float d, int, int n, int e) {
          x[n % kBatch][e] = d, words[n % kBatch][e / 2] = kept[n * 2 + e / 2];
        });
#pragma unroll
        for (int n = 0; n < kBatch; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int cell = static_cast<int>(e % 2 ? words[n][e / 2] >> 16 : words[n][e / 2] & 0xffff) - begin;
            if (cell >= 0 && cell < end) sums.add(cell, x[n][e]);
          }
      }
      sums.each(end, [&](int i, float sum) { to.add(buckets_.bucket(number + i), sum); });
    }
    return true;
  }

 private:
  static constexpr int kBatch = 2;  // columns of tensor core tiles whose look-ups are in flight together

  __device__ BiasCells<typename C::Cells> cells() const { return buckets_.cells(); }

  CellBuckets<typename C::Cells> buckets_;
  uint32_t first_, last_;  // addresses of the cells of the smallest gap, and behind that of the largest
};

// The same times for look-ups; within 2^30 of the first key's.
template <bool kLines>
__device__ __forceinline__ TileTimes<false, 16, 64, kLines> stored_times(const TimeTerm& t, TileOrigin at,
                                                                         uint32_t queries, StepTimes keys) {
  const int lane = ptx::thread_index() & 31;
  const int row = ptx::ld_shared_int(queries + (lane & 15) * 4) - ptx::ld_shared_int(keys.left());
  const int cols[2] = {ptx::ld_shared_int(keys.at(lane)), ptx::ld_shared_int(keys.at(lane + 32))};
  return {t, at.query, at.key, row, cols};
}

}  // namespace hstu_ops::cuda::sm90
