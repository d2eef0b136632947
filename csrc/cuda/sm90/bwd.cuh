// Attention backward without bias with Hopper's copy engine and asynchronous tensor cores.
//
// A block of threads stays on its SM and takes item after item (kKeys keys of one head, whose dK and dV stay in
// registers) and walks tiles of queries. Scores are computed transposed, S' = K Q' and dP' = V dO', so that P' and dS'
// are left operands of dV += P' dO and dK += dS' Q without leaving the registers; only dQ = dS K needs dS in shared
// memory, and is one tile late, so that no warpgroup waits for another:
//
//   find     | item i + 2 | item i + 3 ...
//   load     | Q0 dO0 | K V | Q1 dO1 | Q2 dO2 ...      (the next item already while this one is computed)
//   compute  |  S0 dP0         | dV += P0 dO0, dK += dS0 Q0 | S1 dP1 dQ0 | dV += P1 dO1, dK += dS1 Q1 | ...
//            |         P0, dS0 |   dS0 to memory            |    P1, dS1 |   dS1, dQ0 to memory
//   add      |                                                              dQ0 to global memory (fp32) ...
//
// The first warpgroup finds, loads and adds, one warp or two each. Barriers: see bwd_storage.h.
#pragma once

#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/named_barrier.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/bwd_load.h"
#include "cuda/sm90/bwd_scratch.h"
#include "cuda/sm90/bwd_store.h"
#include "cuda/sm90/bwd_sums.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/fragment.h"
#include "cuda/tile/score.h"
#include "cuda/tile/walk.h"

namespace hstu_ops::cuda::sm90 {

// ---- a computing warpgroup ----

// Which of the sums a warpgroup has: dV, dK or both.
template <class C, class T, bool kHasValues, bool kHasKeys>
struct BwdComputer {
  using Scores = float[C::kQueries / 2];
  using Operand = uint32_t[C::kQueries / 16][4];
  using Sums = float[C::kDim / 2];
  using QuerySums = float[kPanel / 2];
  using Bits = ColumnBits<C::kQueries / 8>;
  using Part = Accumulator<1, 8>;  // of the tile's queries: what the mask works on at a time

  const BwdArguments& arguments;
  const BwdStorage<C, T>& shared;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // the shuffle tells the compiler that it is uniform
  const float alpha = static_cast<float>(arguments.params.problem.alpha);
  Count items, tiles, outs;  // so far; outs: of dQ

  __device__ BwdBarriers<C>& barrier() const { return shared.state.barrier; }
  __device__ int thread() const { return threadIdx.x % 128; }
  __device__ int warp_key() const { return (C::kSplitKeys ? group * 64 : 0) + thread() / 32 * 16; }
  __device__ void sync() const { ptx::named_barrier_sync(1 + group, 128); }
  __device__ void release(ptx::Mbarrier& empty) const {
    if (thread() == 0) empty.arrive();
  }
  __device__ static void arrive_warp(ptx::Mbarrier& barrier) {
    __syncwarp();
    if (lane_id() == 0) barrier.arrive();
  }
  // Of all scaled gradients; a scale of each row is in dS and P already.
  __device__ float factor(const Job& job) const {
    const ScaleParams& s = arguments.params.problem.scale;
    if (!s.values) return static_cast<float>(s.value);
    return s.per_row ? 1.f : static_cast<const float*>(s.values)[job.item.sequence];
  }

  // Rows past the end of the sequence belong to others: 0 * NaN would be NaN. Every warpgroup writes the same zeros.
  __device__ __forceinline__ void clear_rows(uint32_t panel, int panel_rows, int there) const {
    for (int at = there * 8 + thread(); at < panel_rows * 8; at += 128)
#pragma unroll
      for (int p = 0; p < C::kPanels; ++p)
        ptx::st_shared(panel + p * panel_rows * 128 + at * 16, make_uint4(0, 0, 0, 0));
  }

  // S' = K Q' or dP' = V dO', begun: `left` and `right` are first panels.
  __device__ __forceinline__ void multiply_scores(Scores& s, uint32_t left, uint32_t right) const {
    const ptx::Descriptor a(left + (C::kSplitKeys ? group * 64 * 128 : 0)), b(right);
#pragma unroll
    for (int step = 0; step < C::kDim / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 32;
      ptx::Wgmma<C::kQueries, T>::multiply_rows(s, a.at(panel * C::kKeys * 128 + inside),
                                                b.at(panel * C::kQueries * 128 + inside), step > 0);
    }
    ptx::wgmma_commit();
  }

