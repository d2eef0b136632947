// Attention forward with Hopper's copy engine and asynchronous tensor cores.
//
// A block of threads stays on its SM and takes item after item (kRows queries of one head). In the first warpgroup one
// warp finds items, one writes down what their rows keep and one requests tiles; the other warpgroups compute, 64
// queries each, on what has arrived:
//
//   find     | item i + 1          (while item i is computed)
//   load     | K0 Q V0 | K1 V1 | K2 V2 ...             (the next item already while this one is computed)
//   compute  |  S0 = Q K0^T | S1 = Q K1^T, O += P0 V0 | S2 = Q K2^T, O += P1 V1 | ...
//            |              P0 = silu(S0)        P1 = silu(S1) while the second product runs
//
// P never leaves the registers. Of several heads that have the same bias, a block may take an item's together
// (compute_heads): S0 is then that of the first head, S1 that of the next, and so on tile by tile. Barriers, each with
// the arrivals that complete it:
//
//   item_full    the finding warp               item_empty    each computing warpgroup, and the loading warp
//   spans_full   the masking warp               item_wanted   the loading warp, near the end of an item
//   query_full  the loading lane, the bytes    query_empty  each computing warpgroup, after its last use of Q
//   key_full    the loading lane, the bytes    key_empty    each computing warpgroup; value_* likewise
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/ptx/cluster.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/named_barrier.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/fwd_bias_add.h"
#include "cuda/sm90/fwd_bias_prepare.h"
#include "cuda/sm90/fwd_bias_start.h"
#include "cuda/sm90/fwd_find.h"
#include "cuda/sm90/fwd_launch.h"
#include "cuda/sm90/fwd_load.h"
#include "cuda/sm90/fwd_scratch.h"
#include "cuda/sm90/fwd_storage.h"
#include "cuda/sm90/ring.h"
#include "cuda/sm90/store.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/score.h"
#include "cuda/tile/walk.h"

namespace hstu_ops::cuda::sm90 {

// ---- a computing warpgroup ----

__device__ __forceinline__ uint32_t scaled(uint32_t pair, float factor) {
  const __nv_bfloat162 x = __hmul2(reinterpret_cast<const __nv_bfloat162&>(pair), __float2bfloat162_rn(factor));
  return reinterpret_cast<const uint32_t&>(x);
}

// kFolded: Q takes alpha / 2, a power of two, before the products.
template <class C, class T, bool kFolded>
struct FwdComputer {
  static constexpr bool kBias = !std::is_same_v<typename C::Bias, NoBias>;
  using Scores = float[C::kCols / 2];
  using Output = float[C::kDim / 2];
  using Weights = uint32_t[C::kCols / 16][4];  // P, as an operand
  using Tile = Accumulator<1, C::kCols / 8>;   // the scores again
  using Queries = uint32_t[C::kQueryRegisters ? C::kDim / 16 : 1][4];

  const FwdArguments& arguments;
  const FwdStorage<C, T>& shared;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // the shuffle tells the compiler that it is uniform
  Ring<C::kStages> ring;
  Ring<C::kBiasStages> bias_ring;
  unsigned parity = 0;  // of the item's number

  __device__ int thread() const { return threadIdx.x % 128; }
  __device__ int warp_row() const { return group * 64 + thread() / 32 * 16; }
  __device__ void sync() const { ptx::named_barrier_sync(1 + group, 128); }
  __device__ void release(ptx::Mbarrier& empty) const {
    if (thread() == 0) empty.arrive();
  }

  // Waits for the item's queries and takes them into registers, if that is where they are used.
  __device__ __forceinline__ void take_queries(Queries& q) {
    shared.barrier.query.full[0].wait(parity);
    if constexpr (C::kQueryRegisters) {
#pragma unroll
      for (int i = 0; i < C::kDim / 16; ++i) {
        ptx::ldmatrix_x4(q[i],
                         shared.query_panel(0, i / 4).at(warp_row() + lane_id() % 16, i % 4 * 2 + lane_id() / 16));
        if constexpr (kFolded)
          for (uint32_t& x : q[i]) x = scaled(x, arguments.alpha);
      }
      sync();
      release(shared.barrier.query.empty[0]);
    }
  }

