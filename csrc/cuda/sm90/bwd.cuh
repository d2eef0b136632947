// Attention backward with Hopper's copy engine and asynchronous tensor cores.
//
// A block of threads stays on its SM and takes item after item (kKeys keys of one head, whose dK and dV stay in
// registers) and walks tiles of queries. Scores are computed transposed, S' = K Q' and dP' = V dO', so that P' and dS'
// are left operands of dV += P' dO and dK += dS' Q without leaving the registers; only dQ = dS K needs dS in shared
// memory, and is one tile late, so that no warpgroup waits for another. (For more than 128 dimensions see bwd_wide.h,
// for a dQ of a kernel of its own bwd_queries.cuh.)
//
//   find     | tiles of item i                     | item i + 1 ...       (near the end of item i, not before)
//   load     | Q0 dO0 | K V | Q1 dO1 | Q2 dO2 ...      (the next item already while this one is computed)
//   compute  |  S0 dP0         | dV += P0 dO0, dK += dS0 Q0 | S1 dP1 dQ0 | dV += P1 dO1, dK += dS1 Q1 | ...
//            |         P0, dS0 |   dS0 to memory            |    P1, dS1 |   dS1, dQ0 to memory
//   add      |                                                              dQ0 to global memory (fp32) ...
//
// The first warpgroup finds, loads and adds (bwd_finish.h), one warp or two each; with relative bias one warp adds and
// another notes what the computing ones will find (bwd_bias_prepare.h); gradients of its tables may be a warpgroup's
// more (bwd_tables.h). At D 64 three warpgroups compute, two beside that one, and a tile's dQ is the whole of one's
// work, by turns. Dense bias is read from global memory into the registers of the scores; its gradient has a kernel of
// its own (dense_grads.cuh). Barriers: see bwd_storage.h.
#pragma once

#include "cuda/ptx/dependent.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/sm90/bwd_bias.h"
#include "cuda/sm90/bwd_group.h"
#include "cuda/sm90/bwd_queries.cuh"
#include "cuda/sm90/bwd_scratch.h"
#include "cuda/sm90/bwd_tables.h"
#include "cuda/sm90/bwd_wide.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace hstu_ops::cuda::sm90 {

// ---- a computing warpgroup ----

template <class C, class T>
struct BwdComputer : BwdGroup<C, T> {
  using Base = BwdGroup<C, T>;
  using Base::accumulate, Base::arguments, Base::arrive_warp, Base::await_bias, Base::await_keys, Base::await_scores,
      Base::await_tile, Base::barrier, Base::factor, Base::group, Base::keep_bits, Base::kStarts, Base::multiply_scores,
      Base::release, Base::release_bias, Base::score, Base::shared, Base::start_scores, Base::store, Base::sync,
      Base::thread, Base::turn_tables, Base::warp_key;
  using typename Base::Bits;
  using typename Base::Operand;
  using typename Base::Scores;
  using typename Base::Sums;
  using QuerySums = float[kPanel / 2];

  Count items, tiles;  // so far

  // Where dQ of a tile waits to be added, and how often that place has been used.
  __device__ int sum_stage(Count tile) const { return C::kTurns ? tile.stage<C::kSumStages>() : group; }
  __device__ unsigned sum_round(Count tile) const { return C::kTurns ? tile.round<C::kSumStages>() : tile.round<1>(); }
  // Has this warpgroup a part in dQ of the tile before `count`?
  __device__ bool has_turn(Count count) const { return !C::kTurns || count.before().stage<C::kGroups>() == group; }

