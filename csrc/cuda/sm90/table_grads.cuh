// Gradients of relative bias tables with Hopper's copy engine and asynchronous tensor cores: scores and dP are computed
// again, dS is summed by distance of positions and by bucket of time. dQ, dK and dV have kernels of their own, without
// room or time for these sums.
//
// A block of threads takes bands of two or three diagonals of tiles of one sequence, and walks along them for one head,
// or for several that share the tables: dS is added up over heads before it is summed, and the bias is that of all. The
// position term is constant along diagonals of elements, so its weights stay in shared memory and a lane's sums of dS,
// by diagonal, in registers over the whole walk: a score costs an addition. A lane's sums of four buckets of time wait
// in shared memory: buckets hardly change along a diagonal.
//
//   find     | bands of the next item            (near the end of the item before)
//   clear    | sums of dQ, for the kernel that follows
//   load     | K0 V0 Q0 dO0 | K1 V1 Q1 dO1 | ...          (each used by the three groups, K and V one step apart)
//   compute  |  S = Q K^T, dP = dO V^T | dS, sums | S, dP of the next step ...
//
// Barriers: see table_grads_storage.h.
#pragma once

#include "cuda/ptx/dependent.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/bwd_scratch.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/meet.h"
#include "cuda/sm90/table_grads_load.h"
#include "cuda/sm90/table_grads_position.h"
#include "cuda/sm90/table_grads_time.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/bias.h"
#include "cuda/tile/score.h"
#include "cuda/tile/walk.h"

namespace hstu_ops::cuda::sm90 {

// ---- a computing warpgroup ----

// kLines: see TimeTerm.
template <class C, class T, bool kLines>
struct TableComputer {
  using Scores = float[kTableTile / 2];
  using Tile = Accumulator<1, 8>;  // the scores again: 16 queries, 64 keys a warp
  using Times = TileTimes<false, 16, 64, kLines>;
  using Kept = typename StepCells<C>::Kept;
  using Diagonals = float2[9];  // of a lane's blocks of 8 x 8 diagonals n - h, from -1 on: two columns each
  static constexpr float kArgument = Score<T>::kArgument;

  const TableArguments& arguments;
  const TableStorage<C>& shared;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // the shuffle tells the compiler that it is uniform
  unsigned steps = 0, count = 0;                                 // of steps so far, and of tiles of a head each
  int heads = 1;                                                 // of the job

  __device__ static unsigned lane() { return static_cast<unsigned>(ptx::thread_index()) % 32; }
  __device__ static unsigned thread() { return static_cast<unsigned>(ptx::thread_index()) % 128; }
  __device__ static int warp() { return static_cast<unsigned>(ptx::thread_index()) / 32 - 4; }
  __device__ static int warp_row() { return static_cast<int>(thread() / 32 * 16); }
  __device__ const AttentionProblem& problem() const { return arguments.params.problem; }
  __device__ const TableJob& job(int number) const { return shared.state.jobs[number % kTableJobs]; }
  // Of the step in work: read where they are used, as few tiles need them.
  __device__ const StepTile& tile() const { return shared.state.steps[steps % C::kSteps]; }
  __device__ const TableJob& job() const { return job(tile().job); }
  __device__ TimeTerm time(const TableJob& job) const {
    return {problem().relative, job.job.sequence, job.job.item.head, shared.cells()};
  }
  __device__ PositionTerm position(const TableJob& job) const { return {problem().relative, job.job.item.head}; }
  __device__ __forceinline__ float factor(const TableJob& job) const {
    const ScaleParams& s = problem().scale;
    return Score<T>::kSlope * (s.per_row ? 1.f : RowScale(s, job.job.item.sequence, 0).value);
  }
  __device__ TableTarget time_target(const TableJob& job) const {
    return {arguments.tables.time, job.job.item.head, factor(job)};
  }
  __device__ TableTarget position_target(const TableJob& job) const {
    return {arguments.tables.position, job.job.item.head, factor(job)};
  }
  __device__ TableNotes notes() const { return shared.notes(warp()); }

