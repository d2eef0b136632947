// Gradient of a dense bias with Hopper's copy engine and asynchronous tensor cores.
//
// A block of threads takes tile after tile of the gradient, 64 x 64 of one of its matrices, and adds up dS over the
// sequences and heads that share the matrix, whose scores it computes again; two warpgroups take them by turns. What
// the tile has alone, the bias and the sums, stays in registers. Every element is written once, zeros included, in a
// fixed order. But where tiles are too few to keep all processors busy, and no order is asked for, the sequences of
// each are cut into parts, whose sums are added in global memory.
//
//   load     | Q0 K0, dO0 V0 | Q1 K1, dO1 V1 | ...           (a step: one sequence and head)
//   first    |  S0 = Q0 K0^T, dP0 = dO0 V0^T | dS0 | S2, dP2 | dS2 | ... | sum of both, to global memory
//   second   |            S1, dP1                | dS1 | ...
//
// Barriers, each with the arrivals that complete it:
//
//   step_full    the loading lane, when both pairs of operands have been requested
//                                             step_empty   each warp of the step's warpgroup
//   pair_full    the loading lane, the bytes  pair_empty   each warp of the step's warpgroup
//   kSumFull     the second warpgroup         kSumEmpty    the first one (named barriers)
#pragma once

#include "cuda/ptx/named_barrier.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/gate.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/ring.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/sm90/tickets.h"
#include "cuda/tile/bias.h"
#include "cuda/tile/score.h"
#include "cuda/tile/walk.h"

namespace hstu_ops::cuda::sm90 {

template <int kDim_>
struct DenseGradsConfig {
  static constexpr int kDim = kDim_, kTile = 64, kGroups = 2, kThreads = 128 * (kGroups + 1), kPanels = kDim / kPanel;
  static constexpr int kTileBytes = kTile * kDim * 2;
  static constexpr int kStages = kDim == 64 ? 10 : kDim == 128 ? 6 : 3;  // pairs of operands in flight
  static constexpr int kSteps = 8;                                       // in flight
  static constexpr int kSumBytes = kTile * kTile * 4;
  static constexpr int kSharedBytes = 2 * kStages * kTileBytes + kSumBytes + 1024;
  static constexpr int kLoadRegisters = 56, kComputeRegisters = 224;
  static_assert(kSharedBytes + 4096 <= kSharedMemory, "barriers and steps take 4 KB");
};

// Tile `row`, `col` of a matrix, and the part of the sequences and heads that share it.
struct DenseTile {
  int row, col, matrix, part;
};

struct DenseGradsArguments {
  CUtensorMap q, k, v, grad_out;
  AttentionBwdParams params;
  Tickets tickets;
  int tiles, parts;  // tiles of 64 in a row or column of a matrix; parts of each
  int64_t items;
  float alpha;  // times the argument of SiLU

  __device__ DenseTile tile(int64_t item) const {
    // Rows in order: the first are those of most sequences. Parts of a tile one after the other.
    const int64_t at = item / parts, square = int64_t{tiles} * tiles;
    const int inside = static_cast<int>(at % square);
    return {inside / tiles * 64, inside % tiles * 64, static_cast<int>(at / square), static_cast<int>(item % parts)};
  }
};

// What a warpgroup does next.
struct DenseStep {
  enum Kind {
    kAdd,   // the dS of a sequence and head
    kSkip,  // nothing: each tile begins with the first warpgroup, or its sums would depend on the tiles before
    kLast,  // end the tile; each warpgroup has such a step
    kDone,  // leave; likewise
  } kind;
  DenseTile tile;
  int index, head;  // of the sequence
  bool covered;     // all of the tile is kept
  Sequence sequence;
  Count pair;  // its first: Q and K
};

template <class C>
struct DenseGradsState {
  Gate<C::kSteps> step;
  Gate<C::kStages> pair;
  DenseStep steps[C::kSteps];

  __device__ void init() {
    step.init(1, 4), pair.init(1, 4);
    ptx::fence_mbarrier_init();
  }
};

template <class C>
struct DenseGradsStorage {
  DenseGradsState<C>& state;
  uint32_t base;

  __device__ DenseGradsStorage(DenseGradsState<C>& state, const unsigned char* memory) : state(state) {
    base = (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u;
  }
  // Q or dO of a pair; K or V are behind it.
  __device__ uint32_t pair(Count at) const { return base + at.stage<C::kStages>() * (2 * C::kTileBytes); }
  __device__ uint32_t sums() const { return base + 2 * C::kStages * C::kTileBytes; }
};

// ---- the loading warp ----

template <class C>
struct DenseGradsLoader {
  const DenseGradsArguments& arguments;
  const DenseGradsStorage<C>& shared;
  Count steps, pairs;  // so far