  // dV += P' dO or dK += dS' Q, begun.
  __device__ __forceinline__ void accumulate(Sums& sums, const Operand& scores, uint32_t right) const {
    const ptx::Descriptor b(right, C::kQueries * 128);
#pragma unroll
    for (int step = 0; step < C::kQueries / 16; ++step)
      ptx::Wgmma<C::kDim, T>::multiply_fragment(sums, scores[step], b.at(step * 2048));
  }

  // 64 columns of dQ = dS K of the tile before `count`, begun.
  __device__ __forceinline__ void multiply_keys(QuerySums& dq, Count count, int part) const {
    const Count before = count.before();
    if (part == 0) barrier().score.full[before.stage<C::kScoreStages>()].wait(before.round<C::kScoreStages>());
    const int panel = C::kSplitQueries ? 0 : group * C::kSumParts + part;
    const ptx::Descriptor a(shared.score_panel(before.stage<C::kScoreStages>(), C::kSplitQueries ? group : 0).base),
        b(shared.key_panel(items.stage<C::kKeyStages>(), panel).base);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeys / 16; ++step)
      ptx::Wgmma<kPanel, T>::multiply_columns(dq, a.at(step * 2048), b.at(step * 2048), step > 0);
    ptx::wgmma_commit();
  }

  // 64 columns of dQ of a tile, complete, on their way out.
  __device__ __forceinline__ void put_query_sums(const Job& job, int tile, const QuerySums& dq, int part) {
    const int first = tile * C::kQueries + (C::kSplitQueries ? group * 64 : 0);
    const int64_t row = job.sequence.begin_q + first;
    Gate<1>& gate = barrier().sum[group];
    gate.empty[0].wait(outs.round<1>() ^ 1);
    put_sums(shared.sums(group), thread() / 32 * 16, row, dq, alpha * Score<T>::kSlope * factor(job));
    if (thread() == 0) {
      const int rows = clamp_int(job.sequence.num_q - first, 0, 64);
      const int panel = C::kSplitQueries ? 0 : group * C::kSumParts + part;
      const AttentionProblem& a = arguments.params.problem;
      shared.state.sums[group] = {arguments.sums + sum_row(a.jagged.total_q, C::kPanels, job.item.head, panel, row),
                                  rows * kPanel * 4};
    }
    ptx::fence_proxy_async();
    arrive_warp(gate.full[0]);
    outs.next();
  }

  // Columns of dQ from `part` on, of the tile before `count`.
  __device__ __forceinline__ void finish_query_sums(const Job& job, int tile, Count count, int part) {
#pragma unroll
    for (; part < C::kSumParts; ++part) {
      QuerySums dq;
      multiply_keys(dq, count, part);
      ptx::wgmma_wait<0>();
      ptx::wgmma_settle(dq);
      put_query_sums(job, tile, dq, part);
    }
    release(barrier().score.empty[count.before().stage<C::kScoreStages>()]);
  }

  // What this warp's keys have of the tile's queries: worked out before accumulators fill the registers.
  __device__ __forceinline__ Bits keep_bits(const Job& job, BwdTile tile) const {
    const int row = job.sequence.first_row + tile.tile() * C::kQueries, col = job.item.block * C::kKeys + warp_key();
    return Bits(job.sequence.mask, row, job.sequence.mask.len, col);
  }

  __device__ static __forceinline__ ColumnBits<8> part_of(const Bits& bits, int part) {
    ColumnBits<8> b;
    b.words[0] = bits.words[part * 2], b.words[1] = bits.words[part * 2 + 1];
    return b;
  }

  // P' and dS' of the tile, out of S' and dP', as operands.
  __device__ __forceinline__ void score(const Job& job, BwdTile tile, const Bits& bits, Scores& s, Scores& d,
                                        Operand& p, Operand& ds) const {
    const bool per_row = arguments.params.problem.scale.per_row;
#pragma unroll
    for (int i = 0; i < C::kQueries / 64; ++i) {
      Part &u = reinterpret_cast<Part&>(s[i * 32]), &g = reinterpret_cast<Part&>(d[i * 32]);
      u.each([this](float& x, int, int) { x *= alpha * Score<T>::kArgument; });
      Score<T>::differentiate(u, g);
      if (!tile.covered(group)) mask_columns(part_of(bits, i), u, g);
      if (per_row) apply_row_scale(job, tile.tile() * C::kQueries + i * 64, u, g);
      round(u, p, i * 4);
      round(g, ds, i * 4);
    }
  }

