// Sums of dS' by bucket of time: a lane has a key, whose gaps rise from query to query. It adds up what is in one
// bucket and, when that ends, adds it to the table: a key meets each bucket once. Sums of a key's first queries, eight
// by eight, come from the tensor cores; a bucket has the difference of two. Tiles whose times do not rise are searched
// element by element.
#pragma once

#include "cuda/sm90/bwd_tables_warp.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T>
struct TimeSums {
  using B = typename C::Relative;
  using Words = ScoreWords<T>;

  const TableWarp<C, T>& w;

  // Boundary number i is in shared memory; the first bucket begins nowhere, the last one does not end. Behind them are
  // masks of the first queries of eight. By all warps.
  __device__ __forceinline__ void begin() const {
    const int count = w.relative().num_boundaries;
#pragma unroll 1
    for (int i = static_cast<int>(w.mine()) - 1; i <= count; i += 128) {
      const int64_t x = i < 0 ? INT64_MIN : i < count ? __ldg(w.relative().time_boundaries + i) : INT64_MAX;
      ptx::st_shared_int64(boundary_address(i), x);
    }
    if (w.mine() < 32) {
      const int bits = 16 * (w.mine() / 4) - 32 * (w.mine() % 4);
      ptx::st_shared(mask_address(0) + w.mine() * 4, ptx::bit_mask(0, max_int(bits, 0)));
    }
    ptx::st_shared(w.memory().sum(0, w.lane()), 0u);
    meet(3 + C::kGroups, 128);
  }
  __device__ __forceinline__ void begin_item() const {
    put(0.f, 0);
    ptx::st_shared_int64(time_address(), B::time(times().key_time(w.first_key(w.job()) + w.mine())));
  }
  __device__ __forceinline__ void end_item() const {
    const int2 key = ptx::ld_shared_int_v2(w.memory().key(w.lane()));
    add(key.y, __int_as_float(key.x));
  }

  __device__ __forceinline__ void sum_tile(bool disordered) const {
    if (disordered) {
      sum_disordered();
    } else {
      sum_rising();
    }
  }

 private:
  // What a lane knows of its key: the bucket it is in and the sum of that, and BiasShape::time.
  __device__ __forceinline__ void put(float sum, int bucket) const {
    ptx::st_shared(w.memory().key(w.lane()), make_int2(__float_as_int(sum), bucket));
  }
  __device__ __forceinline__ uint32_t time_address() const { return w.memory().key(w.lane()) + 8; }

  __device__ __forceinline__ TimeTerm times() const {
    return {w.relative(), w.job().sequence, w.job().item.head, nullptr};
  }
  __device__ __forceinline__ uint32_t boundary_address(int i) const { return w.shared.boundaries() + (i + 1) * 8; }
  __device__ __forceinline__ uint32_t mask_address(int queries) const {
    return boundary_address(TimeTerm::kMostCellBoundaries + 1) + queries * 16;
  }
  __device__ __forceinline__ int64_t boundary(int i) const { return ptx::ld_shared_int64(boundary_address(i)); }
  __device__ __forceinline__ int search(int64_t gap) const {
    return search_boundaries(gap, 0, w.relative().num_boundaries, [&](int i) { return boundary(i); });
  }
  __device__ __forceinline__ void add(int bucket, float x) const {
    if (x != 0.f) ptx::red_add(w.table(w.kTime) + bucket, x * w.factor());
  }

  __device__ __forceinline__ int key_row() const { return static_cast<int>(w.mine()); }
  __device__ __forceinline__ Words words(int chunk) const { return Words::load(w.address(key_row(), chunk)); }

