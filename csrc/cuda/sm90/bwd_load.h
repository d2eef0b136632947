// The warps of the Hopper backward that feed the others: one finds items, one requests their tiles.
#pragma once

#include "core/params.h"
#include "cuda/ptx/tma.h"
#include "cuda/sm90/bwd_storage.h"
#include "cuda/sm90/ring.h"
#include "cuda/sm90/tickets.h"
#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda::sm90 {

struct BwdArguments {
  CUtensorMap q, k, v, grad_out;
  AttentionBwdParams params;
  Schedule schedule;
  Tickets tickets;  // of items: whoever is done first takes the next, since items differ in length
  float* sums;      // of dQ: see bwd_sums.h
  TableSums position, time;
  float alpha, scale;  // alpha: as much of it as scores take, and as dQ and dK take
};

// ---- the finding warp ----

__device__ inline void check_times(const AttentionProblem& problem, BwdJob& job) {
  const TimeTerm time(problem.relative, job.job.sequence, job.job.item.head, nullptr);
  const bool rising = !time.weight || __all_sync(~0u, time.rising<true>(lane_id(), 32));
  if (lane_id() == 0) job.rising = rising;
}

template <class C, class T>
__device__ void find_blocks(const BwdArguments& arguments, const BwdStorage<C, T>& shared) {
  const AttentionProblem& problem = arguments.params.problem;
  Gate<kBwdJobs>& gate = shared.state.barrier.job;
  bool first = true, more = true;
#pragma unroll 1
  for (Count found; more; found.next()) {
    BwdJob& job = shared.state.jobs[found.stage<kBwdJobs>()];
    gate.empty[found.stage<kBwdJobs>()].wait(found.round<kBwdJobs>() ^ 1);
    const WorkItem item = find_work_inline<C::kKeys, true>(arguments.schedule, arguments.tickets.take(first));
    first = false, more = item.block >= 0;
    if (lane_id() == 0) {
      job.more = more;
      if (more) job.job = {item, load_sequence(problem.jagged, problem.mask, item.sequence), 0, false};
    }
    __syncwarp();
    if (more) {
      job.first_tiles[lane_id()] = classify_queries<C>(job.job, lane_id());
      __syncwarp();
      BwdTile any;
      const bool any_tile = BwdWalk<C>(job).next(any);
      if (lane_id() == 0) job.any_tile = any_tile;
      if constexpr (std::is_same_v<typename C::Bias, RelativeBias>) check_times(problem, job);
    }
    __syncwarp();
    if (lane_id() == 0) gate.full[found.stage<kBwdJobs>()].arrive();
  }
  if (lane_id() == 0) arguments.tickets.close();
}

// ---- the loading warp ----

template <class C, class T>
struct BwdLoader {
  const BwdArguments& arguments;
  const BwdStorage<C, T>& shared;
  Count items, tiles;  // so far

  // Panels of `rows` rows from `row` on.
  __device__ void load(const CUtensorMap& map, ptx::Mbarrier& full, uint32_t to, int rows, int head, int row) const {
    full.arrive_expect_tx(rows * C::kDim * 2);
    for (int p = 0; p < C::kPanels; ++p) ptx::tma_load_3d(to + p * rows * 128, map, full, p * kPanel, head, row);
  }

  __device__ void load_queries(const Job& job, BwdTile tile) {
    BwdBarriers<C>& barrier = shared.state.barrier;
    const int head = job.item.head, row = static_cast<int>(job.sequence.begin_q) + tile.tile() * C::kQueries;
    barrier.query.empty[tiles.stage<C::kQueryStages>()].wait(tiles.round<C::kQueryStages>() ^ 1);
    if (lane_id() == 0) {
      shared.state.tiles[tiles.stage<kBwdTiles>()] = tile;
      load(arguments.q, barrier.query.full[tiles.stage<C::kQueryStages>()],
           shared.query_panel(tiles.stage<C::kQueryStages>(), 0).base, C::kQueries, head, row);
    }
    barrier.grad.empty[tiles.stage<C::kGradStages>()].wait(tiles.round<C::kGradStages>() ^ 1);
    if (lane_id() == 0)
      load(arguments.grad_out, barrier.grad.full[tiles.stage<C::kGradStages>()],
           shared.grad_panel(tiles.stage<C::kGradStages>(), 0).base, C::kQueries, head, row);
    tiles.next();
  }

  __device__ void load_keys(const Job& job) {
    BwdBarriers<C>& barrier = shared.state.barrier;
    const int head = job.item.head, row = static_cast<int>(job.sequence.begin_kv) + job.item.block * C::kKeys;
    barrier.key.empty[items.stage<C::kKeyStages>()].wait(items.round<C::kKeyStages>() ^ 1);
    if (lane_id() == 0)
      load(arguments.k, barrier.key.full[items.stage<C::kKeyStages>()],
           shared.key_panel(items.stage<C::kKeyStages>(), 0).base, C::kKeys, head, row);
    barrier.value.empty[items.stage<C::kValueStages>()].wait(items.round<C::kValueStages>() ^ 1);
    if (lane_id() == 0)
      load(arguments.v, barrier.value.full[items.stage<C::kValueStages>()],
           shared.value_panel(items.stage<C::kValueStages>(), 0).base, C::kKeys, head, row);
  }

  __device__ void run() {
    Gate<kBwdJobs>& gate = shared.state.barrier.job;
    for (;; items.next()) {
      gate.full[items.stage<kBwdJobs>()].wait(items.round<kBwdJobs>());
      const BwdJob& job = shared.state.jobs[items.stage<kBwdJobs>()];
      if (!job.more) return;
      BwdWalk<C> walk(job);
      BwdTile tile;
      if (walk.next(tile)) load_queries(job.job, tile);  // ahead of the keys, whose stage is free later
      load_keys(job.job);
      while (walk.next(tile)) load_queries(job.job, tile);
      __syncwarp();
      if (lane_id() == 0) gate.empty[items.stage<kBwdJobs>()].arrive();
    }
  }
};

}  // namespace hstu_ops::cuda::sm90
