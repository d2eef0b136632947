// Gradients of the bias tables: sums over a warp's part of dS', 16 keys and 64 queries, rounded to T and packed as a
// left operand.
#pragma once

#include "core/bias.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/mma.h"
#include "cuda/sm90/bwd_load.h"
#include "cuda/tile/score.h"
#include "cuda/tile/table_grad.h"

namespace hstu_ops::cuda::sm90 {

// Pair h of block n of 8 queries: keys 8 h + lane / 4, queries 8 n + lane % 4 * 2 + {0, 1}.
struct BwdOperand {
  const uint32_t (&x)[4][4];

  __device__ uint32_t pair(int n, int h) const { return x[n / 2][n % 2 * 2 + h]; }
  // f(value, n, e): key 8 (e / 2), query 8 n + e % 2 further on than the lane's first.
  template <class T, class F>
  __device__ __forceinline__ void each(F&& f) const {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 v = unpack(pair(n, h), T{});
        f(v.x, n, 2 * h);
        f(v.y, n, 2 * h + 1);
      }
  }
  // For a number not known at compile time.
  __device__ __forceinline__ uint32_t pick(int at) const {
    uint32_t y = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i == at) y = pair(i / 2, i % 2);
    return y;
  }
};

template <class T>
struct BwdTables {
  const BwdArguments& arguments;
  const Job& job;
  int lane_;
  uint32_t window;  // of four buckets: their numbers, then each lane's sums

  __device__ int lane() const { return lane_; }
  __device__ __forceinline__ float factor() const {
    const ScaleParams& s = arguments.params.problem.scale;
    const float f = !s.values   ? static_cast<float>(s.value)
                    : s.per_row ? 1.f
                                : static_cast<const float*>(s.values)[job.item.sequence];
    return f * Score<T>::kSlope;
  }
  __device__ TableTarget time() const { return {arguments.time, job.item.head, factor()}; }
  __device__ TableTarget position() const { return {arguments.position, job.item.head, factor()}; }

  // ---- time ----