  // This warpgroup's 64 columns of dQ = dS K of the tile before `count`, begun. If there is none, of anything: a branch
  // around products takes registers.
  __device__ __forceinline__ void multiply_keys(QuerySums& dq, Count count, bool there = true) const {
    const Count before = count.before();
    if (there) barrier().score.full[before.stage<C::kScoreStages>()].wait(before.round<C::kScoreStages>());
    const ptx::Descriptor a = shared.descriptor(
                              shared.score_panel(before.stage<C::kScoreStages>(), C::kSplitQueries ? group : 0).base),
                          b = shared.descriptor(
                              shared.key_panel(items.stage<C::kKeyStages>(), C::kPanels == 1 ? 0 : group).base);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeys / 16; ++step)
      ptx::Wgmma<kPanel, T>::multiply_columns(dq, a.at(step * 2048), b.at(step * 2048), step > 0);
    ptx::wgmma_commit();
  }

  // dQ of that tile, complete, to shared memory; its dS is used up.
  // last: see SumJob.
  __device__ __forceinline__ void put_query_sums(const Job& job, const QuerySums& dq, Count count, int last) const {
    const int to = sum_stage(count.before());
    barrier().sum[to].empty[0].wait(sum_round(count.before()) ^ 1);
    put_sums(shared.sums(to), thread() / 32 * 16, job.sequence.begin_q, dq, arguments.alpha * factor(job));
    if (thread() == 0)
      shared.state.sums[to] = {items.count, shared.state.tiles[count.before().stage<C::kTileStages>()], last};
    release(barrier().score.empty[count.before().stage<C::kScoreStages>()]);
  }

  // What this warpgroup wrote to shared memory in the tile before, the last of `done` of the item so far, is given to
  // those who wait for it: its dS', and dQ of the one before that. Not as soon as it is written, for the fence waits
  // until it is, 200 to 500 clocks: behind the next tile's first products, whose end is waited for anyway.
  __device__ __forceinline__ void hand_over(int done) const {
    if constexpr (C::kQuerySums) {
      if (done == 0) return;
      ptx::fence_proxy_async();
      arrive_warp(barrier().score.full[tiles.before().stage<C::kScoreStages>()]);
      if (done > 1 && has_turn(tiles.before())) arrive_sums(tiles.before());
    }
  }
  // dQ of the tile before `count`, the item's last.
  __device__ __forceinline__ void hand_over_sums(Count count) const {
    if constexpr (C::kQuerySums) {
      if (!has_turn(count)) return;
      ptx::fence_proxy_async();
      arrive_sums(count);
    }
  }
  __device__ __forceinline__ void arrive_sums(Count count) const {
    arrive_warp(barrier().sum[sum_stage(count.before())].full[0]);
  }

  // dQ of the tile before `count`.
  __device__ __forceinline__ void finish_query_sums(const Job& job, Count count, int last) const {
    if constexpr (C::kQuerySums) {
      if (!has_turn(count)) return;
      QuerySums dq;
      multiply_keys(dq, count);
      ptx::wgmma_wait<0>();
      ptx::wgmma_settle(dq);
      put_query_sums(job, dq, count, last);
    }
  }

  // dS' to shared memory, for all warpgroups.
  __device__ __forceinline__ void put_scores(const Operand& ds) {
    await_scores(tiles);
    const int row = warp_key() + lane_id() % 16, chunk = lane_id() / 16;
#pragma unroll
    for (int step = 0; step < C::kQueries / 16; ++step)
      ptx::stmatrix_x4(shared.score_panel(tiles.stage<C::kScoreStages>(), step / 4).at(row, step % 4 * 2 + chunk),
                       ds[step]);
  }

  __device__ __forceinline__ void begin_grads(Scores& d) const {
    multiply_scores(d, shared.value_panel(items.stage<C::kValueStages>(), 0).base,
                    shared.grad_panel(tiles.stage<C::kGradStages>(), 0).base);
  }

  // A tile of which this warpgroup keeps something. dQ of the tile before it, if there is one, is found beside this
  // one's sums or, by turns, behind them, as three warpgroups have no registers for both.
  __device__ __forceinline__ void compute_tile(const Job& job, BwdTile tile, Sums& dk, Sums& dv, int done) {
    constexpr bool kBeside = C::kQuerySums && !C::kTurns;
    Operand p, ds;
    QuerySums dq;
    Bits bits;
    {
      Scores s, d;
      // The bias beside dP'; a dense one by turns would spill.
      constexpr bool kGradsFirst = C::kBias || (C::kDense && !C::kTurns);
      if (!kGradsFirst) start_scores(job, tile, items, tiles, s);
      if (!tile.covered(group)) bits = keep_bits(job, tile);
      ptx::wgmma_fence();
      if (kGradsFirst) {
        begin_grads(d);
        start_scores(job, tile, items, tiles, s);
        ptx::wgmma_fence();
      }
      multiply_scores<kStarts>(s, shared.key_panel(items.stage<C::kKeyStages>(), 0).base,
                               shared.query_panel(tiles.stage<C::kQueryStages>(), 0).base);
      if (!kGradsFirst) begin_grads(d);
      hand_over(done);
      ptx::wgmma_wait<0>();
      ptx::wgmma_settle(s);
      ptx::wgmma_settle(d);
      score(job, tile, bits, s, d, p, ds);
    }
    if (kBeside) multiply_keys(dq, tiles, done > 0);
    ptx::wgmma_settle(p), ptx::wgmma_settle(dv), ptx::wgmma_settle(ds), ptx::wgmma_settle(dk);
    ptx::wgmma_fence();
    accumulate(dv, p, shared.grad_panel(tiles.stage<C::kGradStages>(), 0).base);
    accumulate(dk, ds, shared.query_panel(tiles.stage<C::kQueryStages>(), 0).base);
    ptx::wgmma_commit();
    if (C::kQuerySums) put_scores(ds);
    if (C::kTurns && done > 0) finish_query_sums(job, tiles, tile.last());
    if (kBeside) {
      ptx::wgmma_wait<1>();
      ptx::wgmma_settle(dq);
      if (done > 0) put_query_sums(job, dq, tiles, 0);
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(dv);
    ptx::wgmma_settle(dk);
  }

  __device__ __forceinline__ void release_tile() {
    release(barrier().query.empty[tiles.stage<C::kQueryStages>()]);
    release(barrier().grad.empty[tiles.stage<C::kGradStages>()]);
    release_bias(tiles);
    tiles.next();
  }

  // Nothing kept: its rows of dS are zeros.
  __device__ __forceinline__ void skip_tile(int done) {
    hand_over(done);
    await_bias(tiles);
    if (C::kQuerySums) {
      Operand zero;
#pragma unroll
      for (auto& step : zero)
#pragma unroll
        for (uint32_t& x : step) x = 0;
      put_scores(zero);
    }
    sync();  // no product holds the warps together here: all must have seen the tile before its stage is used again
  }

  // One copy of a tile's code serves the first tile, too: two do not fit the instruction cache, by turns registers
  // would not do.
  __device__ __forceinline__ void compute(const Job& job, Sums& dk, Sums& dv) {
    int done = 0;
#pragma unroll 1
    for (;; ++done) {
      const BwdTile tile = await_tile(job, tiles);
      if (tile.kept(group)) {
        compute_tile(job, tile, dk, dv, done);
      } else {
        skip_tile(done);
        if (done > 0) finish_query_sums(job, tiles, C::kTurns && tile.last());
      }
      release_tile();
      if (tile.last()) break;
    }
    release(barrier().value.empty[items.stage<C::kValueStages>()]);
    if (C::kTables) tiles.count = ptx::again(tiles.count);
    hand_over(done + 1);
    finish_query_sums(job, tiles, C::kTurns && done == 0 ? kSumPlaces : 1);
    hand_over_sums(tiles);
  }

  __device__ __forceinline__ void run_inline() {
    for (;; items.next()) {
      barrier().job.full[items.stage<kBwdJobs>()].wait(items.round<kBwdJobs>());
      const BwdJob& found = shared.state.jobs[items.stage<kBwdJobs>()];
      if (!found.more) break;
      const Job& job = found.job;
      Sums dk, dv;
#pragma unroll
      for (int i = 0; i < C::kDim / 2; ++i) dk[i] = dv[i] = 0.f;
      await_keys(job, items);
      turn_tables(job);
      compute(job, dk, dv);
      release(barrier().key.empty[items.stage<C::kKeyStages>()]);
      const AttentionBwdParams& params = arguments.params;
      const float f = factor(job);
      if constexpr (C::kFinishes) {
        finish_rows(
            {items.count - kSumLag}, [&] { store(job, params.grad_v, params.problem.dim_v, dv, f); },
            [&] { store(job, params.grad_k, params.problem.dim_qk, dk, f * arguments.alpha); });
      } else {
        store_both(job, dk, dv, f);
      }
      sync();  // all have read the job
      release(barrier().job.empty[items.stage<kBwdJobs>()]);
    }
    if (C::kQuerySums) end_sums();
    if constexpr (C::kFinishes) {
#pragma unroll 1
      for (int i = kSumLag; i > 0; --i) finish_rows({items.count - i}, [] {}, [] {});
    }
  }
  // One copy of the code serves both.
  __device__ __forceinline__ void store_both(const Job& job, Sums& dk, Sums& dv, float f) const {
    const AttentionBwdParams& params = arguments.params;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      store(job, i == 0 ? params.grad_v : params.grad_k, i == 0 ? params.problem.dim_v : params.problem.dim_qk, dv,
            i == 0 ? f : f * arguments.alpha);
#pragma unroll
      for (int j = 0; j < C::kDim / 2; ++j) dv[j] = dk[j];
    }
  }
  // Where the compiler decides, it needs fewer registers without a bias, and local memory with one.
  __device__ void run() { run_inline(); }

  // The rows of dQ that are complete with an item, if there is one of that number; the others' while they are on their
  // way.
  template <class First, class Second>
  __device__ __forceinline__ void finish_rows(Count item, First&& first, Second&& second) const {
    if constexpr (!C::kFinishes) {
      first(), second();
    } else {
      const SumRows& rows = shared.state.sum_rows[item.stage<kSumItems>()];  // without an item: of no rows
      const int64_t total = arguments.params.problem.jagged.total_q;
      FinishedRows<C, T> finished;
      const int row = finished.first_row(group);
      if (static_cast<int>(item.count) >= 0) barrier().finished[item.stage<kSumItems>()].wait(item.round<kSumItems>());
      finished.load(rows, total, row, 0);
      first();
      if (C::kPanels > 1) finished.load(rows, total, row, C::kPanels - 1);
      second();
      finished.store(rows, arguments.params, row);
    }
  }

  // Tells the adding warps that nothing follows.
  __device__ __forceinline__ void end_sums() {
#pragma unroll 1
    for (int i = 0; i < (C::kTurns ? C::kSumStages : 1); ++i, tiles.next()) {
      // Only who used a place last may wait for it: others would mistake an earlier use for that one.
      if (C::kTurns && Count{tiles.count - C::kSumStages}.stage<C::kGroups>() != group) continue;
      Gate<1>& gate = barrier().sum[sum_stage(tiles)];
      gate.empty[0].wait(sum_round(tiles) ^ 1);
      if (thread() == 0) shared.state.sums[sum_stage(tiles)] = {items.count, BwdTile(0), -1};
      arrive_warp(gate.full[0]);
    }
  }
};

