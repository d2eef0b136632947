// dQ of the Hopper backward where it is not summed in global memory: a kernel of its own, which computes the scores
// again and adds in a fixed order.
//
// A block of threads stays on its SM and takes item after item (kRows queries of one head, whose dQ stays in registers)
// and walks tiles of keys; scores are not transposed, so that dS is the left operand of dQ += dS K without leaving the
// registers:
//
//   find     | item i + 1          (while item i is computed)
//   load     | Q dO K0 V0 | K1 V1 | K2 V2 ...             (the next item already while this one is computed)
//   compute  |  S0 = Q K0^T, dP0 = dO V0^T |     | dQ += dS0 K0, S1, dP1 |     | dQ += dS1 K1, S2, dP2 | ...
//            |                             | dS0 |                       | dS1 |        (the other warpgroup's
//            products)
//
// Scores begin from the bias, if there is one; what is to be known of a relative one two more warps prepare
// (fwd_bias_prepare.h).
//
// Barriers: see bwd_queries_load.h.
#pragma once

#include "cuda/ptx/named_barrier.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/bwd_bias.h"
#include "cuda/sm90/bwd_queries_load.h"
#include "cuda/sm90/bwd_store.h"
#include "cuda/sm90/fwd_bias_prepare.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/meet.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/score.h"
#include "cuda/tile/walk.h"

namespace hstu_ops::cuda::sm90 {

// ---- a computing warpgroup ----

template <class C, class T>
struct BwdQueriesComputer {
  static constexpr bool kDense = std::is_same_v<typename C::Bias, DenseBias>, kRelative = C::kPreparers > 0;
  static constexpr bool kStarts = kDense || kRelative;  // scores begin from the bias
  using Scores = float[C::kCols / 2];
  using Sums = float[C::kDim / 2];
  using Operand = uint32_t[C::kCols / 16][4];
  using Tile = Accumulator<1, C::kCols / 8>;  // the scores again

  const BwdQueriesArguments& arguments;
  const BwdQueriesStorage<C>& shared;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // the shuffle tells the compiler that it is uniform
  const float alpha = static_cast<float>(arguments.params.problem.alpha);
  Count items, tiles;  // so far; by turns, the next of this warpgroup's
  unsigned begin = 0;  // by turns: number of the item's first tile

  static constexpr int kStep = C::kTurns ? C::kGroups : 1;  // from a tile to this warpgroup's next

  __device__ int thread() const { return threadIdx.x % 128; }
  __device__ int warp_row() const { return (C::kTurns ? 0 : group * 64) + thread() / 32 * 16; }
  __device__ void sync() const { ptx::named_barrier_sync(1 + group, 128); }
  __device__ void release(ptx::Mbarrier& empty) const {
    if (thread() == 0) empty.arrive();
  }
  __device__ void await_bias() const {
    if constexpr (kRelative)
      shared.barrier.bias.full[tiles.stage<C::kBiasStages>()].wait(tiles.round<C::kBiasStages>());
  }
  // Of the tile's first use: its values, and its bias.
  __device__ void release_values() const {
    release(shared.barrier.value.empty[tiles.stage<C::kValueStages>()]);
    if constexpr (kRelative) release(shared.barrier.bias.empty[tiles.stage<C::kBiasStages>()]);
  }
  __device__ void release_keys(Count at) const { release(shared.barrier.key.empty[at.stage<C::kKeyStages>()]); }

