// Attention backward with the instructions of sm_80: one kernel for dQ, dK, dV and the gradients of bias tables.
//
// A block of threads owns kKeys keys of one head, each warp 16 * kM of them with their dK and dV in registers, and
// walks tiles of queries. Scores are computed transposed, S' = K Q' and dP' = V dO', so that P' and dS' are left
// operands of dV += P' dO and dK += dS' Q without leaving the registers; only dQ = dS K needs dS in shared memory:
//
//   S', dP', P', dS' | dV += P' dO | dK += dS' Q | dS' to buffer i | barrier | request tile i + 2 | dQ = dS K, added in
//   global memory (fp32)
//
// One barrier a tile: behind it dS' is complete, the next tile has arrived, and this tile's buffers are free.
//
// Where a warp cannot hold its share of dK and dV (kExchange), warps share keys and P' goes through shared memory as
// well:
//
//   S', dP', P', dS' to buffers | barrier | request tile i + 1 | dV += P' dO | dQ = dS K | dK += dS' Q | wait, barrier
//
// Of two warps that share keys each may keep its half of P' and dS' in registers as well (kKeepsStep).
#pragma once

#include "core/launch.h"
#include "cuda/errors.h"
#include "cuda/sm80/bwd_storage.h"
#include "cuda/sm80/config.h"
#include "cuda/sm80/dense_bias_grad.cuh"
#include "cuda/sm80/finish.cuh"
#include "cuda/sm80/sums.cuh"
#include "cuda/tile/bias.h"
#include "cuda/tile/load.h"
#include "cuda/tile/product.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/score.h"
#include "cuda/tile/turns.h"
#include "cuda/tile/walk.h"
#include "cuda/tile/workspace.h"

namespace hstu_ops::cuda::sm80 {

template <class C, class Bias>
struct BwdTile {
  using Config = C;
  using T = typename C::T;
  using Scores = Accumulator<C::kM, C::kStep / 8>;

  const BwdArguments& arguments;
  const BwdItem<T>& job;
  const BwdStorage<C>& shared;
  Accumulator<C::kM, C::kOwnDim / 8> dk, dv;

  __device__ BwdTile(const BwdArguments& arguments, const BwdItem<T>& job, const BwdStorage<C>& shared)
      : arguments(arguments), job(job), shared(shared) {}

  __device__ const AttentionProblem& problem() const { return arguments.params.problem; }
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int warp_key() { return warp() % C::kKeyWarps * C::kWarpKeys; }
  __device__ static int own_col() { return warp() / C::kKeyWarps * C::kOwnDim; }
  __device__ int first() const { return job.item.block * C::kKeys; }
  __device__ RowScale scale() const { return RowScale(problem().scale, job.item.sequence, job.sequence.begin_q); }
  __device__ BiasGradients tables() const {
    return {arguments.workspace.tables.position, arguments.workspace.tables.time, job.item.head,
            Score<T>::kSlope * job.factor};
  }

  __device__ __forceinline__ void load_keys() const {
    const AttentionProblem& a = problem();
    load_tile<C::kKeys, C::kThreads>(shared.k, GlobalRows<T>(a.k, job.sequence.begin_kv, job.item.head, a.dim_qk),
                                     first(), job.sequence.mask.len);
    load_tile<C::kKeys, C::kThreads>(shared.v, GlobalRows<T>(a.v, job.sequence.begin_kv, job.item.head, a.dim_v),
                                     first(), job.sequence.mask.len);
  }

  __device__ static GlobalRows<T> query_rows(const AttentionBwdParams& p, const Job& job) {
    return {p.problem.q, job.sequence.begin_q, job.item.head, p.problem.dim_qk};
  }
  __device__ static GlobalRows<T> grad_rows(const AttentionBwdParams& p, const Job& job) {
    return {p.grad_out, job.sequence.begin_q, job.item.head, p.problem.dim_v};
  }
  __device__ __forceinline__ void load_queries(int tile, int stage) const {
    const auto q = shared.q.stage(stage, C::kQueries), g = shared.g.stage(stage, C::kQueries);
    const int first = tile * C::kQueries;
    load_pair<C::kQueries, C::kThreads>(q, g, job.queries, first, [&] {
      load_tile<C::kQueries, C::kThreads>(q, query_rows(arguments.params, job), first, job.sequence.num_q);
      load_tile<C::kQueries, C::kThreads>(g, grad_rows(arguments.params, job), first, job.sequence.num_q);
    });
  }