  __device__ static __forceinline__ void round(const Part& part, Operand& to, int step) {
    const Fragment<T, 1, 8> f(part);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int e = 0; e < 4; ++e) to[step + k][e] = f.x[0][k][e];
  }

  __device__ __forceinline__ void apply_row_scale(const Job& job, int query, Part& s, Part& d) const {
    const RowScale scale(arguments.params.problem.scale, job.item.sequence, job.sequence.begin_q);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int at = query + n * 8 + lane_col() + c;
        const float f = at < job.sequence.num_q ? scale(at) : 0.f;
#pragma unroll
        for (int h = 0; h < 2; ++h) s.x[0][n][2 * h + c] *= f, d.x[0][n][2 * h + c] *= f;
      }
  }

  // dS' to shared memory, for all warpgroups.
  __device__ __forceinline__ void put_scores(const Operand& ds) {
    barrier().score.empty[tiles.stage<C::kScoreStages>()].wait(tiles.round<C::kScoreStages>() ^ 1);
    const int row = warp_key() + lane_id() % 16, chunk = lane_id() / 16;
#pragma unroll
    for (int step = 0; step < C::kQueries / 16; ++step)
      ptx::stmatrix_x4(shared.score_panel(tiles.stage<C::kScoreStages>(), step / 4).at(row, step % 4 * 2 + chunk),
                       ds[step]);
    ptx::fence_proxy_async();
    arrive_warp(barrier().score.full[tiles.stage<C::kScoreStages>()]);
  }

  // The second warpgroup's dS' is dP' times what the first one knows, here as pairs rounded to T.
  __device__ __forceinline__ void put_slopes(const Operand& slopes) {
    barrier().slope.empty[tiles.stage<2>()].wait(tiles.round<2>() ^ 1);
#pragma unroll
    for (int step = 0; step < C::kQueries / 16; ++step) {
      const uint32_t(&x)[4] = slopes[step];
      ptx::st_shared(shared.slopes(tiles.stage<2>()) + (step * 128 + thread()) * 16,
                     make_uint4(x[0], x[1], x[2], x[3]));
    }
    arrive_warp(barrier().slope.full[tiles.stage<2>()]);
  }
  __device__ __forceinline__ void apply_slopes(const Scores& d, Operand& ds) {
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
    arrive_warp(barrier().slope.empty[tiles.stage<2>()]);
  }

  // A tile of which this warpgroup keeps something; `before` is the tile whose dQ is due.
  template <bool kBefore>
  __device__ __forceinline__ void compute_tile(const Job& job, BwdTile tile, int before, Sums& dk, Sums& dv) {
    Operand p, ds;
    QuerySums dq;
    Bits bits;
    if (kHasValues && !tile.covered(group)) bits = keep_bits(job, tile);
    {
      Scores s, d;
      ptx::wgmma_fence();
      if (kHasValues)
        multiply_scores(s, shared.key_panel(items.stage<C::kKeyStages>(), 0).base,
                        shared.query_panel(tiles.stage<C::kQueryStages>(), 0).base);
      if (kHasKeys)
        multiply_scores(d, shared.value_panel(items.stage<C::kValueStages>(), 0).base,
                        shared.grad_panel(tiles.stage<C::kGradStages>(), 0).base);
      if (kBefore && C::kEarlySums) multiply_keys(dq, tiles, 0);
      ptx::wgmma_wait<kBefore && C::kEarlySums ? 1 : 0>();
      if (kHasValues) ptx::wgmma_settle(s);
      if (kHasKeys) ptx::wgmma_settle(d);
      if (!kHasKeys) {
#pragma unroll
        for (float& x : d) x = 1.f;
      }
      if (kHasValues) score(job, tile, bits, s, d, p, ds);
      if (kHasValues && !kHasKeys) put_slopes(ds);
      if (!kHasValues) apply_slopes(d, ds);
    }
    if (kBefore && !C::kEarlySums) multiply_keys(dq, tiles, 0);
    if (kHasValues) ptx::wgmma_settle(p), ptx::wgmma_settle(dv);
    if (kHasKeys) ptx::wgmma_settle(ds), ptx::wgmma_settle(dk);
    ptx::wgmma_fence();
    if (kHasValues) accumulate(dv, p, shared.grad_panel(tiles.stage<C::kGradStages>(), 0).base);
    if (kHasKeys) accumulate(dk, ds, shared.query_panel(tiles.stage<C::kQueryStages>(), 0).base);
    ptx::wgmma_commit();
    if (kHasKeys) put_scores(ds);
    if (kBefore) {
      ptx::wgmma_wait<1>();
      ptx::wgmma_settle(dq);
      put_query_sums(job, before, dq, 0);
    }
    ptx::wgmma_wait<0>();
    if (kHasValues) ptx::wgmma_settle(dv);
    if (kHasKeys) ptx::wgmma_settle(dk);
    if (kBefore) finish_query_sums(job, before, tiles, 1);
  }

  // The tile that has arrived next, without rows of other sequences.
  __device__ __forceinline__ BwdTile await_tile(const Job& job) const {
    barrier().query.full[tiles.stage<C::kQueryStages>()].wait(tiles.round<C::kQueryStages>());
    const BwdTile tile = shared.state.tiles[tiles.stage<C::kQueryStages>()];
    barrier().grad.full[tiles.stage<C::kGradStages>()].wait(tiles.round<C::kGradStages>());
    const int there = job.sequence.num_q - tile.tile() * C::kQueries;
    if (there < C::kQueries) {
      clear_rows(shared.query_panel(tiles.stage<C::kQueryStages>(), 0).base, C::kQueries, there);
      clear_rows(shared.grad_panel(tiles.stage<C::kGradStages>(), 0).base, C::kQueries, there);
      ptx::fence_proxy_async();
      sync();
    }
    return tile;
  }

  __device__ __forceinline__ void release_tile() {
    release(barrier().query.empty[tiles.stage<C::kQueryStages>()]);
    release(barrier().grad.empty[tiles.stage<C::kGradStages>()]);
    tiles.next();
  }

  // Nothing kept: its rows of dS are zeros.
  __device__ __forceinline__ void skip_tile() {
    if (kHasKeys) {
      Operand zero;
#pragma unroll
      for (auto& step : zero)
#pragma unroll
        for (uint32_t& x : step) x = 0;
      put_scores(zero);
    }
    sync();  // no product holds the warps together here: all must have seen the tile before its stage is used again
  }

  __device__ __forceinline__ void compute(const Job& job, Sums& dk, Sums& dv) {
    BwdTile tile = await_tile(job);
    if (tile.kept(group)) {
      compute_tile<false>(job, tile, 0, dk, dv);
    } else {
      skip_tile();
    }
    release_tile();
#pragma unroll 1
    while (!tile.last()) {
      const int before = tile.tile();
      tile = await_tile(job);
      if (tile.kept(group)) {
        compute_tile<true>(job, tile, before, dk, dv);
      } else {
        skip_tile();
        finish_query_sums(job, before, tiles, 0);
      }
      release_tile();
    }
    release(barrier().value.empty[items.stage<C::kValueStages>()]);
    finish_query_sums(job, tile.tile(), tiles, 0);
  }

  // Keys past the end of the sequence: see clear_rows.
  __device__ __forceinline__ void await_keys(const Job& job) const {
    barrier().key.full[items.stage<C::kKeyStages>()].wait(items.round<C::kKeyStages>());
    barrier().value.full[items.stage<C::kValueStages>()].wait(items.round<C::kValueStages>());
    const int there = job.sequence.mask.len - job.item.block * C::kKeys;
    if (there >= C::kKeys) return;
    clear_rows(shared.key_panel(items.stage<C::kKeyStages>(), 0).base, C::kKeys, there);
    clear_rows(shared.value_panel(items.stage<C::kValueStages>(), 0).base, C::kKeys, there);
    ptx::fence_proxy_async();
    sync();
  }

  __device__ __forceinline__ void store(const Job& job, const View& view, int dim, const Sums& sums, float f) const {
    const GlobalRows<T> to(view, job.sequence.begin_kv, job.item.head, dim);
    store_rows<T, C::kDim>(to, job.item.block * C::kKeys + warp_key(), job.sequence.mask.len, sums, f);
  }

  __device__ void run() {
    for (;; items.next()) {
      barrier().job.full[items.stage<kBwdJobs>()].wait(items.round<kBwdJobs>());
      const BwdJob& found = shared.state.jobs[items.stage<kBwdJobs>()];
      if (!found.more) break;
      const Job& job = found.job;
      Sums dk, dv;
#pragma unroll
      for (int i = 0; i < C::kDim / 2; ++i) dk[i] = dv[i] = 0.f;
      await_keys(job);
      if (found.any_tile) {
        compute(job, dk, dv);
      } else {
        sync();  // as in skip_tile
        release(barrier().value.empty[items.stage<C::kValueStages>()]);
      }
      release(barrier().key.empty[items.stage<C::kKeyStages>()]);
      const AttentionBwdParams& params = arguments.params;
      const float f = factor(job);
      if (kHasValues) store(job, params.grad_v, params.problem.dim_v, dv, f);
      if (kHasKeys) store(job, params.grad_k, params.problem.dim_qk, dk, f * alpha * Score<T>::kSlope);
      sync();  // all have read the job
      release(barrier().job.empty[items.stage<kBwdJobs>()]);
    }
    Gate<1>& gate = barrier().sum[group];
    gate.empty[0].wait(outs.round<1>() ^ 1);
    if (thread() == 0) shared.state.sums[group].bytes = -1;
    arrive_warp(gate.full[0]);
  }
};

