// dK and dV of more than 128 dimensions: those of 64 keys are all that two warpgroups can hold, so that they share the
// keys. The first has S, P and dV, the second dP, dS and dK; what dP is multiplied with goes from the first to the
// second through shared memory, rounded to the type. dQ is another kernel's (bwd_queries.cuh).
//
//   first   | S0 |    | dV += P0 dO0, S1  |    | dV += P1 dO1, S2 ...
//           |    | P0 |                   | P1 |
//   second  | dP0  |     | dK += dS0 Q0, dP1  |     | ...
//           |      | dS0 |                    | dS1 |
#pragma once

#include "cuda/sm90/bwd_group.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T, bool kHasValues>
struct BwdHalf : BwdGroup<C, T> {
  using Base = BwdGroup<C, T>;
  using Base::accumulate, Base::arguments, Base::arrive_warp, Base::await_keys, Base::await_tile, Base::barrier,
      Base::await_slopes, Base::factor, Base::group, Base::keep_bits, Base::kStarts, Base::multiply_scores,
      Base::release, Base::release_bias, Base::score, Base::shared, Base::start_scores, Base::sync, Base::thread,
      Base::turn_tables, Base::warp_key;
  using typename Base::Bits;
  using typename Base::Operand;
  using typename Base::Scores;
  using typename Base::Sums;

  Count items, tiles;  // so far

  // The second warpgroup's dS' is dP' times what the first one knows, here as pairs rounded to T.
  __device__ __forceinline__ void put_slopes(const Operand& slopes) {
    await_slopes(tiles);
#pragma unroll
    for (int step = 0; step < C::kQueries / 16; ++step) {
      const uint32_t(&x)[4] = slopes[step];
      ptx::st_shared(shared.slopes(tiles.stage<2>()) + (step * 128 + thread()) * 16,
                     make_uint4(x[0], x[1], x[2], x[3]));
    }
    arrive_warp(barrier().slope.full[tiles.stage<2>()]);
  }
  __device__ __forceinline__ void apply_slopes(BwdTile tile, const Scores& d, Operand& ds) {
    barrier().slope.full[tiles.stage<2>()].wait(tiles.round<2>());
#pragma unroll
    for (int step = 0; step < C::kQueries / 16; ++step) {
      const uint4 x = ptx::ld_shared_u4(shared.slopes(tiles.stage<2>()) + (step * 128 + thread()) * 16);
      const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 f = unpack(pairs[e], T{});
        const float* at = d + step * 8 + e / 2 * 4 + e % 2 * 2;
        ds[step][e] = pack(at[0] * f.x, at[1] * f.y, T{});
      }
    }
    if (!tile.last()) arrive_warp(barrier().slope.empty[tiles.stage<2>()]);  // else dK goes through them, too
  }

  // The first product of a tile, begun: S' or dP'.
  __device__ __forceinline__ void begin_tile(const Job& job, BwdTile tile, Scores& s) const {
    if constexpr (kHasValues) start_scores(job, tile, items, tiles, s);
    ptx::wgmma_fence();
    if (kHasValues) {
      multiply_scores<kStarts>(s, shared.key_panel(items.stage<C::kKeyStages>(), 0).base,
                               shared.query_panel(tiles.stage<C::kQueryStages>(), 0).base);
    } else {
      multiply_scores(s, shared.value_panel(items.stage<C::kValueStages>(), 0).base,
                      shared.grad_panel(tiles.stage<C::kGradStages>(), 0).base);
    }
  }
  // The second, out of the first.
  __device__ __forceinline__ void continue_tile(const Job& job, BwdTile tile, Bits& bits, Scores& s, Sums& sums) {
    Operand x;
    if (kHasValues) {
      Scores d;
      Operand slopes;
#pragma unroll
      for (int i = 0; i < C::kQueries / 2; ++i) d[i] = 1.f;
      score(job, tile, bits, s, d, x, slopes);
      put_slopes(slopes);
    } else {
      apply_slopes(tile, s, x);
    }
    ptx::wgmma_settle(x);
    ptx::wgmma_settle(sums);
    ptx::wgmma_fence();
    accumulate(sums, x,
               kHasValues ? shared.grad_panel(tiles.stage<C::kGradStages>(), 0).base
                          : shared.query_panel(tiles.stage<C::kQueryStages>(), 0).base);
    ptx::wgmma_commit();
  }

  // dV or dK of an item; the next tile's first product is begun behind this one's second.
  __device__ __forceinline__ void compute(const Job& job, Sums& sums) {
    BwdTile tile = await_tile(job, tiles);
    Scores s;
    begin_tile(job, tile, s);
#pragma unroll 1
    for (;;) {
      Bits bits;
      if (kHasValues && !tile.covered(group)) bits = keep_bits(job, tile);
      ptx::wgmma_wait<0>();
      ptx::wgmma_settle(s);
      const Count now = tiles;
      release(kHasValues ? barrier().query.empty[now.stage<C::kQueryStages>()]
                         : barrier().grad.empty[now.stage<C::kGradStages>()]);
      if (kHasValues) release_bias(now);
      continue_tile(job, tile, bits, s, sums);
      tiles.next();
      if (tile.last()) break;
      tile = await_tile(job, tiles);
      begin_tile(job, tile, s);
      ptx::wgmma_wait<1>();
      ptx::wgmma_settle(sums);
      release(kHasValues ? barrier().grad.empty[now.stage<C::kGradStages>()]
                         : barrier().query.empty[now.stage<C::kQueryStages>()]);
    }
    release(barrier().value.empty[items.stage<C::kValueStages>()]);
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(sums);
    const Count now = tiles.before();
    release(kHasValues ? barrier().grad.empty[now.stage<C::kGradStages>()]
                       : barrier().query.empty[now.stage<C::kQueryStages>()]);
  }

  // dV or dK of an item, each warp's through 2 KB of a stage of slopes: the first warpgroup takes the next one, the
  // second the last one, which all have read.
  __device__ __forceinline__ void store(const Job& job, const Sums& sums) const {
    const AttentionBwdParams& params = arguments.params;
    const Count stage = kHasValues ? tiles : tiles.before();
    if (kHasValues) await_slopes(tiles);
    const SmemTile<T, kPanel> staging{shared.slopes(stage.stage<2>()) + ptx::thread_index() / 32 % 4 * 2048};
    const GlobalRows<T> to(kHasValues ? params.grad_v : params.grad_k, job.sequence.begin_kv, job.item.head,
                           kHasValues ? params.problem.dim_v : params.problem.dim_qk);
    const float f = kHasValues ? factor(job) : factor(job) * arguments.alpha;
    store_staged(staging, to, job.item.block * C::kKeys + warp_key(), job.sequence.mask.len, sums, f, f);
    if (!kHasValues) arrive_warp(barrier().slope.empty[stage.stage<2>()]);
  }

  __device__ void run() {
    for (;; items.next()) {
      barrier().job.full[items.stage<kBwdJobs>()].wait(items.round<kBwdJobs>());
      const BwdJob& found = shared.state.jobs[items.stage<kBwdJobs>()];
      if (!found.more) return;
      const Job& job = found.job;
      Sums sums;
#pragma unroll
      for (int i = 0; i < C::kDim / 2; ++i) sums[i] = 0.f;
      await_keys(job, items);
      if (kHasValues) turn_tables(job);
      compute(job, sums);
      release(barrier().key.empty[items.stage<C::kKeyStages>()]);
      store(job, sums);
      sync();  // all have read the job
      release(barrier().job.empty[items.stage<kBwdJobs>()]);
    }
  }
};

}  // namespace hstu_ops::cuda::sm90
