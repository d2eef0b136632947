// A tile of few buckets of time: one comparison of every element with each boundary between them.
#pragma once

#include "cuda/tile/table_grad.h"
#include "cuda/tile/time_buckets.h"

namespace hstu_ops::cuda {

// Lane-private sums of two neighbouring buckets that have not been added to the table yet. Tiles that follow one
// another hold the same buckets or the next ones.
struct TimeWindow {
  int bucket = 0;  // the first of them; the same in all lanes
  float sum[2] = {0.f, 0.f};

  __device__ __forceinline__ void put(const TableTarget& to, int at, float x) {
#pragma unroll 1
    for (bool near = true; at != bucket && at != bucket + 1; near = false) {  // a step, then a jump
      flush(to);
      bucket = near ? bucket + 1 : at;
    }
    if (at == bucket) {
      sum[0] += x;
    } else {
      sum[1] += x;
    }
  }
  __device__ __forceinline__ void finish(const TableTarget& to) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i, ++bucket) flush(to);
  }

 private:
  // The first of the two; the second takes its place.
  __device__ __forceinline__ void flush(const TableTarget& to) {
    to.add_of_warp(bucket, sum[0]);
    sum[0] = sum[1];
    sum[1] = 0.f;
  }
};

// Rows are queries unless kTransposed. The times of the columns rise, and the first and the last are less than 2^31
// apart; times of rows are anything, differences do not overflow.
template <bool kTransposed, int kM, int kN>
class TimeSteps {
 public:
  __device__ __forceinline__ TimeSteps(const TimeTerm& t, int query, int key) {
    constexpr int kRows = kM * 16, kCols = kN * 8, kWords = (kCols + 31) / 32;
    const int lane = lane_id();
    const auto col_time = [&](int i) { return kTransposed ? t.query_time(query + i) : t.key_time(key + i); };
    const int64_t base = col_time(0);
    row_ = (kTransposed ? t.key_time(key + lane % kRows) : t.query_time(query + lane % kRows)) - base;
    int words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = static_cast<int>(col_time(w * 32 + lane % min_int(kCols, 32)) - base);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) col_[n][c] = __shfl_sync(~0u, words[n / 4], n % 4 * 8 + lane_col() + c);
  }

  // s += argument weight[bucket], where weight[first] is there already: the next weights replace one another.
  __device__ __forceinline__ void add(const TimeTerm& t, int first, int steps, float argument,
                                      Accumulator<kM, kN>& s) const {
    const int64_t* boundary = t.boundaries + first;
    const float* weight = t.weight + first;
    int limit = this->limit(__ldg(boundary));
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int next = this->limit(__ldg(boundary + min_int(i + 1, steps - 1)));  // loads while the others compute
      const float change = argument * (__ldg(weight + i + 1) - __ldg(weight + i));
      each_above(limit, s, [=](float& x, int) { x += change; });
      limit = next;
    }
  }
  // Adds the sums of ds by bucket, the total of which is known.
  __device__ __forceinline__ void sum(const TimeTerm& t, int first, int steps, const Accumulator<kM, kN>& ds,
                                      float total, const TableTarget& to, TimeWindow& window) const {
    const int64_t* boundary = t.boundaries + first;
    int limit = this->limit(__ldg(boundary));
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int next = this->limit(__ldg(boundary + min_int(i + 1, steps - 1)));
      float part[4] = {};
      each_above(limit, const_cast<Accumulator<kM, kN>&>(ds), [&](float& x, int e) { part[e] += x; });
      const float above = (part[0] + part[1]) + (part[2] + part[3]);
      limit = next;
      window.put(to, first + i, total - above);
      total = above;
    }
    window.put(to, first + steps, total);
  }

 private:
  // What the column's time is compared with in the lane's row.
  __device__ __forceinline__ int limit(int64_t boundary) const {
    const int64_t x = kTransposed ? row_ + boundary : row_ - boundary;
    return x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : static_cast<int>(x);
  }
  // f(x, its element of four) for the elements whose gap is at least the boundary of this limit.
  template <class F>
  __device__ __forceinline__ void each_above(int limit, Accumulator<kM, kN>& s, F&& f) const {
    int limits[2 * kM];
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) limits[r] = __shfl_sync(~0u, limit, r * 8 + lane_row());
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (kTransposed ? col_[n][c] >= limits[r] : col_[n][c] <= limits[r])
            f(s.x[r / 2][n][r % 2 * 2 + c], r % 2 * 2 + c);
  }

  int64_t row_;     // of the lane's row, relative to the first column's
  int col_[kN][2];  // of the columns of the lane's elements, likewise
};

}  // namespace hstu_ops::cuda