  // This warp's tile of the step; of a job, that of a step 0, where its diagonal would begin.
  __device__ TileOrigin origin() const { return {tile().row + warp_row(), tile().col - group * kTableTile}; }
  __device__ TileOrigin origin(const TableJob& job) const {
    return {job.job.sequence.first_row + warp_row(), -(job.diagonal + group) * kTableTile};
  }

  // S = Q K^T or, kTileBytes behind them, dP = dO V^T, begun.
  template <int kBehind>
  __device__ __forceinline__ void multiply(Scores& s, const ptx::Descriptor& a, const ptx::Descriptor& b) const {
#pragma unroll
    for (int i = 0; i < C::kDim / 16; ++i) {
      const int at = kBehind + i / 4 * kTableTile * 128 + i % 4 * 32;
      ptx::Wgmma<kTableTile, T>::multiply_rows(s, a.at(at), b.at(at), i > 0);
    }
    ptx::wgmma_commit();
  }

  // ---- the bias ----

  // What is to be known of the tiles of the 32 steps of which `number` is one, a lane each.
  __device__ __forceinline__ void take_notes(int number) const {
    TileOrigin at = origin(job());
    const int shift = ((number & ~31) + lane_id()) * kTableTile;
    at.query += shift, at.key += shift;
    unsigned code = 0;
    if (problem().relative.position_weight && !PositionTerm::linear(job().job.sequence.mask, at, 16, kTableTile))
      code = BiasNote::kElementwise;
    const TimeTerm t = time(job());
    float weight = 0.f;
    if (t.weight) {
      const long long q0 = t.query_time(at.query), q1 = t.query_time(at.query + 15), k0 = t.key_time(at.key),
                      k1 = t.key_time(at.key + kTableTile - 1);
      const BucketRange range = t.between(q0, q1, k0, k1, (q1 - q0) + (k1 - k0));
      const int steps = range.last - range.first;
      const bool known = job().rising && range.known;
      constexpr int kMostSteps = kLines ? 2 : BiasNote::kMostSteps;
      if (known && steps <= kMostSteps && range.last < 1 << BiasNote::kFirstBits) {
        code |= static_cast<unsigned>(range.first) | static_cast<unsigned>(steps) << BiasNote::kFirstBits;
        weight = kArgument * __ldg(t.weight + range.first);
      } else {
        code |= static_cast<unsigned>(BiasNote::kMany) << BiasNote::kFirstBits;
        constexpr long long kFar = 1 << 30;
        if (known && q0 - k0 > -kFar && q1 - k0 < kFar && k1 - k0 < kFar) {
          code |= TableNotes::kNear;
          if constexpr (kLines)
            if (problem().relative.time_head_stride == 0 && shared.cell_buckets().cells().answer(q0 - k1, q1 - k0))
              code |= TableNotes::kCells;
        }
      }
    }
    __syncwarp();  // all are done with the notes before
    notes().set(lane_id(), {static_cast<int>(code), __float_as_int(weight)});
    __syncwarp();
  }