  // S = Q K^T or dP = dO V^T, begun.
  template <bool kAdd = false>
  __device__ __forceinline__ void multiply_rows(Scores& s, uint32_t rows, uint32_t cols) const {
    const ptx::Descriptor a(rows + (C::kTurns ? 0 : group * 64 * 128)), b(cols);
#pragma unroll
    for (int i = 0; i < C::kDim / 16; ++i)
      ptx::Wgmma<C::kCols, T>::multiply_rows(s, a.at(i / 4 * C::kRows * 128 + i % 4 * 32),
                                             b.at(i / 4 * C::kCols * 128 + i % 4 * 32), kAdd || i > 0);
  }
  // What the product S is added to.
  __device__ __forceinline__ void start_scores(const FwdItem<C>& item, int tile, Scores& s) const {
    const Job& job = item.job;
    if constexpr (kDense)
      start_from_dense<false>(DenseBias(arguments.params.problem, job, nullptr),
                              job.sequence.first_row + item.first + warp_row(), tile * C::kCols, arguments.factors,
                              reinterpret_cast<Tile&>(s));
    if constexpr (kRelative) {
      await_bias();
      const int warp = ptx::thread_index() / 32 - 4;  // read again: kept, it would take a register
      const auto at = [&]() -> BiasTile {
        const int row = warp % (C::kRows / 16);
        return {row, job.sequence.first_row + item.first + row * 16, tile * C::kCols, item.times + row * 16,
                shared.scratch(warp)};
      };
      start_from_bias(arguments.params.problem, job,
                      BiasStage<typename C::Relative>(shared.bias().stage(tiles.stage<C::kBiasStages>())),
                      shared.bias().tables(), at, arguments.factors.bias, reinterpret_cast<Tile&>(s), [] {});
    }
    if constexpr (kStarts) ptx::wgmma_settle(s);
  }
  __device__ __forceinline__ void multiply_queries(Scores& s) const {
    shared.barrier.key.full[tiles.stage<C::kKeyStages>()].wait(tiles.round<C::kKeyStages>());
    ptx::wgmma_fence();
    multiply_rows<kStarts>(s, shared.queries, shared.key(tiles));
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void multiply_grads(Scores& d) const {
    shared.barrier.value.full[tiles.stage<C::kValueStages>()].wait(tiles.round<C::kValueStages>());
    ptx::wgmma_fence();
    multiply_rows(d, shared.grads, shared.value(tiles));
    ptx::wgmma_commit();
  }
  // dQ += dS K, begun.
  __device__ __forceinline__ void multiply_keys(Sums& dq, Operand& ds) const {
    const ptx::Descriptor k(shared.key(tiles), C::kCols * 128);
    ptx::wgmma_settle(ds);
    ptx::wgmma_settle(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kCols / 16; ++i) ptx::Wgmma<C::kDim, T>::multiply_fragment(dq, ds[i], k.at(i * 2048));
    ptx::wgmma_commit();
  }

  // The same of the tile before, done; kBehind: products begun since.
  template <int kBehind>
  __device__ __forceinline__ void finish_keys(Sums& dq, Operand& ds) const {
    ptx::wgmma_wait<kBehind>();
    ptx::wgmma_settle(ds);
    ptx::wgmma_settle(dq);
    release_keys({tiles.count - kStep});
  }

  // Rows of K from `rows` on are past the end of the sequence and belong to others: 0 * NaN would be NaN. Every
  // warpgroup writes the same zeros.
  __device__ __forceinline__ void clear_keys(int rows) const {
    if (rows >= C::kCols) return;
#pragma unroll 1
    for (int at = rows * 8 + thread(); at < C::kCols * 8; at += 128)
#pragma unroll
      for (int p = 0; p < C::kPanels; ++p)
        ptx::st_shared(shared.key(tiles) + p * C::kCols * 128 + at * 16, make_uint4(0, 0, 0, 0));
    ptx::fence_proxy_async();
    sync();
  }

  // Which columns of a tile row `lane` of this warp keeps.
  __device__ __forceinline__ uint64_t keep_bits(const FwdItem<C>& item, int tile) const {
    const Sequence& s = item.job.sequence;
    return row_bits(s.mask, s.first_row + item.first + warp_row() + lane_id(), tile * C::kCols);
  }

  // dS in dP's place; scale and half of alpha come in the end.
  __device__ __forceinline__ void differentiate(Scores& s, Scores& d, bool covered, uint64_t keep) const {
    Tile &u = reinterpret_cast<Tile&>(s), &g = reinterpret_cast<Tile&>(d);
    u.each([this](float& x, int, int) { x *= arguments.factors.score; });
    Score<T>::differentiate(u, g);
    if (!covered) mask_rows(keep, g);
  }
  __device__ static __forceinline__ void round(const Scores& d, Operand& ds) {
#pragma unroll
    for (int i = 0; i < C::kCols / 16; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[i][e] = pack(d[i * 8 + e * 2], d[i * 8 + e * 2 + 1], T{});
  }

  // Gives back a tile of which this warpgroup keeps nothing. No keys may be held: the loading warp would wait for them.
  __device__ __forceinline__ void skip_tile() {
    shared.barrier.key.full[tiles.stage<C::kKeyStages>()].wait(tiles.round<C::kKeyStages>());
    shared.barrier.value.full[tiles.stage<C::kValueStages>()].wait(tiles.round<C::kValueStages>());
    await_bias();
    sync();  // no product holds the warps together here: all must have seen the tile before its stage is used again
    release_keys(tiles);
    release_values();
    tiles.count += kStep;
  }

  // dS of the tile whose products have begun; its values are used up then and, after the last tile, Q and dO are, too.
  // The mask is worked out while no scores take registers.
  __device__ __forceinline__ void score(Scores& s, Scores& d, Operand& ds, bool covered, uint64_t keep,
                                        bool last) const {
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(s);
    ptx::wgmma_settle(d);
    release_values();
    if (last) release(shared.barrier.query.empty[0]);
    differentiate(s, d, covered, keep);
    round(d, ds);
  }

  // Tiles from `tile` on, the one after each by next(), until `end`: this warpgroup keeps something of each.
  template <class Next>
  __device__ __forceinline__ void compute_run(const FwdItem<C>& item, const GroupTiles& groups, int tile, int end,
                                              const Next& next, Sums& dq) {
    Scores s;
    Operand ds;
    bool covered = groups.covers(tile);
    uint64_t keep = covered ? 0 : keep_bits(item, tile);
    start_scores(item, tile, s);
    multiply_queries(s);
#pragma unroll 1
    for (;;) {
      Scores d;
      multiply_grads(d);
      score(s, d, ds, covered, keep, !C::kTurns && tile == groups.kept.end() - 1);
      const int following = next(tile);
      if (following >= end) break;
      multiply_keys(dq, ds);
      tile = following;
      covered = groups.covers(tile);
      keep = covered ? 0 : keep_bits(item, tile);
      tiles.count += kStep;
      start_scores(item, tile, s);
      if (C::kTurns) finish_keys<0>(dq, ds);  // their place is where this tile's keys go
      multiply_queries(s);
      if (!C::kTurns) finish_keys<1>(dq, ds);
    }
    clear_keys(item.job.sequence.mask.len - tile * C::kCols);  // the last tile alone may end past the sequence
    multiply_keys(dq, ds);
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(dq);
    release_keys(tiles);
    tiles.count += kStep;
  }

  __device__ __forceinline__ void compute(const FwdItem<C>& item, Sums& dq) {
    const TileSpans walk = item.tiles();
    const GroupTiles& groups = item.groups[group];
    shared.barrier.query.full[0].wait(items.round<1>());
    if (groups.none()) {
      sync();  // as in skip_tile
      release(shared.barrier.query.empty[0]);
    }
    for (int tile = walk.next(-1); tile < walk.end(); tile = walk.next(tile)) {
      if (groups.kept.has(tile)) {
        const int end = groups.run_end(tile);
        compute_run(item, groups, tile, end, [](int t) { return t + 1; }, dq);
        tile = end - 1;
      } else {
        skip_tile();
      }
    }
  }

  // By turns: this warpgroup has every second tile, of all tiles there have been.
  __device__ __forceinline__ void compute_turns(const FwdItem<C>& item, Sums& dq) {
    const TileSpans& walk = item.tiles();
    shared.barrier.query.full[0].wait(items.round<1>());
    const int first = walk.next(-1), tile = tiles.count == begin ? first : walk.next(first);
    begin += walk.size();
    if (tile < walk.end())
      compute_run(item, item.groups[0], tile, walk.end(), [&](int t) { return walk.next(walk.next(t)); }, dq);
    join(dq);
  }
  // The sums of both warpgroups: each takes half of the columns, in the first half of dq. They are exchanged where Q
  // and dO were, which are used up then.
  __device__ __forceinline__ void join(Sums& dq) const {
    constexpr int kHalf = C::kDim / 4;
    const auto meet_both = [] { ptx::named_barrier_sync(3 + C::kGroups, 256); };
    const uint32_t own = thread() * 16, to = (group == 0 ? shared.queries : shared.grads) + own,
                   from = (group == 0 ? shared.grads : shared.queries) + own;
    static_assert(kHalf * 4 * 128 <= C::kQueryBytes);
    meet_both();
#pragma unroll
    for (int i = 0; i < kHalf; i += 4) {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[e] = group == 0 ? dq[kHalf + i + e] : dq[i + e];
        if (group != 0) dq[i + e] = dq[kHalf + i + e];
      }
      ptx::st_shared(to + i / 4 * 2048, make_float4(x[0], x[1], x[2], x[3]));
    }
    meet_both();
#pragma unroll
    for (int i = 0; i < kHalf; i += 4) {
      const float4 y = ptx::ld_shared_v4(from + i / 4 * 2048);
      dq[i] += y.x, dq[i + 1] += y.y, dq[i + 2] += y.z, dq[i + 3] += y.w;
    }
    ptx::fence_proxy_async();
    sync();
    release(shared.barrier.query.empty[0]);
  }

  __device__ __forceinline__ void store(const FwdItem<C>& item, const Sums& dq) const {
    const AttentionProblem& a = arguments.params.problem;
    const Sequence& s = item.job.sequence;
    const RowScale scale(a.scale, item.job.item.sequence, s.begin_q);
    GlobalRows<T> to(arguments.params.grad_q, s.begin_q, item.job.item.head, a.dim_qk);
    const int row = item.first + warp_row();
    float factors[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      factors[h] = alpha * Score<T>::kSlope * scale(clamp_int(row + h * 8 + lane_row(), 0, s.num_q - 1));
    constexpr int kColumns = C::kTurns ? C::kDim / 2 : C::kDim;
    if (C::kTurns) to.data += group * kColumns, to.dim -= group * kColumns;
    store_rows<T, kColumns>(to, row, s.num_q, reinterpret_cast<const float(&)[kColumns / 2]>(dq), factors);
  }

  __device__ void run() {
    if (C::kTurns) tiles.count = group;
    for (;; items.next()) {
      const int stage = items.stage<kItems>();
      shared.barrier.item.full[stage].wait(items.round<kItems>());
      const FwdItem<C>& item = shared.items[stage];
      if (!item.more) return;
      if constexpr (kRelative) {
        constexpr int kThreads = 128 * C::kGroups;
        shared.bias().tables().turn(arguments.params.problem.relative, arguments.cells, item.job.item.head,
                                    arguments.factors.bias, threadIdx.x - 128, kThreads,
                                    [] { meet(1 + C::kGroups, kThreads); });
      }
      Sums dq;
#pragma unroll
      for (int i = 0; i < C::kDim / 2; ++i) dq[i] = 0.f;
      if constexpr (C::kTurns) {
        compute_turns(item, dq);
      } else {
        compute(item, dq);
      }
      store(item, dq);
      sync();  // all four warps are done with the item
      release(shared.barrier.item.empty[stage]);
    }
  }
};

// ---- kernel and launch ----

template <class C, class T>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_bwd_queries_kernel(const __grid_constant__ BwdQueriesArguments arguments) {
  extern __shared__ unsigned char memory[];
  __shared__ BwdQueriesBarriers<C> barriers;
  __shared__ FwdItem<C> items[kItems];
  const BwdQueriesStorage<C> shared(barriers, items, memory);
  if (threadIdx.x == 0) {
    barriers.init();
    if (blockIdx.x == 0) arguments.tickets.open();
  }
  __syncthreads();
  if constexpr (C::kPreparers > 0)
    if (threadIdx.x >= 64)
      make_bias_tables<C>(arguments.params.problem.relative, arguments.cells, arguments.factors.bias, shared);
  if (threadIdx.x < 128) {
    ptx::set_max_registers_down<C::kLoadRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      BwdQueriesLoader<C>{arguments, shared, {}, {}}.run();
    } else if (warp == 1) {
      find_query_items(arguments, shared);
    } else if constexpr (C::kPreparers > 0) {
      BiasPreparer<C, BwdQueriesStorage<C>>(arguments.params.problem, arguments.factors.bias, shared).run(warp);
    }
  } else {
    ptx::set_max_registers_up<C::kComputeRegisters>();
    BwdQueriesComputer<C, T>{arguments, shared}.run();
  }
}

// Bias: one of tile/bias.h.
template <class T, int kDim, class Bias>
Status attention_bwd_queries(const AttentionBwdParams& params, const BwdScratch& scratch, int processors,
                             cudaStream_t stream) {
  using C = BwdQueriesPlan<BwdQueriesConfig<kDim, Bias>, Bias>;
  const AttentionProblem& a = params.problem;
  const int64_t items = most_items(a.jagged.total_q, a.jagged.batch, C::kRows, a.heads);
  BwdQueriesArguments arguments{{},
                                {},
                                {},
                                {},
                                params,
                                query_schedule(a),
                                Tickets(scratch.query_tickets),
                                scratch.cells,
                                ScoreFactors(a.alpha, Score<T>::kArgument, !std::is_same_v<Bias, NoBias>)};
  widen_last_group(arguments.schedule, C::kRows, processors);
  if (Status s = make_tensor_maps(arguments, params, C::kRows, C::kCols); !s.ok()) return s;
  return launch<attention_bwd_queries_kernel<C, T>>(arguments, items < processors ? items : processors, C::kThreads,
                                                    C::kSharedBytes, stream, true);
}

}  // namespace hstu_ops::cuda::sm90