  __device__ Classes classify(int tile) const {
    const Mask& mask = job.sequence.mask;
    const int m0 = job.sequence.first_row + tile * C::kQueries, m1 = m0 + C::kQueries;
    const int n0 = first(), n1 = min_int(n0 + C::kKeys, mask.len), w0 = n0 + warp_key(), w1 = w0 + C::kWarpKeys;
    return {mask.touches(m0, m1, n0, n1), mask.touches(m0, m1, w0, min_int(w1, mask.len)), mask.covers(m0, m1, w0, w1)};
  }

  __device__ __forceinline__ void prepare(const Bias& bias, int tile) const {
    bias.template prepare<true, C::kWarpKeys, C::kStep>(
        warp(), {job.sequence.first_row + tile * C::kQueries, first() + warp_key()}, tile * C::kQueries / C::kStep);
  }

  // Words of a warp's own part of dS' before it is written: scratch for its bias.
  struct ScoreSlots {
    static constexpr int kRowWords = C::kStep * static_cast<int>(sizeof(T)) / 4;
    static constexpr int kCount = C::kWarpKeys * kRowWords / (kIs16Bit<T> ? 1 : 2);
    static_assert(kCount >= 64, "a tile of the logarithm's 128 buckets");

    SmemTile<T, C::kQueries> ds;
    int row, chunk;

    __device__ uint32_t at(unsigned i) const {
      return ds.at(row + i / kRowWords, chunk + i % kRowWords / 4) + i % 4 * 4;
    }
  };
  __device__ __forceinline__ ScoreSlots slots(int stage, int step) const {
    return {shared.ds.stage(C::kExchange ? 0 : stage, C::kKeys), warp_key(), step * static_cast<int>(sizeof(T)) / 16};
  }

  using BiasTile = typename Bias::template Tile<true, C::kM, C::kStep / 8>;

  __device__ __forceinline__ BiasTile bias_tile(const Bias& bias, int tile, int step) const {
    const int query = tile * C::kQueries + step;
    return {bias, warp(), {job.sequence.first_row + query, first() + warp_key()}, query / C::kStep};
  }

  // f(whether rows may have scales of their own), as a constant where products follow and the code is short enough to
  // be there twice.
  template <class F>
  __device__ __forceinline__ void by_scale(F&& f) const {
    if (!std::is_same_v<Bias, NoBias> || C::kExchange || problem().scale.per_row) {
      f(std::true_type{});
    } else {
      f(std::false_type{});
    }
  }

  // P' and dS' of queries [step, step + kStep) of a tile and this warp's keys.
  template <bool kRowScale>
  __device__ __forceinline__ void score(const BiasTile& bias, const TileState& at, int stage, int step,
                                        const ScoreSlots& slots, Scores& p, Scores& ds) const {
    const int row = job.sequence.first_row + at.tile() * C::kQueries + step, col = first() + warp_key();
    multiply_rows<T, C::kDim>(p, shared.k, warp_key(), shared.q.stage(stage, C::kQueries), step);
    const float factor = arguments.alpha * Score<T>::kArgument;
    if constexpr (std::is_same_v<Bias, RelativeBias> && kIs16Bit<T>) {
      bias.add(p, factor, Score<T>::kArgument, slots);
    } else {
      bias.add(p, factor, Score<T>::kArgument);
    }
    multiply_rows<T, C::kDim>(ds, shared.v, warp_key(), shared.g.stage(stage, C::kQueries), step);
    // Of 0 and 0 come 0 and 0. Where products follow, SiLU and they are one run of instructions behind this branch.
    constexpr bool kMaskFirst = !C::kExchange && std::is_same_v<Bias, NoBias>;
    const auto mask = [&] {
      if (!at.covered()) mask_columns(job.sequence.mask, row, job.sequence.mask.len, col, p, ds);
    };
    if (kMaskFirst) mask();
    Score<T>::differentiate(p, ds);
    if (!kMaskFirst) mask();
    if (kRowScale) apply_row_scale(at.tile() * C::kQueries + step, p, ds);
  }