// ---- kernel and launch ----

// By the adding, noting and computing warps, while the first items are found.
template <class C, class T>
__device__ __forceinline__ void make_bias_tables(const BwdArguments& arguments, const BwdStorage<C, T>& shared) {
  constexpr int kThreads = C::kThreads - 64;
  shared.bias().tables().make(arguments.params.problem.relative, arguments.cells, arguments.factors.bias,
                              threadIdx.x - 64, kThreads, [] { meet(2 + C::kGroups, kThreads); });
}

template <class C, class T>
__global__ void __launch_bounds__(C::kThreads, 1) attention_bwd_kernel(const __grid_constant__ BwdArguments arguments) {
  extern __shared__ unsigned char memory[];
  __shared__ BwdState<C> state;
  const BwdStorage<C, T> shared(state, memory);
  if (threadIdx.x == 0) {
    state.barrier.init();
    for (SumRows& rows : state.sum_rows) rows.sums = arguments.sums, rows.begin = rows.end = 0;
    if (blockIdx.x == 0) arguments.tickets.open();
    ptx::launch_dependents();  // what follows needs nothing of this kernel before its own end
  }
  if constexpr (C::kBias)
    shared.bias().tables().clear_stages(C::kBiasStages * C::kBiasStageBytes, threadIdx.x, C::kThreads);
  __syncthreads();
  if constexpr (C::kBias)
    if (threadIdx.x >= 64) make_bias_tables(arguments, shared);
  const int group = threadIdx.x / 128;
  if (group == 0) {
    ptx::set_max_registers_down<C::kLoadRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      BwdLoader<C, T>{arguments, shared, {}, {}}.run();
    } else if (warp == 1) {
      find_blocks(arguments, shared);
    } else if constexpr (C::kBias) {
      if (warp == 3) {
        BwdNoter<C, T>(arguments, shared).run();
      } else if constexpr (C::kQuerySums) {
        SumAdder<C::kSumStages, C, T>{arguments, shared, 0}.run();
      }
    } else if constexpr (C::kQuerySums) {
      SumAdder<1, C, T>{arguments, shared, warp - 2}.run();
    }
  } else if (C::kTables && group > C::kGroups) {
    if constexpr (C::kTables) {
      ptx::set_max_registers_down<C::kSumRegisters>();
      TableSummer<C, T>{arguments, shared}.run();
    }
  } else {
    ptx::set_max_registers_up<C::kComputeRegisters>();
    if constexpr (C::kSplitKeys) {
      BwdComputer<C, T> computer{{arguments, shared}};
      if constexpr (C::kBias) {
        computer.run_inline();
      } else {
        computer.run();
      }
    } else if (group == 1) {
      BwdHalf<C, T, true>{{arguments, shared}}.run();
    } else {
      BwdHalf<C, T, false>{{arguments, shared}}.run();
    }
  }
}