  __device__ DenseStep& step() const { return shared.state.steps[steps.stage<C::kSteps>()]; }

  // A pair of operands.
  __device__ void load(const CUtensorMap& left, const CUtensorMap& right) {
    Gate<C::kStages>& gate = shared.state.pair;
    const int stage = pairs.stage<C::kStages>();
    gate.empty[stage].wait(pairs.round<C::kStages>() ^ 1);
    if (lane_id() == 0) {
      const DenseStep& at = step();
      const int row = static_cast<int>(at.sequence.begin_q) + at.tile.row - at.sequence.first_row,
                col = static_cast<int>(at.sequence.begin_kv) + at.tile.col;
      gate.full[stage].arrive_expect_tx(2 * C::kTileBytes);
      for (int p = 0; p < C::kPanels; ++p) {
        const uint32_t to = shared.pair(pairs) + p * C::kTile * 128;
        ptx::tma_load_3d(to, left, gate.full[stage], p * kPanel, at.head, row);
        ptx::tma_load_3d(to + C::kTileBytes, right, gate.full[stage], p * kPanel, at.head, col);
      }
    }
    pairs.next();
  }
  // `mine`: this lane has the step. A step is told of when its pairs' places have been given back: a warpgroup that
  // waited for a pair before could take the end of an earlier use for that of its own.
  __device__ __forceinline__ void put_step(bool mine, const DenseStep& what) {
    Gate<C::kSteps>& gate = shared.state.step;
    const int stage = steps.stage<C::kSteps>();
    gate.empty[stage].wait(steps.round<C::kSteps>() ^ 1);
    if (mine) step() = what, step().pair = pairs;
    __syncwarp();
    if (what.kind == DenseStep::kAdd) load(arguments.q, arguments.k), load(arguments.grad_out, arguments.v);
    __syncwarp();
    if (lane_id() == 0) gate.full[stage].arrive();
    steps.next();
  }

  // Sequences [begin, end), 32 at once, a lane each.
  __device__ __forceinline__ void load_tile(const DenseTile& tile) {
    const AttentionProblem& a = arguments.params.problem;
    const int own_heads = a.dense.head_stride ? a.heads : 1;
    int begin = tile.matrix / own_heads, end = begin + 1;
    if (a.dense.batch_stride == 0) {
      const int each = ceil_div(a.jagged.batch, arguments.parts);
      begin = tile.part * each, end = min_int(begin + each, a.jagged.batch);
    }
    const int head = a.dense.head_stride ? tile.matrix % own_heads : 0, heads = a.dense.head_stride ? 1 : a.heads;
#pragma unroll 1
    for (int first = begin; first < end; first += 32) {
      DenseStep mine = {DenseStep::kAdd, tile, first + lane_id(), head, false, {}, {}};
      bool kept = false;
      if (mine.index < end) {
        mine.sequence = load_sequence(a.jagged, a.mask, mine.index);
        const Sequence& s = mine.sequence;
        const int end_row = tile.row + C::kTile, end_col = tile.col + C::kTile, rows = s.first_row + s.num_q;
        kept = s.mask.touches(max_int(tile.row, s.first_row), min_int(end_row, rows), tile.col,
                              min_int(end_col, s.mask.len));
        mine.covered =
            tile.row >= s.first_row && end_row <= rows && s.mask.covers(tile.row, end_row, tile.col, end_col);
      }
#pragma unroll 1
      for (unsigned left = __ballot_sync(~0u, kept); left != 0; left &= left - 1)
#pragma unroll 1
        for (int h = head; h < head + heads; ++h) {
          mine.head = h;
          put_step(lane_id() == __ffs(left) - 1, mine);
        }
    }
    while (steps.count % C::kGroups != 0) put_step(lane_id() == 0, {DenseStep::kSkip});
    put_each(DenseStep::kLast, tile);
  }
  __device__ __forceinline__ void put_each(DenseStep::Kind kind, const DenseTile& tile) {
    for (int g = 0; g < C::kGroups; ++g) put_step(lane_id() == 0, {kind, tile});
  }

  __device__ void run() {
#pragma unroll 1
    for (int64_t item = arguments.tickets.take(true); item < arguments.items; item = arguments.tickets.take(false))
      load_tile(arguments.tile(item));
    put_each(DenseStep::kDone, {});
    if (lane_id() == 0) arguments.tickets.close();
  }
};

// ---- a computing warpgroup ----

template <class C, class T>
struct DenseGradsComputer {
  using Scores = float[C::kTile / 2];
  using Tile = Accumulator<1, C::kTile / 8>;  // the scores again: 16 queries, 64 keys a warp

  const DenseGradsArguments& arguments;
  const DenseGradsStorage<C>& shared;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // the shuffle tells the compiler that it is uniform
  Count steps;                                                   // of both warpgroups