  // One step of a tile out of registers: dV, dK, and dS' into shared memory.
  template <bool kRowScale>
  __device__ __forceinline__ void compute(const Bias& bias, typename Bias::GradState& state, const TileState& at,
                                          int stage, int step) {
    Scores s, d;
    const BiasTile offsets = bias_tile(bias, at.tile(), step);
    const ScoreSlots scratch = slots(stage, step);
    score<kRowScale>(offsets, at, stage, step, scratch, s, d);
    multiply_fragment<T>(dv, Fragment<T, C::kM, C::kStep / 8>(s), shared.g.stage(stage, C::kQueries), step, 0);
    offsets.template add_grad<T>(d, tables(), state, scratch);
    const Fragment<T, C::kM, C::kStep / 8> f(d);
    put_accumulator<T>(shared.ds.stage(stage, C::kKeys), warp_key(), step, d, [](int) { return 1.f; });
    multiply_fragment<T>(dk, f, shared.q.stage(stage, C::kQueries), step, 0);
  }

  // A step of P' and dS', as operands.
  using Operand = Fragment<T, C::kM, C::kStep / 8>;
  struct Step {
    Operand p, ds;
  };
  __device__ static int own_step() { return warp() / C::kKeyWarps * C::kStep; }

  // This warp's step, also into shared memory.
  template <bool kRowScale>
  __device__ __forceinline__ Step exchange(const Bias& bias, typename Bias::GradState& state, const TileState& at,
                                           int stage) const {
    const int step = own_step();
    Scores s, d;
    prepare(bias, at.tile());
    const BiasTile offsets = bias_tile(bias, at.tile(), step);
    const ScoreSlots scratch = slots(stage, step);
    score<kRowScale>(offsets, at, stage, step, scratch, s, d);
    put_accumulator<T>(shared.ds.stage(1, C::kKeys), warp_key(), step, s, [](int) { return 1.f; });
    offsets.template add_grad<T>(d, tables(), state, scratch);
    put_accumulator<T>(shared.ds, warp_key(), step, d, [](int) { return 1.f; });
    return {Operand(s), Operand(d)};
  }

  __device__ __forceinline__ void apply_row_scale(int query, Scores& s, Scores& d) const {
    const RowScale scale = this->scale();
    if (!scale.values) return;
#pragma unroll
    for (int n = 0; n < C::kStep / 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int at = query + n * 8 + lane_col() + c;
        const float f = at < job.sequence.num_q ? scale(at) : 0.f;
#pragma unroll
        for (int m = 0; m < C::kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            s.x[m][n][2 * h + c] *= f;
            d.x[m][n][2 * h + c] *= f;
          }
      }
  }

  // This warp keeps nothing of the tile, but its rows of dS' are read.
  __device__ __forceinline__ void clear_ds(int stage) const {
    Accumulator<C::kM, C::kQueries / 8> zero;
    zero.clear();
    put_accumulator<T>(shared.ds.stage(stage, C::kKeys), warp_key(), 0, zero, [](int) { return 0.f; });
  }

  // This warp's part of dQ, in steps of up to 32 sums a lane: dK and dV take most of the registers.
  static constexpr int kSumCols = C::kQueryM * C::kQueryDim / 2 > 32 ? 32 / (C::kQueryM * 4) : C::kQueryDim / 8;
  using QuerySums = Accumulator<C::kQueryM, kSumCols>;

  __device__ static int query_row() { return warp() / C::kQueryCols * 16 * C::kQueryM; }
  __device__ static int query_part() { return warp() % C::kQueryCols; }
  __device__ __forceinline__ QuerySums multiply_dq(int stage, int col) const {
    QuerySums dq;
    multiply_columns<T, C::kKeys>(dq, shared.ds.stage(stage, C::kKeys), query_row(), shared.k,
                                  query_part() * C::kQueryDim + col);
    return dq;
  }
  __device__ __forceinline__ SumRows<C::kQueryDim> sum_rows(int tile) const {
    const int query = tile * C::kQueries + query_row();
    return {job.sums + query_part() * job.sums_stride + static_cast<int64_t>(query) * C::kQueryDim,
            job.sequence.num_q - query, arguments.alpha * Score<T>::kSlope * job.factor};
  }
  __device__ __forceinline__ void add_dq(int tile, int stage) const {
    const auto sums = sum_rows(tile);
#pragma unroll 1
    for (int col = 0; col < C::kQueryDim; col += kSumCols * 8) {
      const QuerySums dq = multiply_dq(stage, col);
#pragma unroll
      for (int part = 0; part < C::kQueryM * kSumCols; ++part) sums.add(dq, part, col);
    }
  }