  // Without a position term its weights are zeros.
  __device__ __forceinline__ void fill_window(const TableJob& job) const {
    const PositionTerm p = position(job);
    const TileOrigin at = origin(job);
    const int e = thread(), distance = at.key - (at.query - warp_row()) + e - (kTableTile - 1);
    const float weight = p.weight ? kArgument * __ldg(p.weight + position_index(0, distance, p.positions)) : 0.f;
    const int barrier = 2 + warp() / 4;
    meet(barrier, 128);  // all are done with the last job's
    shared.window(group).set(e, weight);
    meet(barrier, 128);
  }
  // What add_bias() makes of a score: argument (alpha s + bias) or, of several heads, which have the same bias, that
  // without s.
  __device__ __forceinline__ float biased(float s, float bias) const {
    return C::kHeads == 1 ? fmaf(s, arguments.alpha, bias) : bias;
  }
  // weight: of the first bucket.
  __device__ __forceinline__ void add_bias(BiasNote note, float weight, Tile& s, Kept& kept) const {
    if (note.elementwise()) {
      const TableJob& of = job();
      s.each([&](float& x, int, int) { x = biased(x, weight); });
      position(of).template add_elementwise<false>(s, of.job.sequence.mask, origin(), kArgument);
    } else {
      const TableWindow window = shared.window(group);
      const uint32_t pair = window.pair(warp_row() + static_cast<int>(lane() / 4), static_cast<int>(lane() % 4 * 2));
#pragma unroll
      for (int d = -1; d < 8; ++d) {
        const float2 w = ptx::ld_shared_v2(pair + d * 32);
        const float2 b = {w.x + weight, w.y + weight};
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (d + r >= 0 && d + r < 8) {
            float* x = &s.x[0][d + r][r * 2];
            x[0] = biased(x[0], b.x);
            x[1] = biased(x[1], b.y);
          }
      }
    }
    if (note.steps() == 0) return;
    if (note.steps() != BiasNote::kMany) {
      boundaries().add(time(job()), note.first(), note.steps(), kArgument, s);
    } else {
      if constexpr (kLines)
        if (note.code & TableNotes::kCells) return step_cells().add(s, kept);
      const TimeTerm t = time(job());
      times(t, note).add(t, s, kArgument, shared.slots(warp()));
    }
  }
  __device__ __forceinline__ Times times(const TimeTerm& t, BiasNote note) const {
    const TileOrigin at = origin();
    if (!(note.code & TableNotes::kNear)) return {t, at.query, at.key};
    return stored_times<kLines>(t, at, shared.query_times(steps).at(warp_row()), shared.key_times(steps - group));
  }

  __device__ __forceinline__ StepBoundaries boundaries() const {
    return {shared.query_times(steps).at(warp_row()), shared.key_times(steps - group)};
  }

  __device__ __forceinline__ StepCells<C> step_cells() const {
    return {shared.query_times(steps).at(warp_row()), shared.key_times(steps - group), shared.cell_buckets()};
  }

  // ---- sums ----

  // Of dS by block diagonal; returns the total.
  __device__ __forceinline__ float sum_diagonals(const Tile& ds, Diagonals& sums) const {
    float2 total = {0.f, 0.f};
#pragma unroll
    for (int d = -1; d < 8; ++d) {
      float2 x = {0.f, 0.f};
      if (d >= 0) x = {ds.x[0][d][0], ds.x[0][d][1]};
      if (d + 1 < 8) x.x += ds.x[0][d + 1][2], x.y += ds.x[0][d + 1][3];
      sums[d + 1].x += x.x, sums[d + 1].y += x.y;
      total.x += x.x, total.y += x.y;
    }
    return total.x + total.y;
  }
  // The same where logical positions do not all differ; leaves zeros in ds where they do not.
  __device__ __forceinline__ void sum_clamped(Tile& ds, Diagonals& sums) const {
    const TableJob& of = job();
    ClampedSums(of.job.sequence.mask, origin(), problem().relative.positions).sum(ds, position_target(of));
    sum_diagonals(ds, sums);
  }
  __device__ __forceinline__ float sum_of(const Tile& ds) const {
    float part[4] = {};  // one sum would wait for itself
    ds.each([&](float x, int row, int col) { part[row / 8 * 2 + col % 8] += x; });
    return (part[0] + part[1]) + (part[2] + part[3]);
  }
  __device__ __forceinline__ void sum_times(BiasNote note, const Tile& ds, const Kept& kept, float total) const {
    const TableJob& of = job();
    const TableTarget to = time_target(of);
    if (note.steps() == BiasNote::kMany) {
      if constexpr (kLines)
        if (note.code & TableNotes::kCells && step_cells().sum(ds, kept, to, shared.slots(warp()))) return;
      if (Times::template add_kept<T>(ds, to, shared.slots(warp()))) return;
      const TimeTerm t = time(of);
      const Times tile = times(t, note);
      if (!tile.add_searched(t, ds, to, shared.slots(warp())))
        tile.template add_grad<T>(t, ds, to, shared.slots(warp()));
    } else if (note.steps() == 0) {
      shared.buckets(warp()).put(to, note.first(), total);
    } else {
      boundaries().sum(time(of), note.first(), note.steps(), ds, total, to, shared.buckets(warp()));
    }
  }