  // S = Q K^T, begun; head: of the item's.
  __device__ __forceinline__ void multiply_keys(const Queries& q, Scores& s, int head = 0) const {
    const ptx::Descriptor k = shared.descriptor(shared.key_panel(ring.stage, 0).base);
    ptx::wgmma_fence();
    if constexpr (C::kQueryRegisters) {
#pragma unroll
      for (int i = 0; i < C::kDim / 16; ++i)
        ptx::Wgmma<C::kCols, T>::multiply_fragment_rows(s, q[i], k.at(i / 4 * C::kCols * 128 + i % 4 * 32), i > 0);
    } else {
      const ptx::Descriptor rows = shared.descriptor(shared.query_panel(head, 0).base + group * 64 * 128);
#pragma unroll
      for (int i = 0; i < C::kDim / 16; ++i)
        ptx::Wgmma<C::kCols, T>::multiply_rows(s, rows.at(i / 4 * C::kRows * 128 + i % 4 * 32),
                                               k.at(i / 4 * C::kCols * 128 + i % 4 * 32), i > 0);
    }
    ptx::wgmma_commit();
  }

  // Waits for the values of a tile and begins O += P V.
  __device__ __forceinline__ void multiply_values(Output& out, const Weights& p, int rows, const Ring<C::kStages>& at,
                                                  bool ready = false) const {
    shared.barrier.value.full[at.stage].wait(at.round, ready);
    if (rows < C::kCols) clear_values(rows, at.stage);
    const ptx::Descriptor v = shared.descriptor(shared.value_panel(at.stage, 0).base, C::kCols * 128);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kCols / 16; ++i) ptx::Wgmma<C::kDim, T>::multiply_fragment(out, p[i], v.at(i * 2048));
    ptx::wgmma_commit();
  }

  // Rows of V from `rows` on are past the end of the sequence and belong to others: 0 * NaN would be NaN. Every
  // warpgroup writes the same zeros.
  __device__ __forceinline__ void clear_values(int rows, int stage) const {
#pragma unroll 1
    for (int at = rows * 8 + thread(); at < C::kCols * 8; at += 128)
#pragma unroll
      for (int p = 0; p < C::kPanels; ++p)
        ptx::st_shared(shared.value_panel(stage, p).base + at * 16, make_uint4(0, 0, 0, 0));
    ptx::fence_proxy_async();
    sync();
  }

  // Which columns of a tile row `lane` of this warp keeps.
  __device__ __forceinline__ uint64_t keep_bits(const FwdItem<C>& item, int tile) const {
    if constexpr (C::kSpans) {
      const int row = warp_row() + lane_id() % 16, col = tile * C::kCols;
      const uint4 x = ptx::ld_shared_u4(shared.row_spans(parity, row));
      return span_bits(0, x.x, col) | span_bits(x.y, x.z, col) |
             span_bits(x.w, item.job.sequence.first_row + item.first + row + 1, col);
    } else {
      const Sequence& s = item.job.sequence;
      return row_bits(s.mask, s.first_row + item.first + warp_row() + lane_id(), tile * C::kCols);
    }
  }

  __device__ __forceinline__ BiasTile bias_place(const FwdItem<C>& item, int tile) const {
    return {warp_row() / 16, item.job.sequence.first_row + item.first + warp_row(), tile * C::kCols,
            item.times + warp_row(), shared.staging + warp_row() * 128};
  }

  // The argument of SiLU.
  __device__ __forceinline__ void prepare(Scores& s, const FwdItem<C>& item, int at, TileBias<C>& bias) const {
    Tile& tile = reinterpret_cast<Tile&>(s);
    if constexpr (kBias) {
      bias.add(
          arguments.params.problem, item.job, [&] { return bias_place(item, at); }, arguments.alpha,
          Score<T>::kArgument, tile);
    } else if constexpr (!kFolded) {
      tile.each([this](float& x, int, int) { x *= arguments.alpha; });
    }
  }