  // What a complete tile of dS' is for.
  __device__ __forceinline__ void finish_tile(int tile, int stage) const {
    if (!job.ordered) {
      add_dq(tile, stage);
      return;
    }
    const Turn turn(arguments.workspace.turns, job, tile, C::kQueries, C::kKeys, problem());
    turn.wait();
    add_dq(tile, stage);
    turn.pass();
  }

  // dQ before dK: additions, a few after each step of dK, do not keep operands waiting as all at once do. (With two
  // blocks an SM those of one fall into products of the other.)
  static constexpr int kParts = C::kQueryM * kSumCols * 16 / C::kQueries;  // a step
  static constexpr bool kSpread = C::kExchange && C::kBlocks == 1 && kIs16Bit<T> && kSumCols * 8 == C::kQueryDim &&
                                  kParts * C::kQueries == C::kQueryM * kSumCols * 16;
  // Is a warp's own step of P' and dS' not read back? Neither a bias nor 256 dimensions leave registers for that.
  static constexpr bool kKeepsStep = kSpread && C::kSplit == 2 && C::kDim <= 128 && std::is_same_v<Bias, NoBias>;

  // P' dO or dS' Q, added to `to`; after each step of 16 queries comes between(step). kKeeps: `own` is this warp's
  // step.
  template <bool kKeeps, class Sums, class Tile, class Rows, class Between>
  __device__ __forceinline__ void multiply_scores(Sums& to, const Operand& own, const Tile& scores, const Rows& right,
                                                  Between&& between) const {
    if constexpr (kKeeps) {
      multiply_fragment<T>(to, own, right, own_step(), own_col(), between);
      const auto behind = [&](int step) { between(C::kStep / 16 + step); };
      multiply_tiles<T, C::kStep>(to, scores, warp_key(), right, own_col(), behind, C::kStep - own_step());
    } else {
      multiply_tiles<T, C::kQueries>(to, scores, warp_key(), right, own_col(), between);
    }
  }
  template <bool kKeeps>
  __device__ __forceinline__ void multiply_dv(int stage, const Step& own) {
    multiply_scores<kKeeps>(dv, own.p, shared.ds.stage(1, C::kKeys), shared.g.stage(stage, C::kQueries), Nothing{});
  }
  template <bool kKeeps, class Between>
  __device__ __forceinline__ void multiply_dk(int stage, const Step& own, Between&& between) {
    multiply_scores<kKeeps>(dk, own.ds, shared.ds, shared.q.stage(stage, C::kQueries), between);
  }
  __device__ __forceinline__ void multiply_spread(int tile, int stage, const Step& own) {
    multiply_dv<kKeepsStep>(stage, own);
    const auto sums = sum_rows(tile);
    const QuerySums dq = multiply_dq(0, 0);
    multiply_dk<kKeepsStep>(stage, own, [&](int step) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) sums.add(dq, step * kParts + i);
    });
  }

  template <class Walk>
  __device__ __forceinline__ void run_registers(const Bias& bias, typename Bias::GradState& state, Walk& walk,
                                                TileState current) {
    TileState next = current.exists() ? walk.next() : current;
    if (next.exists()) load_queries(next.tile(), 1);
    ptx::cp_async_commit();
#pragma unroll 1
    for (int stage = 0; current.exists(); stage ^= 1) {
      if (current.mine()) {
        prepare(bias, current.tile());
        by_scale([&](auto per_row) {
#pragma unroll 1
          for (int step = 0; step < C::kQueries; step += C::kStep)
            compute<decltype(per_row)::value>(bias, state, current, stage, step);
        });
      } else {
        clear_ds(stage);
      }
      ptx::cp_async_wait<0>();
      __syncthreads();  // dS' is complete, the next tile has arrived, this tile's Q and dO are free
      const TileState after = next.exists() ? walk.next() : next;
      if (after.exists()) load_queries(after.tile(), stage);
      ptx::cp_async_commit();
      finish_tile(current.tile(), stage);
      current = next;
      next = after;
    }
  }

  template <class Walk>
  __device__ __forceinline__ void run_exchange(const Bias& bias, typename Bias::GradState& state, Walk& walk,
                                               TileState current) {
    constexpr int kOther = C::kStages - 1;
#pragma unroll 1
    for (int stage = 0; current.exists(); stage ^= kOther) {
      Step own = {};
      if (current.mine()) {
        by_scale([&](auto per_row) { own = exchange<decltype(per_row)::value>(bias, state, current, stage); });
      } else if (own_col() == 0) {
        clear_ds(0);
      }
      __syncthreads();  // P' and dS' are complete; the other stage is free
      const TileState next = walk.next();
      if (C::kStages == 2 && next.exists()) load_queries(next.tile(), stage ^ kOther);
      ptx::cp_async_commit();
      if (kSpread && current.mine() && !job.ordered) {
        multiply_spread(current.tile(), stage, own);
      } else {
        if (current.mine()) {
          multiply_dv<false>(stage, own);
          multiply_dk<false>(stage, own, Nothing{});
        }
        finish_tile(current.tile(), 0);
      }
      if (C::kStages == 1 && next.exists()) {
        __syncthreads();  // this tile's Q and dO are free
        load_queries(next.tile(), 0);
        ptx::cp_async_commit();
      }
      ptx::cp_async_wait<0>();
      __syncthreads();  // the next tile has arrived; P' and dS' are free
      current = next;
    }
  }

  __device__ __forceinline__ void run() {
    const Bias& bias = *static_cast<const Bias*>(shared.bias);  // there, it costs no registers
    const auto classes = [&](int tile) { return classify(tile); };
    TileWalk<!std::is_same_v<Bias, NoBias>, decltype(classes)> walk(ceil_div(job.sequence.num_q, C::kQueries), classes);
    load_keys();
    const TileState current = walk.next();
    if (current.exists()) load_queries(current.tile(), 0);
    ptx::cp_async_commit();
    Bias::template make<true>(problem(), job, shared.bias, ptx::thread_index(), C::kThreads);
    dk.clear();
    dv.clear();
    typename Bias::GradState state;
    ptx::cp_async_wait<0>();
    __syncthreads();
    if constexpr (C::kExchange) {
      run_exchange(bias, state, walk, current);
    } else {
      run_registers(bias, state, walk, current);
    }
    state.finish(tables());
  }

  __device__ __forceinline__ void store() const {
    const AttentionProblem& a = problem();
    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody reads K and V any more
    const float fv = job.factor, fk = fv * arguments.alpha * Score<T>::kSlope;
    put_accumulator<T>(shared.k, warp_key(), own_col(), dk, [=](int) { return fk; });
    put_accumulator<T>(shared.v, warp_key(), own_col(), dv, [=](int) { return fv; });
    __syncthreads();
    const AttentionBwdParams& p = arguments.params;
    const int len = job.sequence.mask.len;
    store_tile<C::kKeys, C::kThreads>(shared.k, 0,
                                      GlobalRows<T>(p.grad_k, job.sequence.begin_kv, job.item.head, a.dim_qk), first(),
                                      len, ptx::thread_index());
    store_tile<C::kKeys, C::kThreads>(shared.v, 0,
                                      GlobalRows<T>(p.grad_v, job.sequence.begin_kv, job.item.head, a.dim_v), first(),
                                      len, ptx::thread_index());
  }
};