  __device__ __forceinline__ void scale_rows(Tile& ds) const {
    const Job& of = job().job;
    const RowScale scale(problem().scale, of.item.sequence, of.sequence.begin_q);
    float factors[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = origin().query - of.sequence.first_row + h * 8 + static_cast<int>(lane() / 4);
      factors[h] = row < of.sequence.num_q ? scale(row) : 0.f;
    }
    ds.each([&](float& x, int row, int) { x *= factors[row / 8]; });
  }

  // ---- a tile, a walk ----

  // The groups' turns at the tensor cores: a group waits for the one before it, at a barrier of its own.
  __device__ __forceinline__ void take_turn() const { meet(5 + warp() / 4, 256); }
  __device__ __forceinline__ void pass_turn() const {
    __syncwarp();
    ptx::named_barrier_arrive(5 + (warp() / 4 + 1) % C::kGroups, 256);
  }

  // A tile of which something is kept, of all heads of the job. Its dS goes to `sums` where the position term runs
  // along diagonals. Several heads have the same bias, which is worked out once, and their dS are added up and summed
  // once.
  __device__ __forceinline__ void compute_tile(TableStep step, Diagonals& sums) {
    Scores s, d, bias, sum;
    Tile &u = reinterpret_cast<Tile&>(s), &ds = reinterpret_cast<Tile&>(C::kHeads == 1 ? d : sum);
    Kept kept;
    const int2 head = notes().get(step.number() & 31);
    BiasNote note;
    uint64_t keep = 0;
    if constexpr (C::kHeads > 1) {
      note = {__shfl_sync(~0u, static_cast<unsigned>(head.x), 0)};
      add_bias(note, __int_as_float(head.y), reinterpret_cast<Tile&>(bias), kept);
      ds.clear();
    }
#pragma unroll 1
    for (int left = heads;; wait_for_tiles()) {
      const ptx::Descriptor queries(shared.query(count)), keys(shared.key(count - group * heads));
      take_turn();
      ptx::wgmma_fence();
      multiply<0>(s, queries, keys);
      multiply<C::kTileBytes>(d, queries, keys);
      if constexpr (C::kHeads == 1) note = {__shfl_sync(~0u, static_cast<unsigned>(head.x), 0)};
      if (!step.covered(group) && (C::kHeads == 1 || left == 1)) {
        const TileOrigin at = origin();
        keep = row_bits(job().job.sequence.mask, at.query + static_cast<int>(lane()), at.key);
      }
      ptx::wgmma_wait<1>();
      ptx::wgmma_settle(s);
      pass_turn();
      if constexpr (C::kHeads == 1) {
        add_bias(note, __int_as_float(head.y), u, kept);
      } else {
#pragma unroll
        for (int i = 0; i < kTableTile / 2; ++i) s[i] = fmaf(s[i], arguments.alpha, bias[i]);
      }
      Score<T>::slope(u);
      ptx::wgmma_wait<0>();
      ptx::wgmma_settle(d);
      release_tiles(tile().step);
      ++count;
#pragma unroll
      for (int i = 0; i < kTableTile / 2; ++i) d[i] = fmaf(d[i], s[i], d[i]);
      if constexpr (C::kHeads > 1) {
#pragma unroll
        for (int i = 0; i < kTableTile / 2; ++i) sum[i] += d[i];
      }
      if (C::kHeads == 1 || --left == 0) break;
    }
    if (!step.covered(group)) mask_rows(keep, ds);
    if (problem().scale.per_row) scale_rows(ds);
    const float total = note.elementwise() ? sum_of(ds) : sum_diagonals(ds, sums);
    if (arguments.tables.time.sums) sum_times(note, ds, kept, total);
    if (note.elementwise() && arguments.tables.position.sums) sum_clamped(ds, sums);
  }

