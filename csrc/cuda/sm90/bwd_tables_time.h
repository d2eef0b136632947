// Sums of dS' by bucket of time: a lane has a key, whose gaps rise from query to query. It adds up what is in one
// bucket and, when that ends, adds it to the table: a key meets each bucket once. Tiles whose times do not rise are
// searched element by element.
#pragma once

#include "cuda/sm90/bwd_tables_warp.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T>
struct TimeSums {
  using B = typename C::Relative;

  const TableWarp<C, T>& w;

  // Boundary number i is in shared memory; the first bucket begins nowhere, the last one does not end. By all warps.
  __device__ __forceinline__ void begin() const {
    const int count = w.relative().num_boundaries;
#pragma unroll 1
    for (int i = static_cast<int>(w.mine()) - 1; i <= count; i += 128) {
      const int64_t x = i < 0 ? INT64_MIN : i < count ? __ldg(w.relative().time_boundaries + i) : INT64_MAX;
      ptx::st_shared(boundary_address(i), make_int2(static_cast<int>(x), static_cast<int>(x >> 32)));
    }
    meet(3 + C::kGroups, 128);
  }
  __device__ __forceinline__ void begin_item() const {
    const int64_t key = B::time(times().key_time(w.first_key(w.job()) + w.mine()));
    put({0.f, 0, key, 0, 0});  // no gap is in there
  }
  __device__ __forceinline__ void end_item() const { add(get().bucket, get().sum); }

  __device__ __forceinline__ void sum_tile(bool disordered) const {
    if (disordered) {
      sum_disordered();
    } else {
      sum_rising();
    }
  }

 private:
  // What a lane knows of its key.
  struct Key {
    float sum;  // of a bucket that goes on
    int bucket;
    int64_t time;       // BiasShape::time
    int64_t low, high;  // gaps of the bucket are from low on and below high
  };
  __device__ __forceinline__ static int64_t join(uint32_t low, uint32_t high) {
    return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
  }
  __device__ __forceinline__ Key get() const {
    const uint4 x = ptx::ld_shared_u4(w.memory().key(0, w.lane())), y = ptx::ld_shared_u4(w.memory().key(1, w.lane()));
    return {__uint_as_float(x.x), static_cast<int>(x.y), join(x.z, x.w), join(y.x, y.y), join(y.z, y.w)};
  }
  __device__ __forceinline__ void put(const Key& k) const {
    const auto high = [](int64_t x) { return static_cast<uint32_t>(x >> 32); };
    const auto low = [](int64_t x) { return static_cast<uint32_t>(x); };
    ptx::st_shared(w.memory().key(0, w.lane()),
                   make_uint4(__float_as_uint(k.sum), static_cast<uint32_t>(k.bucket), low(k.time), high(k.time)));
    ptx::st_shared(w.memory().key(1, w.lane()), make_uint4(low(k.low), high(k.low), low(k.high), high(k.high)));
  }

  __device__ __forceinline__ TimeTerm times() const {
    return {w.relative(), w.job().sequence, w.job().item.head, nullptr};
  }
  __device__ __forceinline__ uint32_t boundary_address(int i) const { return w.shared.boundaries() + (i + 1) * 8; }
  __device__ __forceinline__ int64_t boundary(int i) const {
    const int2 x = ptx::ld_shared_int_v2(boundary_address(i));
    return join(x.x, x.y);
  }
  __device__ __forceinline__ int search(int64_t gap) const {
    int lo = 0, hi = w.relative().num_boundaries;
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
  __device__ __forceinline__ void add(int bucket, float x) const {
    if (x != 0.f) ptx::red_add(w.table(w.kTime) + bucket, x * w.factor());
  }

  __device__ __forceinline__ int key_row() const { return static_cast<int>(w.mine()); }
  __device__ __forceinline__ ScoreWords words(int chunk) const { return ScoreWords::load(w.address(key_row(), chunk)); }

  __device__ __forceinline__ void sum_rising() const {
    Key key = get();
    const int64_t most = key.time - w.stage().long_left(),  // the gap of the last query, and of the first
        least = most - ptx::ld_shared_int(w.stage().time(0));
    if (__all_sync(~0u, least >= key.low && most < key.high)) {
#pragma unroll 1
      for (int c = 0; c < 8; c += 2) key.sum += (words(c) + words(c + 1)).sum();
      ptx::st_shared(w.memory().key(0, w.lane()), __float_as_uint(key.sum));
      return;
    }
    if (least < key.low || least >= key.high) {  // there was a tile of which nothing is kept, or times fell
      add(key.bucket, key.sum);
      key.sum = 0.f;
      find(key, least);
    }
    __syncwarp();
    float total = 0.f, used = 0.f;
#pragma unroll 1
    for (int c = 0; c < 8; ++c) {
      ptx::st_shared(w.memory().sum(c, w.lane()), __float_as_uint(total));
      total += words(c).sum();
    }
    while (__any_sync(~0u, most >= key.high)) {
      if (most >= key.high) {
        const int queries = count_before(static_cast<int>(min(most - key.high, int64_t{INT32_MAX})));
        const float before = sum_before(queries);
        add(key.bucket, key.sum + (before - used));
        key.sum = 0.f, used = before;
        const int64_t gap = most - ptx::ld_shared_int(w.stage().time(queries));
#pragma unroll 1
        for (int i = 0; gap >= key.high && i < 4; ++i) key.low = key.high, key.high = boundary(++key.bucket);
        if (gap >= key.high) find(key, gap);
      }
      __syncwarp();
    }
    key.sum += total - used;
    put(key);
  }
  __device__ __forceinline__ void find(Key& key, int64_t gap) const {
    key.bucket = search(gap);
    key.low = boundary(key.bucket - 1), key.high = boundary(key.bucket);
  }
  // How many queries are in front of those whose times are at most `limit` from the last one's, which is one of them.
  __device__ __forceinline__ int count_before(int limit) const {
    int query = 0;
#pragma unroll
    for (int c = 0; c < 7; ++c) query += ptx::ld_shared_int(w.stage().time(c * 8 + 7)) > limit ? 8 : 0;
    const uint32_t times = w.stage().time(query);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 t = ptx::ld_shared_u4(times + h * 16);
      query += (static_cast<int>(t.x) > limit) + (static_cast<int>(t.y) > limit) + (static_cast<int>(t.z) > limit) +
               (static_cast<int>(t.w) > limit);
    }
    return query;
  }
  // The sum of the key's first queries.
  __device__ __forceinline__ float sum_before(int queries) const {
    const int chunk = queries >> 3, rest = queries & 7;
    ScoreWords x = words(chunk);
#pragma unroll
    for (int i = 0; i < 4; ++i) x.x[i] &= ptx::bit_mask(0, max_int(16 * rest - 32 * i, 0));
    return ptx::ld_shared(w.memory().sum(chunk, w.lane())) + x.sum();
  }

  __device__ __forceinline__ void sum_disordered() const {
#pragma unroll 1
    for (int j = 0; j < C::kQueries; ++j) {
      const float x = w.element(key_row(), j);
      if (x == 0.f) continue;
      const Job& job = w.job();
      const TimeTerm time = times();
      const int query = w.first_query(job, w.tile().tile()) + j, key = w.first_key(job) + key_row();
      add(search(time_gap(time.query_time(query), time.key_time(key))), x);
    }
    __syncwarp();
  }
};

}  // namespace hstu_ops::cuda::sm90