  // Of half of the columns. Where kAhead, what parts the compiler's runs of instructions comes between the halves, the
  // mask and the wait for the product before; rounding then fills the gaps that tanh leaves in the second half.
  template <int kHalf>
  __device__ __forceinline__ void activate(Scores& s) const {
    using Half = Accumulator<1, C::kCols / 16>;
    Score<T>::activate(reinterpret_cast<Half(&)[2]>(s)[kHalf]);
  }
  __device__ __forceinline__ void round(const Scores& s, Weights& p) const {
#pragma unroll
    for (int i = 0; i < C::kCols / 16; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[i][e] = pack(s[i * 8 + e * 2], s[i * 8 + e * 2 + 1], T{});
  }

  __device__ __forceinline__ void await_keys(bool ready = false) const {
    shared.barrier.key.full[ring.stage].wait(ring.round, ready);
  }
  // What was prepared of the bias.
  __device__ __forceinline__ TileBias<C> await_bias(const FwdItem<C>& item, int tile) const {
    if constexpr (C::kPreparers > 0) shared.barrier.bias.full[bias_ring.stage].wait(bias_ring.round);
    return {shared.bias().stage(bias_ring.stage), shared.bias().tables(), bias_place(item, tile)};
  }
  // The values of a tile are used up, and its bias.
  __device__ __forceinline__ void release_values(int stage, int bias_stage) const {
    release(shared.barrier.value.empty[stage]);
    if constexpr (C::kPreparers > 0) release(shared.barrier.bias.empty[bias_stage]);
  }
  __device__ __forceinline__ void release_bias() {
    if constexpr (C::kPreparers > 0) release(shared.barrier.bias.empty[bias_ring.stage]), bias_ring.next();
  }
  __device__ __forceinline__ void advance() {
    ring.next();
    if constexpr (C::kPreparers > 0) bias_ring.next();
  }

  // The keys of a tile are used up; after the last tile the queries are, too.
  __device__ __forceinline__ void release_keys(const GroupTiles& tiles, int tile) const {
    release(shared.barrier.key.empty[ring.stage]);
    if (!C::kQueryRegisters && tile == tiles.kept.end() - 1) release(shared.barrier.query.empty[0]);
  }

  // Gives back a tile of which this warpgroup keeps nothing. No values may be held: the loading warp would wait for
  // their stage.
  __device__ __forceinline__ void skip_tile() {
    for (int head = 0; head < C::kHeads; ++head) {
      await_keys();
      if constexpr (C::kPreparers > 0) shared.barrier.bias.full[bias_ring.stage].wait(bias_ring.round);
      shared.barrier.value.full[ring.stage].wait(ring.round);
      sync();  // no product holds the warps together here: all must have seen the tile before its stage is used again
      release(shared.barrier.key.empty[ring.stage]);
      if (head + 1 < C::kHeads) release(shared.barrier.value.empty[ring.stage]), ring.next();
    }
    release_values(ring.stage, bias_ring.stage);
    advance();
  }

  // Tiles [tile, end), of each of which this warpgroup keeps something. The first tile, which has no values to multiply
  // yet, shares the code of the others: two copies do not fit the instruction cache.
  __device__ __forceinline__ void compute_run(const FwdItem<C>& item, const GroupTiles& tiles, int tile, int end,
                                              const Queries& q, Output& out) {
    Scores s;
    Weights p;
    Ring<C::kStages> current = ring;
    const int first = tile;
    bool keys_ready = false, values_ready = false;
#pragma unroll 1
    for (; tile < end; ++tile) {
      const bool covered = tiles.covers(tile);
      await_keys(keys_ready);
      TileBias<C> bias = await_bias(item, tile);
      multiply_keys(q, s);
      if (tile > first) {
        multiply_values(out, p, C::kCols, current, values_ready);
      } else {
        ptx::wgmma_commit();  // of nothing
      }
      bias.load(Score<T>::kArgument);
      ptx::wgmma_wait<1>();
      release_keys(tiles, tile);
      if constexpr (C::kAhead) {
        values_ready = shared.barrier.value.full[ring.stage].ready(ring.round);
        keys_ready = shared.barrier.key.full[ring.following().stage].ready(ring.following().round);
      }
      prepare(s, item, tile, bias);
      activate<0>(s);
      if constexpr (!C::kAhead) activate<1>(s);
      if (!covered) mask_rows(keep_bits(item, tile), reinterpret_cast<Tile&>(s));
      ptx::wgmma_wait<0>();
      if (tile > first) release_values(current.stage, bias_ring.before());
      if constexpr (C::kAhead) activate<1>(s);
      round(s, p);
      current = ring;
      advance();
    }
    // The last tile alone may end past the sequence.
    multiply_values(out, p, item.job.sequence.mask.len - (end - 1) * C::kCols, current, values_ready);
    ptx::wgmma_wait<0>();
    release_values(current.stage, bias_ring.before());
  }

  // The same for several heads, which have bias and mask in common: both are worked out once, beside the last product
  // of the tile before. A head's second product is begun behind the next one's first.
  __device__ __forceinline__ void compute_heads(const FwdItem<C>& item, const GroupTiles& tiles, int tile, int end,
                                                const Queries& q, Output (&out)[C::kHeads]) {
    constexpr int kLast = C::kHeads - 1;
    Scores s, bias;
    Weights p;
    // Read once: they are in shared memory.
    const int first = tile, len = ptx::uniform(item.job.sequence.mask.len);
    const CoveredTiles whole = tiles.covered.uniform();
    const bool is_last = end == tiles.kept.end();
#pragma unroll 1
    for (; tile < end; ++tile) {
      if (tile > first) multiply_values(out[kLast], p, C::kCols, ring.last());
      start_bias(item, tile, bias);
      const bool covered = whole.has(tile);
      const uint64_t keep = covered ? 0 : keep_bits(item, tile);
      if (!covered) mask_rows(keep, reinterpret_cast<Tile&>(bias));
#pragma unroll
      for (int head = 0; head <= kLast; ++head) {
        await_keys();
        multiply_keys(q, s, head);
        if (head > 0) {
          multiply_values(out[head - 1], p, len - tile * C::kCols, ring.last());
          ptx::wgmma_wait<1>();
        } else {
          ptx::wgmma_wait<0>();
        }
        release(shared.barrier.key.empty[ring.stage]);
        if (head == 0) release_bias();  // all warps are done with it: they have begun this product
        if (head == kLast && is_last && tile == end - 1) release(shared.barrier.query.empty[0]);
#pragma unroll
        for (int i = 0; i < C::kCols / 4; ++i) s[i] = fmaf(s[i], arguments.alpha, bias[i]);
        activate<0>(s);
        if (!covered) mask_rows(keep, reinterpret_cast<Tile&>(s));
        if (head > 0) ptx::wgmma_wait<0>();
        if (head > 0 || tile > first) release(shared.barrier.value.empty[ring.before()]);
#pragma unroll
        for (int i = C::kCols / 4; i < C::kCols / 2; ++i) s[i] = fmaf(s[i], arguments.alpha, bias[i]);
        activate<1>(s);
        round(s, p);
        ring.next();
      }
    }
    multiply_values(out[kLast], p, len - (end - 1) * C::kCols, ring.last());
    ptx::wgmma_wait<0>();
    release(shared.barrier.value.empty[ring.before()]);
  }
  __device__ __forceinline__ void start_bias(const FwdItem<C>& item, int tile, Scores& bias) const {
    shared.barrier.bias.full[bias_ring.stage].wait(bias_ring.round);
    start_from_bias(
        arguments.params.problem, item.job, BiasStage<typename C::Relative>(shared.bias().stage(bias_ring.stage)),
        shared.bias().tables(), [&] { return bias_place(item, tile); }, Score<T>::kArgument,
        reinterpret_cast<Tile&>(bias), [] {});
  }

  __device__ __forceinline__ void compute(const FwdItem<C>& item, Output (&out)[C::kHeads]) {
    // Dense bias and several heads take registers: with them the tiles are read from shared memory.
    constexpr bool kThere = std::is_same_v<typename C::Bias, DenseBias> || C::kHeads > 1;
    std::conditional_t<kThere, const TileSpans&, const TileSpans> walk = item.tiles();
    std::conditional_t<kThere, const GroupTiles&, const GroupTiles> tiles = item.groups[group];
    Queries q;
    take_queries(q);
    if (!C::kQueryRegisters && tiles.none()) release(shared.barrier.query.empty[0]);
    for (int tile = walk.next(-1); tile < walk.end(); tile = walk.next(tile)) {
      if (tiles.kept.has(tile)) {
        const int end = tiles.run_end(tile);
        if constexpr (C::kHeads == 1) {
          compute_run(item, tiles, tile, end, q, out[0]);
        } else {
          compute_heads(item, tiles, tile, end, q, out);
        }
        tile = end - 1;
      } else {
        skip_tile();
      }
    }
  }

  __device__ __forceinline__ void store(const FwdItem<C>& item, const Output (&out)[C::kHeads]) const {
    const int first = item.first + warp_row();
    if (C::kHeads > 1 || ptx::cluster_size() == 1) {
#pragma unroll
      for (int head = 0; head < C::kHeads; ++head)
        store_output<T>({shared.staging + warp_row() * 128}, arguments.params, item.job, item.job.item.head + head,
                        first, out[head]);
    } else {
      constexpr int kThreads = 128 * C::kGroups;
      ptx::named_barrier_sync(1 + C::kGroups, kThreads);  // nobody needs the tiles any more
      store_sum<T, kThreads>(shared.keys, threadIdx.x - 128, arguments.params, item.job, first, out[0]);
    }
  }

  __device__ void run() {
    for (Ring<kItems> at;; at.next()) {
      shared.barrier.item.full[at.stage].wait(at.round);
      const FwdItem<C>& item = shared.items[at.stage];
      if (!item.more) return;
      if constexpr (C::kPreparers > 0) {
        constexpr int kThreads = 128 * C::kGroups;
        shared.bias().tables().turn(arguments.params.problem.relative, arguments.cells, item.job.item.head,
                                    Score<T>::kArgument, threadIdx.x - 128, kThreads,
                                    [] { meet(1 + C::kGroups, kThreads); });
      }
      Output out[C::kHeads];
#pragma unroll
      for (Output& sums : out)
#pragma unroll
        for (float& x : sums) x = 0.f;
      parity = at.parity();
      if constexpr (C::kSpans) shared.barrier.spans_full[at.stage].wait(at.round);
      compute(item, out);
      store(item, out);
      sync();  // all four warps are done with the item
      release(shared.barrier.item.empty[at.stage]);
    }
  }
};

// ---- kernel and launch ----

template <class C, class T, bool kFolded>
__global__ void __launch_bounds__(C::kThreads, 1) attention_fwd_kernel(const __grid_constant__ FwdArguments arguments) {
  extern __shared__ unsigned char memory[];
  __shared__ FwdBarriers<C> barriers;
  __shared__ FwdItem<C> items[kItems];
  const FwdStorage<C, T> shared(barriers, items, memory);
  if (threadIdx.x == 0) {
    barriers.init();
    if (blockIdx.x == 0) arguments.tickets.open();
  }
  __syncthreads();
  if constexpr (C::kPreparers > 0)
    if (threadIdx.x >= 64)
      make_bias_tables<C>(arguments.params.problem.relative, arguments.cells, Score<T>::kArgument, shared);
  if (threadIdx.x < 128) {
    ptx::set_max_registers_down<C::kLoadRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      FwdLoader<C, T>{arguments, shared, {}}.run();
    } else if (warp == 1) {
      find_items(arguments, shared);
    } else if constexpr (C::kSpans) {
      if (warp == 2) write_spans<C, T>(shared);
    } else if constexpr (C::kPreparers > 0) {
      BiasPreparer<C, FwdStorage<C, T>>(arguments.params.problem, Score<T>::kArgument, shared).run(warp);
    }
  } else {
    ptx::set_max_registers_up<C::kComputeRegisters>();
    FwdComputer<C, T, kFolded>{arguments, shared}.run();
  }
}