  // The sums of a walk to the table. An element (i, k) of block diagonal d is in lane (i, k / 2) and lies 8 d + k - i
  // from block diagonal 0. Lanes of one row rho take what lies 8 d + rho away.
  __device__ __forceinline__ void flush_positions(const TableJob& job, const Diagonals& sums) const {
    const int rho = static_cast<int>(lane() / 4), quad = static_cast<int>(lane() % 4);
    float t[12] = {};  // of block diagonals -2 to 9, of which the last two are empty
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int away = 2 * quad + c - rho, source = (away & 7) * 4 + quad;
      float here = 0.f;
#pragma unroll
      for (int d = -2; d < 8; ++d) {
        const float next = d < 7 ? __shfl_sync(~0u, c == 0 ? sums[d + 2].x : sums[d + 2].y, source) : 0.f;
        t[d + 2] += away < 0 ? next : here;
        here = next;
      }
    }
    sum_quarters(t, quad);  // over the lanes of a rho
    const TableTarget to = position_target(job);
    const TileOrigin at = origin(job);
    const int start = at.key - at.query + rho + 8 * ((quad & 1) * 6 + (quad & 2) / 2 * 3 - 2);
#pragma unroll
    for (int i = 0; i < 3; ++i)
      if (t[i] != 0.f) to.add(position_index(0, start + 8 * i, problem().relative.positions), t[i]);
  }

  // Keys are this group's for the last time now, queries are used in one step only.
  __device__ __forceinline__ void release_tiles(TableStep step) const {
    __syncwarp();
    if (lane_id() != 0) return;
    shared.state.query_empty[count % C::kQueryStages].arrive();
    if (step.before() >= group) shared.state.key_empty[(count - group * heads) % C::kKeyStages].arrive();
  }
  __device__ __forceinline__ void skip_tile(TableStep step) {
    for (int left = heads;; wait_for_tiles()) {
      take_turn();
      pass_turn();
      release_tiles(step);
      ++count;
      if (C::kHeads == 1 || --left == 0) break;
    }
  }

  __device__ __forceinline__ void wait_for_tiles() const {
    shared.state.tiles[count % C::kSteps].wait(count / C::kSteps % 2);
  }
  __device__ __forceinline__ void walk(Diagonals& sums) {
    TableStep step;
#pragma unroll 1
    do {
      wait_for_tiles();
      step = tile().step.uniform();
      if (step.unnoted()) take_notes(step.number());
      if (step.kept(group)) {
        compute_tile(step, sums);
        step = tile().step.uniform();  // read again: it took a register
      } else {
        skip_tile(step);
      }
      ++steps;
    } while (!step.last());
    // Keys that only other groups would have used in the next steps.
    if (lane_id() == 0)
#pragma unroll 1
      for (unsigned at = count - min_int(step.before() + 1, group) * heads; at != count; ++at)
        shared.state.key_empty[at % C::kKeyStages].arrive();
    __syncwarp();
  }

  __device__ __forceinline__ void run() {
    constexpr int kThreads = C::kThreads - 128;
    if (problem().relative.time_weight) {
      const TimeTerm time(problem().relative, Sequence(), 0, shared.cells());
      time.template make_cells<kLines>(shared.cells(), threadIdx.x - 128, kThreads);
      if constexpr (kLines)
        shared.cell_buckets().make(time, arguments.cells, kArgument, threadIdx.x - 128, kThreads,
                                   [] { meet(1, kThreads); });
    }
    meet(1, kThreads);
    if (group == C::kGroups - 1) pass_turn();
    for (unsigned jobs = 0;; jobs = notes().jobs() + 1) {
      notes().set_jobs(jobs);
      shared.state.job.full[jobs % kTableJobs].wait(jobs / kTableJobs % 2);
      if (!job(jobs).more) break;
      if constexpr (C::kHeads > 1) heads = __shfl_sync(~0u, job(jobs).heads, 0);  // the same in all lanes
      Diagonals sums = {};
      fill_window(job(jobs));
      shared.buckets(warp()).reset();
      walk(sums);
      const TableJob& walked = job(notes().jobs());
      if (arguments.tables.position.sums) flush_positions(walked, sums);
      if (arguments.tables.time.sums) shared.buckets(warp()).finish(time_target(walked));
      __syncwarp();
      if (lane_id() == 0) shared.state.job.empty[notes().jobs() % kTableJobs].arrive();
    }
    if (group == 0) take_turn();  // the last one's
  }
};

// ---- kernel and launch ----