  __device__ uint32_t sums(int slot) const { return window + 16 + slot * 128 + lane() * 4; }
  __device__ void begin() const {
    if (lane() < 4) ptx::st_shared(window + lane() * 4, 0u);
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) ptx::st_shared(sums(slot), 0u);
  }
  __device__ void finish() const {
#pragma unroll 1
    for (int slot = 0; slot < 4; ++slot) flush(ptx::ld_shared_int(window + slot * 4), ptx::ld_shared(sums(slot)));
    __syncwarp();
  }
  __device__ __forceinline__ void flush(int bucket, float x) const {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    if (lane() == 0) time().add(bucket, x);
  }
  // Tiles that follow one another hold the same buckets or the next ones.
  __device__ __forceinline__ void put(int bucket, float x) const {
    const int slot = bucket % 4, there = ptx::ld_shared_int(window + slot * 4);
    const float sum = ptx::ld_shared(sums(slot));
    if (there == bucket) {
      x += sum;
    } else {
      flush(there, sum);
      if (lane() == 0) ptx::st_shared(window + slot * 4, static_cast<uint32_t>(bucket));
      __syncwarp();
    }
    ptx::st_shared(sums(slot), __float_as_uint(x));
  }

  // query_times and limits: see BwdBiasPlan; of the lane's first query and key.
  __device__ __forceinline__ void sum_steps(const BwdOperand& ds, uint32_t query_times, uint32_t limits,
                                            BiasNote note) const {
    float parts[4] = {};  // one sum would wait for itself
    ds.each<T>([&](float x, int, int e) { parts[e] += x; });
    float total = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    int bucket = note.first();
    const int last = bucket + note.steps();
#pragma unroll 1
    for (; bucket < last; ++bucket, limits += 64) {
      const int limit[2] = {ptx::ld_shared_int(limits), ptx::ld_shared_int(limits + 32)};
      float above[4] = {};
      int2 times = {0, 0};
      ds.each<T>([&](float x, int n, int e) {
        if (e == 0) times = ptx::ld_shared_int_v2(query_times + n * 32);
        if ((e % 2 ? times.y : times.x) >= limit[e / 2]) above[e] += x;
      });
      const float rest = (above[0] + above[1]) + (above[2] + above[3]);
      put(bucket, total - rest);
      total = rest;
    }
    put(bucket, total);
  }

  // Integer sums, which shared memory adds at full speed: values are scaled to 20 bits below the largest. Buckets rise
  // along a lane's row, mostly: a run of one is added at once.
  __device__ __forceinline__ void sum_buckets(const BwdOperand& ds, uint32_t buckets, uint32_t slots) const {
    float most = 0.f;
    ds.each<T>([&](float x, int, int) { most = x == x ? fmaxf(most, fabsf(x)) : INFINITY; });
    const unsigned top = __reduce_max_sync(~0u, __float_as_uint(most));
    if (top == 0) return;
    if (top >= 0x7f800000) {
      sum_elements(ds, buckets);
      return;
    }
    const int exponent = max_int(static_cast<int>(top >> 23), 20);
    const float scale = __int_as_float((273 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < 2; ++i) ptx::st_shared(slots + i * 512 + lane() * 16, make_uint4(0, 0, 0, 0));
    __syncwarp();
    const auto flush = [&](unsigned bucket, float x) {
      ptx::red_shared_add(slots + bucket * 4, __float2int_rn(x * scale));
    };
    unsigned current[2] = {0, 0};
    float run[2] = {0.f, 0.f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 x = ptx::ld_shared_u4(buckets + half * 512);
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 v = unpack(ds.pair(half * 4 + k, e / 2), T{});
          const unsigned bucket = words[k] >> 8 * e & 255;
          if (bucket != current[e / 2]) {
            if (run[e / 2] != 0.f) flush(current[e / 2], run[e / 2]);
            run[e / 2] = 0.f;
            current[e / 2] = bucket;
          }
          run[e / 2] += e % 2 ? v.y : v.x;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (run[h] != 0.f) flush(current[h], run[h]);
    __syncwarp();
    const TableTarget to = time();
    const float unscale = __int_as_float((exponent - 19) << 23);
#pragma unroll 1
    for (int i = lane(); i <= arguments.params.problem.relative.num_boundaries; i += 32)
      to.add(i, static_cast<float>(ptx::ld_shared_int(slots + i * 4)) * unscale);
    __syncwarp();
  }
  // One at a time: rare.
  __device__ __forceinline__ void sum_elements(const BwdOperand& ds, uint32_t buckets) const {
    const TableTarget to = time();
#pragma unroll 1
    for (int at = 0; at < 16; ++at) {
      const float2 v = unpack(ds.pick(at), T{});
      const int n = at / 2;
      const unsigned pair = static_cast<unsigned>(ptx::ld_shared_int(buckets + n / 4 * 512 + n % 4 * 4)) >> at % 2 * 16;
      to.add(static_cast<int>(pair & 255), v.x);
      to.add(static_cast<int>(pair >> 8 & 255), v.y);
    }
  }

  // ---- position ----

  __device__ __forceinline__ void sum_positions(const BwdOperand& ds, TileOrigin o) const {
    const TableTarget to = position();
    const Mask& mask = job.sequence.mask;
    const int positions = arguments.params.problem.relative.positions;
#pragma unroll 1
    for (int at = 0; at < 16; ++at) {
      const float2 v = unpack(ds.pick(at), T{});
      const int query = o.query + at / 2 * 8 + lane() % 4 * 2, key = mask.position(o.key + at % 2 * 8 + lane() / 4);
      to.add(position_index(mask.position(query), key, positions), v.x);
      to.add(position_index(mask.position(query + 1), key, positions), v.y);
    }
  }

  // An 8 x 8 block, packed, is a transposed right operand: times a unit matrix it is added to the sum of its block
  // diagonal n - h. One product serves two: blocks stand in rows 0 to 7 and 8 to 15.
  __device__ __forceinline__ void sum_diagonals(const BwdOperand& ds, TileOrigin o) const {
    const int rho = lane() / 4, quad = lane() % 4;
    const uint32_t unit = rho / 2 == quad ? pack(rho % 2 == 0 ? 1.f : 0.f, rho % 2 == 1 ? 1.f : 0.f, T{}) : 0;
    const uint32_t units[4] = {unit, 0, 0, unit};
    float sums[6][4] = {};  // of block diagonals 2 i - 2 and 2 i - 1
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = -h; n < 8; n += 2)
        ptx::mma_m16n8k16(sums[(n - h + 2) / 2], units, n < 0 ? 0 : ds.pair(n, h), n + 1 < 8 ? ds.pair(n + 1, h) : 0,
                          T{});
    // Entry (i, k) of a sum, query i = rho and key k = 2 quad + c, lies 8 d + i - k from block diagonal 0. Lanes of one
    // rho take what lies 8 d + rho away: i = k + rho of d, or i = k + rho - 8 of d + 1.
    float t[12] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int source = (rho + 2 * quad + c) % 8 * 4 + quad;
      const bool wraps = rho + 2 * quad + c >= 8;
      float here = 0.f;  // block diagonal -2 is empty
#pragma unroll
      for (int d = 0; d < 10; ++d) {
        const float next = d + 1 < 10 ? __shfl_sync(~0u, sums[(d + 1) / 2][(d + 1) % 2 * 2 + c], source) : 0.f;
        t[d] += wraps ? next : here;
        here = next;
      }
    }
    // Over the four lanes of a rho, each of which keeps a quarter of the sums.
#pragma unroll
    for (int half = 6, bit = 1; bit <= 2; half /= 2, bit *= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float keep = quad & bit ? t[i + half] : t[i], send = quad & bit ? t[i] : t[i + half];
        t[i] = keep + __shfl_xor_sync(~0u, send, bit);
      }
    const TableTarget to = position();
    const int start = o.key - o.query + arguments.params.problem.relative.positions - 1;
    const int d = (quad & 1) * 6 + (quad & 2) / 2 * 3 - 2;
#pragma unroll
    for (int i = 0; i < 3; ++i)
      if (t[i] != 0.f) to.add(start - (8 * (d + i) + rho), t[i]);
  }
};

}  // namespace hstu_ops::cuda::sm90
