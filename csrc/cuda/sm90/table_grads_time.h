// Tiles of few buckets of time, whose times the loading warp has left in shared memory: one comparison of every element
// with each boundary between them, as tile/time_steps.h does.
#pragma once

#include "cuda/sm90/table_grads_config.h"
#include "cuda/tile/position_bias.h"
#include "cuda/tile/time_bias.h"

namespace hstu_ops::cuda::sm90 {

// A warp's 16 queries and 64 keys, whose times rise and are less than 2^31 apart: low words of their differences do.
class StepBoundaries {
 public:
  using Tile = Accumulator<1, 8>;

  // queries: from those of the warp on.
  __device__ __forceinline__ StepBoundaries(uint32_t queries, StepTimes keys) {
    const int lane = ptx::thread_index() & 31;
    keys_ = keys.at((lane & 3) * 2);
    const int left = ptx::ld_shared_int(keys.left());
#pragma unroll
    for (int h = 0; h < 2; ++h) rows_[h] = minus(ptx::ld_shared_int(queries + ((lane >> 2) + h * 8) * 4), left);
  }

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
  __device__ static int minus(int a, int b) { return static_cast<int>(0u + a - b); }
  // f(x, its element of four) for the elements whose gap is at least boundary i.
  template <class F>
  __device__ __forceinline__ void each_above(const TimeTerm& t, int i, Tile& s, F&& f) const {
    const int boundary = static_cast<int>(__ldg(t.boundaries + i));
    const int limits[2] = {minus(rows_[0], boundary), minus(rows_[1], boundary)};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int2 times = ptx::ld_shared_int_v2(keys_ + n * 32);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if ((e % 2 ? times.y : times.x) <= limits[e / 2]) f(s.x[0][n][e], e);
    }
  }

  uint32_t keys_;  // times of the lane's first columns
  int rows_[2];    // of its rows, less that of the first key
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