// By one thread, when the sequence is there.
template <class Tile, class Item>
__device__ __forceinline__ void set_item(Item& job, const BwdArguments& arguments) {
  using C = typename Tile::Config;
  const AttentionBwdParams& p = arguments.params;
  job.queries.set(Tile::query_rows(p, job), Tile::grad_rows(p, job), job.sequence.num_q, C::kDim);
  job.sums_stride = p.problem.jagged.total_q * C::kQueryDim;
  job.sums = arguments.workspace.grad_q + job.item.head * C::kQueryCols * job.sums_stride +
             job.sequence.begin_q * C::kQueryDim;
  const ScaleParams& s = p.problem.scale;
  const float* values = static_cast<const float*>(s.values);
  job.factor = !values ? arguments.scale : s.per_row ? 1.f : values[job.item.sequence];
}

template <class C, class Bias>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    attention_bwd_kernel(const __grid_constant__ BwdArguments arguments) {
  extern __shared__ __align__(128) unsigned char memory[];
  using Tile = BwdTile<C, Bias>;
  __shared__ BwdItem<typename C::T> job;
  const BwdStorage<C> shared(memory);
  const AttentionProblem& problem = arguments.params.problem;
  const JaggedParams& jagged = problem.jagged;
  const IntArray& query_offsets = jagged.offsets_q ? jagged.offsets_q : jagged.offsets;
  job.ordered = arguments.workspace.turns && in_order(query_offsets, jagged.batch, jagged.total_q);
  for (int64_t i = take_ticket(arguments.workspace.ticket, blockIdx.x);;) {
    const WorkItem item = find_work<C::kKeys, true>(arguments.schedule, i);
    if (item.block < 0) break;
    if (threadIdx.x == 0) {
      job.item = item;
      job.sequence = load_sequence(jagged, problem.mask, item.sequence);
      job.index = i;
      set_item<Tile>(job, arguments);
      reset_bias<Bias>(shared.bias);
    }
    __syncthreads();
    Tile tile(arguments, job, shared);
    tile.run();
    tile.store();
    const int64_t next = job.index + gridDim.x;
    __syncthreads();  // the next item reuses shared memory
    i = take_ticket(arguments.workspace.ticket, next);
  }
}