// dK and dV, and sums of dQ if there is room for them.
template <class C, class T>
Status attention_bwd_keys(const AttentionBwdParams& params, const BwdScratch& scratch, int processors,
                          cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  static_assert(Score<T>::kArgument == Score<T>::kSlope, "one factor for both");
  BwdArguments arguments{{},
                         {},
                         {},
                         {},
                         params,
                         key_schedule(a),
                         C::kFinishes ? Tickets::of_cleared(scratch.progress.tickets) : Tickets(scratch.key_tickets),
                         scratch.cells,
                         scratch.sums,
                         scratch.progress,
                         C::kTables ? scratch.copies.first(scratch.tables) : scratch.tables,
                         scratch.copies.count,
                         scratch.copies.stride,
                         static_cast<float>(a.alpha) * Score<T>::kArgument,
                         static_cast<float>(a.scale.value),
                         ScoreFactors(a.alpha, Score<T>::kArgument, C::kBias || C::kDense)};
  if (Status s = make_tensor_maps(arguments, params, C::kQueries, C::kKeys); !s.ok()) return s;
  widen_last_group(arguments.schedule, C::kKeys, processors);
  const int64_t items = most_items(a.jagged.total_kv, a.jagged.batch, C::kKeys, a.heads);
  const bool behind_tables = C::kBias && !C::kTables && scratch.tables.any() && !scratch.tables.exact();
  return launch<attention_bwd_kernel<C, T>>(arguments, items < processors ? items : processors, C::kThreads,
                                            C::kSharedBytes, stream, behind_tables);
}