template <class T, class C, bool kFolded>
Status launch_kernel(const AttentionFwdParams& params, void* workspace, int processors, cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  int device = 0;
  HSTU_TRY(cudaGetDevice(&device));
  constexpr auto kKernel = attention_fwd_kernel<C, T, kFolded>;
  using Launch = FwdLaunch<C, kKernel>;
  if (Status s = allow_shared_memory<kKernel>(device, C::kSharedBytes); !s.ok()) return s;
  const int parts = C::kHeads > 1 ? 1 : Launch::key_parts(a, device, processors);
  const int64_t items = most_items(a.jagged.total_q, a.jagged.batch, C::kRows, a.heads / C::kHeads);
  const FwdScratch scratch(a, C::kDim, workspace);
  const bool early = C::kSpans && a.jagged.total_kv <= static_cast<int64_t>(kShortTiles) * C::kCols * a.jagged.batch;
  void* const tickets = parts == 1 && items > processors ? scratch.tickets : nullptr;
  FwdArguments arguments{{},
                         {},
                         {},
                         params,
                         query_schedule(a, C::kHeads),
                         Tickets(tickets),
                         scratch.cells,
                         static_cast<float>(a.alpha) * Score<T>::kArgument,
                         early};
  // Items of several heads are long, and what they load is little for the time they take.
  widen_last_group(arguments.schedule, C::kRows, processors, C::kHeads > 1);
  const auto make = [&](CUtensorMap& map, const View& view, int64_t rows, int dim, int box) {
    return make_tensor_map(map, a.dtype, view, rows, a.heads, dim, box);
  };
  if (Status s = make(arguments.q, a.q, a.jagged.total_q, a.dim_qk, C::kRows); !s.ok()) return s;
  if (Status s = make(arguments.k, a.k, a.jagged.total_kv, a.dim_qk, C::kCols); !s.ok()) return s;
  if (Status s = make(arguments.v, a.v, a.jagged.total_kv, a.dim_v, C::kCols); !s.ok()) return s;
  Launch launch(static_cast<unsigned>(tickets ? processors : items * parts), parts, stream);
  HSTU_TRY(cudaLaunchKernelEx(&launch.config, kKernel, arguments));
  return {};
}