  __device__ int thread() const { return threadIdx.x % 128; }
  __device__ int warp_row() const { return thread() / 32 * 16; }
  __device__ const DenseStep& step() const { return shared.state.steps[steps.stage<C::kSteps>()]; }
  // Of the next step, when it is known.
  __device__ DenseStep::Kind kind() const {
    shared.state.step.full[steps.stage<C::kSteps>()].wait(steps.round<C::kSteps>());
    return step().kind;
  }
  __device__ static void release(ptx::Mbarrier& empty) {
    __syncwarp();
    if (lane_id() == 0) empty.arrive();
  }
  __device__ void finish_step() {
    release(shared.state.step.empty[steps.stage<C::kSteps>()]);
    steps.count += C::kGroups;
  }
  __device__ const AttentionProblem& problem() const { return arguments.params.problem; }

  // S = Q K^T or dP = dO V^T, begun.
  __device__ __forceinline__ void multiply_pair(Count pair, Scores& s) const {
    shared.state.pair.full[pair.stage<C::kStages>()].wait(pair.round<C::kStages>());
    const ptx::Descriptor a(shared.pair(pair)), b(shared.pair(pair) + C::kTileBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      const int at = k / 4 * C::kTile * 128 + k % 4 * 32;
      ptx::Wgmma<C::kTile, T>::multiply_rows(s, a.at(at), b.at(at), k > 0);
    }
    ptx::wgmma_commit();
  }

  // Times the argument of SiLU.
  __device__ __forceinline__ void load_bias(Tile& bias) const {
    const DenseTile& tile = step().tile;
    const DenseBiasParams& p = problem().dense;
    const int own_heads = p.head_stride ? problem().heads : 1;
    const DenseBias from(p, tile.matrix / own_heads, tile.matrix % own_heads);
    const int i = tile.row + warp_row() + lane_row(), j = tile.col + lane_col();
    const float* corner = from.data + i * from.row_stride + j;
    bias.each([&](float& x, int row, int col) {
      const bool inside = i + row < from.size && j + col < from.size;
      x = Score<T>::kArgument * ptx::ld_global_if(inside, corner + row * from.row_stride + col);
    });
  }

  // Which columns of the tile row `lane` of this warp keeps.
  __device__ __forceinline__ uint64_t keep_bits() const {
    const Sequence& s = step().sequence;
    const int row = step().tile.row + warp_row() + lane_id(), query = row - s.first_row;
    return query >= 0 && query < s.num_q ? row_bits(s.mask, row, step().tile.col) : 0;
  }