template <class C, class T, bool kLines>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_table_grads_kernel(const __grid_constant__ TableArguments arguments) {
  extern __shared__ unsigned char memory[];
  __shared__ TableState<C> state;
  const TableStorage<C> shared(state, memory);
  if (threadIdx.x == 0) {
    state.init();
    if (blockIdx.x == 0) arguments.tickets.open();
    ptx::launch_dependents();  // what follows needs only the cleared sums, and waits for them
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::set_max_registers_down<C::kLoadRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      TableLoader<C>{arguments, shared, {}, {}, {}}.run();
    } else if (warp == 1) {
      find_bands(arguments, shared);
    } else if (warp == 2) {
      clear_sums(arguments, shared);
    }
  } else {
    ptx::set_max_registers_up<C::kComputeRegisters>();
    TableComputer<C, T, kLines>{arguments, shared}.run();
  }
}

template <class T>
__global__ void __launch_bounds__(256) round_tables_kernel(const __grid_constant__ TableGrads tables) {
  ptx::wait_for_prerequisites();
  tables.round(int64_t{blockIdx.x} * 256 + threadIdx.x, int64_t{gridDim.x} * 256);
}

template <class C, class T, bool kLines>
Status attention_table_grads(const AttentionBwdParams& params, int heads, const BwdScratch& scratch, int processors,
                             cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  static_assert(Score<T>::kArgument == Score<T>::kSlope, "alpha is folded as the backward folds it");
  TableArguments arguments{{},
                           {},
                           {},
                           {},
                           params,
                           key_schedule(a, heads),
                           Tickets(scratch.bias_tickets),
                           scratch.tables,
                           scratch.table_cells,
                           reinterpret_cast<float4*>(scratch.sums),
                           static_cast<int64_t>(scratch.sum_bytes / sizeof(float4)),
                           heads,
                           static_cast<float>(a.alpha) * Score<T>::kArgument};
  if (Status s = make_tensor_maps(arguments, params, kTableTile, kTableTile); !s.ok()) return s;
  widen_last_group(arguments.schedule, C::kGroups * kTableTile, processors, false, 1.5);
  const int64_t items =
      most_items(a.jagged.total_kv, a.jagged.batch, C::kGroups * kTableTile, arguments.schedule.heads);
  const Status status = launch<attention_table_grads_kernel<C, T, kLines>>(
      arguments, items < processors ? items : processors, C::kThreads, C::kSharedBytes, stream);
  if (!status.ok() || !scratch.tables.exact()) return status;
  const int64_t blocks = (scratch.tables.entries() + 255) / 256;
  return launch<round_tables_kernel<T>>(scratch.tables, blocks < processors ? blocks : processors, 256, 0, stream,
                                        true);
}

// The gradients of the tables that are wanted, added to what is there. Exact sums, if there are any, replace it.
template <class T, int kDim>
Status attention_table_grads(const AttentionBwdParams& params, const BwdScratch& scratch, int processors,
                             cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  constexpr int kHeads = kDim == 64 ? 4 : kDim == 128 ? 2 : 1, kStages = kHeads;
  const int heads = summed_heads(a, kHeads, processors);
  if (has_many_buckets<T>(a.relative)) {  // whose look-ups take more registers
    using Cells = std::conditional_t<kDim == 256, WideCells, SharedCells<kDim == 64 ? 5120 : 4096>>;
    using Many = TableShape<kDim, 2, kHeads, Cells, kDim == 256 ? 1 : 2, kDim == 64 ? 2 : 1>;
    return attention_table_grads<Many, T, true>(params, heads, scratch, processors, stream);
  }
  if constexpr (kHeads > 1) {
    using Shared = TableShape<kDim, 2, kHeads, NoCells, kStages, kStages>;
    if (heads > 1) return attention_table_grads<Shared, T, false>(params, heads, scratch, processors, stream);
  }
  using OfHead = TableShape<kDim, kDim == 256 ? 2 : 3, 1, NoCells, kStages, kStages>;
  return attention_table_grads<OfHead, T, false>(params, heads, scratch, processors, stream);
}

}  // namespace hstu_ops::cuda::sm90