  __device__ __forceinline__ void sum_rising() const {
    sum_chunks();
    const uint4 key = ptx::ld_shared_u4(w.memory().key(w.lane()));
    const int64_t most = ptx::join(key.z, key.w) - w.stage().long_left();  // the gap of the last query
    float sum = __uint_as_float(key.x);  // of the bucket, less that of the tile's queries in front of it
    int bucket = key.y;
    if (most - ptx::ld_shared_int(w.stage().time(0)) < boundary(bucket - 1)) {  // times fell
      add(bucket, sum);
      sum = 0.f, bucket = 0;
    }
    int end = time_of_end(most, bucket);
    while (__any_sync(~0u, end >= 0)) {
      if (end >= 0) {
        const int following = time_of_end(most, bucket + 1);
        const int queries = count_before(end);
        const int next = ptx::ld_shared_int(w.stage().time(queries));
        const float before = sum_before(queries);
        add(bucket, sum + before);
        sum = -before, end = following, ++bucket;
#pragma unroll 1
        for (int i = 0; next <= end && i < 4; ++i) end = time_of_end(most, ++bucket);
        if (next <= end) bucket = search(most - next), end = time_of_end(most, bucket);
      }
      __syncwarp();
    }
    sum += ptx::ld_shared(w.memory().sum(8, w.lane()));
    put(sum, bucket);
  }
  // Sums of each key's queries in front of each chunk: products with ones and zeros.
  __device__ __forceinline__ void sum_chunks() const {
    const int row = w.lane() % 16, half = w.lane() / 16, column = w.lane() / 4;
    const uint32_t keys = w.address(w.warp() * w.kKeys + row, half);
    float sums[2][4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t ones = pack(1.f, 1.f, T{});
      const uint32_t first = column == 0 || 2 * step < column ? ones : 0,
                     second = column == 0 || 2 * step + 1 < column ? ones : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t x[4];
        ptx::ldmatrix_x4(x, (keys ^ step * 32) + i * 16 * 128);
        ptx::mma_m16n8k16(sums[i], x, first, second, T{});
      }
    }
    // Columns 2 c and 2 c + 1, of eight keys and the next ones; column 0 has the sum of all, as number 8.
    const int c = w.lane() % 4, key = w.lane() / 4;
    const uint32_t even = w.memory().sum(2 * c, key) + (c == 0 ? 8 * 128 : 0), odd = w.memory().sum(2 * c + 1, key);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* x = sums[i / 2] + i % 2 * 2;
      ptx::st_shared(even ^ i * 32, __float_as_uint(x[0]));
      ptx::st_shared(odd ^ i * 32, __float_as_uint(x[1]));
    }
    __syncwarp();
  }
  // Where a bucket ends: times of queries behind that are at most this much from the last one's. Negative: the tile
  // does.
  __device__ __forceinline__ int time_of_end(int64_t most, int bucket) const {
    const int64_t boundary = this->boundary(bucket);
    const uint64_t x = static_cast<uint64_t>(most) - static_cast<uint64_t>(boundary);
    return most < boundary ? -1 : x > INT32_MAX ? INT32_MAX : static_cast<int>(x);
  }
  // How many queries are in front of those whose times are at most `end` from the last one's, which is one of them.
  __device__ __forceinline__ int count_before(int end) const {
    const int chunk = count(w.stage().chunk_end(0), end);
    return chunk * 8 + count(w.stage().time(chunk * 8), end);
  }
  // How many of eight falling times, of which the last is not, are above `end`?
  __device__ __forceinline__ static int count(uint32_t times, int end) {
    const uint4 a = ptx::ld_shared_u4(times), b = ptx::ld_shared_u4(times + 16);
    const auto above = [&](uint32_t x) { return static_cast<int>(x) > end; };
    const bool four = above(a.w), two = above(four ? b.y : a.y), one = above(two ? four ? b.z : a.z : four ? b.x : a.x);
    return (four ? 4 : 0) + (two ? 2 : 0) + (one ? 1 : 0);
  }
  // The sum of the key's first queries.
  __device__ __forceinline__ float sum_before(int queries) const {
    const int chunk = queries >> 3;
    Words x = words(chunk);
    const Words mask = Words::load(mask_address(queries & 7));
#pragma unroll
    for (int i = 0; i < 4; ++i) x.x[i] &= mask.x[i];
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