template <class T, class C>
Status launch_problem(const AttentionFwdParams& params, void* workspace, int processors, cudaStream_t stream) {
  // Half the range of bfloat16 is left to the products of Q scaled; float16 would lose small numbers.
  if constexpr (C::kQueryRegisters && std::is_same_v<T, __nv_bfloat16> && std::is_same_v<typename C::Bias, NoBias>) {
    int exponent;
    if (std::frexp(params.problem.alpha, &exponent) == 0.5 && exponent > -32 && exponent < 32)
      return launch_kernel<T, C, true>(params, workspace, processors, stream);
  }
  return launch_kernel<T, C, false>(params, workspace, processors, stream);
}

template <class T, int kDim>
Status attention_fwd(const AttentionFwdParams& params, void* workspace, int processors, cudaStream_t stream) {
  return launch_problem<T, FwdPlan<FwdConfig<kDim>, NoBias>>(params, workspace, processors, stream);
}

// Are there heads that share both tables, and items of them for two rounds of the processors? Never for positions
// alone: what they have in common is then less than what three warpgroups of one head gain.
template <class C>
bool may_share_bias(const AttentionProblem& a, int processors) {
  const RelativeBiasParams& r = a.relative;
  return r.time_weight && r.same_for_all_heads() && a.heads % C::kHeads == 0 &&
         most_items(a.jagged.total_q, a.jagged.batch, C::kRows, a.heads / C::kHeads) >= 2 * processors;
}

template <class T, int kDim>
Status attention_fwd_biased(const AttentionFwdParams& params, void* workspace, int processors, cudaStream_t stream) {
  if (params.problem.dense.data)
    return launch_problem<T, FwdPlan<FwdConfig<kDim>, DenseBias>>(params, workspace, processors, stream);
  if constexpr (kDim <= 128) {
    using Heads = FwdPlan<FwdHeadsConfig<kDim>, RelativeBias>;
    if (may_share_bias<Heads>(params.problem, processors))
      return launch_problem<T, Heads>(params, workspace, processors, stream);
  }
  if constexpr (kDim == 256) {
    if (fwd_has_wide_cells(params.problem, kDim))
      return launch_problem<T, FwdPlan<FwdConfig<kDim>, ManyBucketsBias>>(params, workspace, processors, stream);
  }
  return launch_problem<T, FwdPlan<FwdConfig<kDim>, RelativeBias>>(params, workspace, processors, stream);
}

}  // namespace hstu_ops::cuda::sm90