  // Adds a step's dS.
  __device__ __forceinline__ void add(const Tile& bias, Tile& sum) const {
    Scores s, d;
    Tile &u = reinterpret_cast<Tile&>(s), &ds = reinterpret_cast<Tile&>(d);
    const Count queries = step().pair, grads = {queries.count + 1};
    multiply_pair(queries, s);
    multiply_pair(grads, d);
    const bool covered = __shfl_sync(~0u, step().covered, 0);  // uniform, as the compiler then knows
    const uint64_t keep = covered ? 0 : keep_bits();
    ptx::wgmma_wait<1>();
    ptx::wgmma_settle(s);
    release(shared.state.pair.empty[queries.stage<C::kStages>()]);
#pragma unroll
    for (int n = 0; n < C::kTile / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) u.x[0][n][e] = fmaf(u.x[0][n][e], arguments.alpha, bias.x[0][n][e]);
    Score<T>::slope(u);
    const Sequence& sequence = step().sequence;
    const RowScale scale(problem().scale, step().index, sequence.begin_q);
    const int query = step().tile.row + warp_row() + lane_row() - sequence.first_row;
    float factors[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = query + h * 8;
      factors[h] = at >= 0 && at < sequence.num_q ? Score<T>::kSlope * scale(at) : 0.f;
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(d);
    release(shared.state.pair.empty[grads.stage<C::kStages>()]);
#pragma unroll
    for (int i = 0; i < C::kTile / 2; ++i) d[i] = fmaf(d[i], s[i], d[i]);
    if (!covered) mask_rows(keep, ds);
#pragma unroll
    for (int n = 0; n < C::kTile / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.x[0][n][e] = fmaf(ds.x[0][n][e], factors[e / 2], sum.x[0][n][e]);
  }

  // Named barriers, and the threads that meet there.
  static constexpr int kSumFull = 1, kSumEmpty = 2, kBoth = 128 * C::kGroups;

  // The second warpgroup's sums through shared memory to the first, which writes.
  __device__ __forceinline__ void finish(Tile& sum) const {
    const uint32_t slot = shared.sums() + thread() * 16;
    if (group == 1) {
      ptx::named_barrier_sync(kSumEmpty, kBoth);
#pragma unroll
      for (int n = 0; n < C::kTile / 8; ++n) {
        const float(&x)[4] = sum.x[0][n];
        ptx::st_shared(slot + n * 2048, make_float4(x[0], x[1], x[2], x[3]));
      }
      ptx::named_barrier_arrive(kSumFull, kBoth);
      return;
    }
    ptx::named_barrier_sync(kSumFull, kBoth);
#pragma unroll
    for (int n = 0; n < C::kTile / 8; ++n) {
      const float4 y = ptx::ld_shared_v4(slot + n * 2048);
      float(&x)[4] = sum.x[0][n];
      x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
    }
    ptx::named_barrier_arrive(kSumEmpty, kBoth);
    store(sum);
  }
  __device__ __forceinline__ void store(const Tile& sum) const {
    const DenseTile& tile = step().tile;
    const int size = problem().dense.size, i = tile.row + warp_row() + lane_row(), j = tile.col + lane_col();
    float* corner =
        static_cast<float*>(arguments.params.grad_bias) + (static_cast<int64_t>(tile.matrix) * size + i) * size + j;
    const bool parts = arguments.parts > 1;
    sum.each([&](float x, int row, int col) {
      if (i + row >= size || j + col >= size) return;
      float* to = corner + static_cast<int64_t>(row) * size + col;
      if (parts) {
        if (x != 0.f) atomicAdd(to, x);
      } else {
        *to = x;
      }
    });
  }

  __device__ void run() {
    if (group == 0) ptx::named_barrier_arrive(kSumEmpty, kBoth);
    steps.count = static_cast<unsigned>(group);
#pragma unroll 1
    for (;;) {
      Tile bias, sum;
      sum.clear();
      bool first = true;
#pragma unroll 1
      for (; kind() == DenseStep::kAdd; finish_step(), first = false) {
        if (first) load_bias(bias);
        add(bias, sum);
      }
      if (kind() == DenseStep::kSkip) finish_step();
      if (kind() == DenseStep::kDone) break;
      finish(sum);
      finish_step();
    }
    if (group == 1) ptx::named_barrier_sync(kSumEmpty, kBoth);  // the last one's
  }
};

// ---- kernel and launch ----

template <class C, class T>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_dense_grads_kernel(const __grid_constant__ DenseGradsArguments arguments) {
  extern __shared__ unsigned char memory[];
  __shared__ DenseGradsState<C> state;
  const DenseGradsStorage<C> shared(state, memory);
  if (threadIdx.x == 0) {
    state.init();
    if (blockIdx.x == 0) arguments.tickets.open();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::set_max_registers_down<C::kLoadRegisters>();
    if (threadIdx.x < 32) DenseGradsLoader<C>{arguments, shared, {}, {}}.run();
  } else {
    ptx::set_max_registers_up<C::kComputeRegisters>();
    DenseGradsComputer<C, T>{arguments, shared}.run();
  }
}

// `tickets`: see tickets.h.
template <class T, int kDim>
Status attention_dense_grads(const AttentionBwdParams& params, void* tickets, int processors, cudaStream_t stream) {
  using C = DenseGradsConfig<kDim>;
  const AttentionProblem& a = params.problem;
  const int64_t matrices = int64_t{a.dense.batch_stride ? a.jagged.batch : 1} * (a.dense.head_stride ? a.heads : 1);
  const int tiles = ceil_div(a.dense.size, C::kTile);
  int64_t items = matrices * tiles * tiles;
  if (items == 0) return {};
  // Few tiles, many sequences: a causal mask keeps half of the tiles, and each processor should get several items.
  int parts = 1;
  if (!params.deterministic && a.dense.batch_stride == 0)
    while (parts * 4 <= a.jagged.batch && items * parts < 16 * processors) parts *= 2;
  items *= parts;
  if (items > INT32_MAX) return {"the gradient of a dense bias of this size needs more than 2^31 blocks of 64 x 64"};
  static_assert(Score<T>::kArgument == Score<T>::kSlope, "alpha is folded as the backward folds it");
  DenseGradsArguments arguments{
      {}, {}, {}, {}, params, Tickets(tickets), tiles, parts, items, static_cast<float>(a.alpha) * Score<T>::kArgument};
  if (Status s = make_tensor_maps(arguments, params, C::kTile, C::kTile); !s.ok()) return s;
  if (parts > 1)
    HSTU_TRY(cudaMemsetAsync(params.grad_bias, 0, sizeof(float) * matrices * a.dense.size * a.dense.size, stream));
  return launch<attention_dense_grads_kernel<C, T>>(arguments, items < processors ? items : processors, C::kThreads,
                                                    C::kSharedBytes, stream);
}

}  // namespace hstu_ops::cuda::sm90