template <class C, class T>
Status attention_bwd_sums(const AttentionBwdParams& params, const BwdScratch& scratch, int processors,
                          cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  if constexpr (C::kFinishes) {
    if (clears_scratch()) HSTU_TRY(cudaMemsetAsync(scratch.sums, 0, scratch.sum_bytes, stream));
    HSTU_TRY(cudaMemsetAsync(scratch.progress.tickets, 0, scratch.progress.bytes, stream));
    return attention_bwd_keys<C, T>(params, scratch, processors, stream);
  } else {
    if (C::kTables || !scratch.tables.any()) HSTU_TRY(cudaMemsetAsync(scratch.sums, 0, scratch.sum_bytes, stream));
    if (C::kTables) HSTU_TRY(cudaMemsetAsync(scratch.copies.sums, 0, scratch.copies.bytes(), stream));
    if (Status s = attention_bwd_keys<C, T>(params, scratch, processors, stream); !s.ok()) return s;
    const TableCopies copies = C::kTables ? scratch.copies : TableCopies();
    return convert_sums<T>(
        {params.grad_q, scratch.sums, a.jagged.total_q, a.heads, a.dim_qk, C::kPanels, scratch.tables, copies},
        processors, stream);
  }
}

template <class T, int kDim, class Bias>
Status attention_bwd(const AttentionBwdParams& params, const BwdScratch& scratch, int processors, cudaStream_t stream) {
  if constexpr (bwd_may_sum_queries(kDim)) {
    using Sums = BwdConfigOf<kDim, true, Bias>;
    if constexpr (Sums::kFinishes)
      if (bwd_finishes_sums(params, kDim))
        return params.deterministic ? attention_bwd_sums<BwdOrderedShape<Sums>, T>(params, scratch, processors, stream)
                                    : attention_bwd_sums<Sums, T>(params, scratch, processors, stream);
    if (!params.deterministic) return attention_bwd_sums<BwdClearedShape<Sums>, T>(params, scratch, processors, stream);
  }
  using Keys = BwdConfigOf<kDim, false, Bias>;
  if (Status s = attention_bwd_keys<Keys, T>(params, scratch, processors, stream); !s.ok()) return s;
  return attention_bwd_queries<T, kDim, Bias>(params, scratch, processors, stream);
}