// ---- kernel and launch ----

template <class C, class T>
__global__ void __launch_bounds__(C::kThreads, 1) attention_bwd_kernel(const __grid_constant__ BwdArguments arguments) {
  extern __shared__ unsigned char memory[];
  __shared__ BwdState<C> state;
  const BwdStorage<C, T> shared(state, memory);
  if (threadIdx.x == 0) state.barrier.init();
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    ptx::set_max_registers_down<C::kLoadRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      BwdLoader<C, T>{arguments, shared, {}, {}}.run();
    } else if (warp == 1) {
      find_blocks(arguments, shared);
    } else if (lane_id() == 0) {
      add_sums(shared, warp - 2);
    }
  } else {
    ptx::set_max_registers_up<C::kComputeRegisters>();
    if (C::kSplitKeys) {
      BwdComputer<C, T, true, true>{arguments, shared}.run();
    } else if (group == 1) {
      BwdComputer<C, T, true, false>{arguments, shared}.run();
    } else {
      BwdComputer<C, T, false, true>{arguments, shared}.run();
    }
  }
}

template <class T, int kDim>
Status attention_bwd(const AttentionBwdParams& params, void* memory, int processors, cudaStream_t stream) {
  using C = BwdConfig<kDim>;
  const AttentionProblem& a = params.problem;
  const BwdScratch scratch(a, C::kDim, memory);
  BwdArguments arguments{{}, {}, {}, {}, params, key_schedule(a), scratch.ticket, scratch.sums};
  const auto make = [&](CUtensorMap& map, const View& view, int64_t rows, int dim, int box) {
    return make_tensor_map(map, a.dtype, view, rows, a.heads, dim, box);
  };
  if (Status s = make(arguments.q, a.q, a.jagged.total_q, a.dim_qk, C::kQueries); !s.ok()) return s;
  if (Status s = make(arguments.grad_out, params.grad_out, a.jagged.total_q, a.dim_v, C::kQueries); !s.ok()) return s;
  if (Status s = make(arguments.k, a.k, a.jagged.total_kv, a.dim_qk, C::kKeys); !s.ok()) return s;
  if (Status s = make(arguments.v, a.v, a.jagged.total_kv, a.dim_v, C::kKeys); !s.ok()) return s;
  const auto kernel = attention_bwd_kernel<C, T>;
  HSTU_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  HSTU_TRY(cudaMemsetAsync(memory, 0, scratch.bytes, stream));
  const int64_t items = most_items(a.jagged.total_kv, a.jagged.batch, C::kKeys, a.heads);
  kernel<<<static_cast<unsigned>(items < processors ? items : processors), C::kThreads, C::kSharedBytes, stream>>>(
      arguments);
  HSTU_TRY(cudaGetLastError());
  return convert_sums<T>({params.grad_q, arguments.sums, a.jagged.total_q, a.heads, a.dim_qk, C::kPanels}, processors,
                         stream);
}

}  // namespace hstu_ops::cuda::sm90