template <class C, class Bias>
Status launch_bwd(const AttentionBwdParams& params, void* memory, cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  const BwdArguments arguments{params, key_schedule(a), BwdWorkspace::plan(params, C::kDim, C::kQueries, memory),
                               static_cast<float>(a.alpha), static_cast<float>(a.scale.value)};
  const auto kernel = attention_bwd_kernel<C, Bias>;
  const int bytes = C::kSharedBytes + Bias::shared_bytes(C::kWarps);
  HSTU_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  HSTU_TRY(cudaMemsetAsync(memory, 0, arguments.workspace.bytes, stream));
  for (const TableSums* t : {&arguments.workspace.tables.position, &arguments.workspace.tables.time})
    if (t->sums && !t->words) HSTU_TRY(cudaMemsetAsync(t->sums, 0, t->entries * sizeof(float), stream));
  const int64_t blocks = most_items(a.jagged.total_kv, a.jagged.batch, C::kKeys, a.heads);
  kernel<<<static_cast<unsigned>(blocks), C::kThreads, bytes, stream>>>(arguments);
  HSTU_TRY(cudaGetLastError());
  return finish_bwd<typename C::T>(params, arguments.workspace, C::kDim, C::kQueryDim, stream);
}

template <class T, int kDim, bool kLarge>
Status attention_bwd(const AttentionBwdParams& params, void* memory, cudaStream_t stream) {
  using C = BwdConfigOf<T, kDim, kLarge>;
  const AttentionProblem& a = params.problem;
  if (a.dense.data) {
    const Status status = params.grad_bias ? dense_bias_grad<T, kDim>(params, stream) : Status{};
    return status.ok() ? launch_bwd<typename C::Dense, DenseBias>(params, memory, stream) : status;
  }
  if constexpr (kIs16Bit<T> && (kDim <= 128 || kLarge))  // the registers of the others do not suffice
    if (has_many_buckets<T>(a.relative)) return launch_bwd<typename C::Dense, ManyBucketsBias>(params, memory, stream);
  if (a.relative) return launch_bwd<typename C::Relative, RelativeBias>(params, memory, stream);
  return launch_bwd<typename C::None, NoBias>(params, memory, stream);
}

template <class T, int kDim>
Status attention_bwd(const AttentionBwdParams& params, void* memory, cudaStream_t stream) {
  if constexpr (BwdConfigOf<T, kDim, true>::None::kSharedBytes != BwdConfigOf<T, kDim, false>::None::kSharedBytes) {
    int device = 0, limit = 0;
    HSTU_TRY(cudaGetDevice(&device));
    HSTU_TRY(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (limit >= kLargeSharedMemory) return attention_bwd<T, kDim, true>(params, memory, stream);
  }
  return attention_bwd<T, kDim, false>(params, memory, stream);
}

}  // namespace hstu_ops::cuda::sm80