template <class T, int kDim>
Status attention_bwd(const AttentionBwdParams& params, void* memory, int processors, cudaStream_t stream) {
  return attention_bwd<T, kDim, NoBias>(params, BwdScratch(params, kDim, memory), processors, stream);
}

// See dense_grads.cuh.
template <class T, int kDim>
Status attention_dense_grads(const AttentionBwdParams& params, void* tickets, int processors, cudaStream_t stream);

template <class T, int kDim>
Status attention_bwd_dense(const AttentionBwdParams& params, void* memory, int processors, cudaStream_t stream) {
  const BwdScratch scratch(params, kDim, memory);
  if (params.grad_bias) {
    if (clears_scratch()) HSTU_TRY(cudaMemsetAsync(scratch.bias_tickets, 0, sizeof(TicketCounters), stream));
    const Status s = attention_dense_grads<T, kDim>(params, scratch.bias_tickets, processors, stream);
    if (!s.ok()) return s;
  }
  return attention_bwd<T, kDim, DenseBias>(params, scratch, processors, stream);
}

// dK, dV and dQ.
template <class T, int kDim>
Status attention_bwd_biased(const AttentionBwdParams& params, const BwdScratch& scratch, int processors,
                            cudaStream_t stream) {
  if (bwd_has_wide_cells(params, kDim)) {
    if constexpr (kDim == 128)
      return attention_bwd_sums<BwdConfigOf<kDim, true, ManyBucketsBias>, T>(params, scratch, processors, stream);
    if constexpr (kDim == 256) return attention_bwd<T, kDim, ManyBucketsBias>(params, scratch, processors, stream);
  }
  return attention_bwd<T, kDim, RelativeBias>(params, scratch, processors, stream);
}

// See table_grads.cuh.
template <class T, int kDim>
Status attention_table_grads(const AttentionBwdParams& params, const BwdScratch& scratch, int processors,
                             cudaStream_t stream);

// With a relative bias. Table gradients, where they are wanted, come first: their kernel clears the sums of dQ.
template <class T, int kDim>
Status attention_bwd_relative(const AttentionBwdParams& params, void* memory, int processors, cudaStream_t stream) {
  const BwdScratch scratch(params, kDim, memory);
  if constexpr (bwd_may_sum_queries(kDim))
    if (bwd_sums_tables(params, kDim))
      return attention_bwd_sums<BwdTablesConfig<kDim>, T>(params, scratch, processors, stream);
  for (const TableSums* t : {&scratch.tables.position, &scratch.tables.time})
    if (t->sums) HSTU_TRY(cudaMemsetAsync(t->start(), 0, t->bytes(), stream));
  if (scratch.tables.any())
    if (Status s = attention_table_grads<T, kDim>(params, scratch, processors, stream); !s.ok()) return s;
  return attention_bwd_biased<T, kDim>(params, scratch, processors, stream);
}

}  // namespace hstu_ops::cuda::sm90
