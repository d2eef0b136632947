// The warps that feed the Hopper kernel for gradients of bias tables: one finds bands and their steps, one requests
// tiles. A third clears what the next kernel adds to.
#pragma once

#include "cuda/ptx/tma.h"
#include "cuda/sm90/table_grads_storage.h"

namespace hstu_ops::cuda::sm90 {

// ---- the finding warp ----

template <class C>
__device__ __forceinline__ void find_steps(TableState<C>& state, const TableJob& job, Count& parts) {
  const StepFinder<C> finder(job.job.sequence, job.diagonal);
  bool last = false;
#pragma unroll 1
  for (int first = finder.begin(); !last; first += StepFinder<C>::kSteps, parts.next()) {
    const int stage = parts.stage<kTableParts>();
    state.part.empty[stage].wait(parts.round<kTableParts>() ^ 1);
    state.parts[stage].steps[lane_id()] = finder.find(first);
    last = first + StepFinder<C>::kSteps >= finder.end();
    if (lane_id() == 0) state.parts[stage].last = last;
    __syncwarp();
    if (lane_id() == 0) state.part.full[stage].arrive();
  }
}

// Takes items until one has a band, or until there are no more: then false. `band`: the item's next one.
template <class C>
__device__ __forceinline__ bool find_band(const TableArguments& arguments, TableState<C>& state, bool first, int& band,
                                          int& diagonal) {
  const AttentionProblem& problem = arguments.params.problem;
#pragma unroll 1
  for (;
       first || !DiagonalBands<kTableTile, C::kGroups>(state.item.sequence, state.item.item.block).find(band, diagonal);
       first = false) {
    WorkItem item = find_work_inline<C::kGroups * kTableTile, true>(arguments.schedule, arguments.tickets.take(first));
    if (item.block < 0) return false;
    item.head *= arguments.heads;
    if (lane_id() == 0) state.item = {item, load_sequence(problem.jagged, problem.mask, item.sequence), 0, false};
    __syncwarp();
    const TimeTerm time(problem.relative, state.item.sequence, item.head, nullptr);
    bool rising = !time.weight || time.template rising<false>(lane_id(), 32);
    if (problem.relative.query_timestamps) rising = rising && time.template rising<true>(lane_id(), 32);
    rising = __all_sync(~0u, rising);
    if (lane_id() == 0) state.rising = rising;
    band = 0;
    __syncwarp();
  }
  ++band;
  return true;
}

template <class C>
__device__ void find_bands(const TableArguments& arguments, const TableStorage<C>& shared) {
  TableState<C>& state = shared.state;
  Count parts;
  int band = 0;
#pragma unroll 1
  for (Count found;; found.next()) {
    const int stage = found.stage<kTableJobs>();
    state.job.empty[stage].wait(found.round<kTableJobs>() ^ 1);
    if (found.count > 0) state.wanted.wait(found.before().round<1>());
    int diagonal = 0;
    const bool more = find_band<C>(arguments, state, found.count == 0, band, diagonal);
    TableJob& job = state.jobs[stage];
    if (lane_id() == 0) {
      const int left = arguments.params.problem.heads - state.item.item.head;
      job = {state.item, min_int(arguments.heads, left), diagonal, more, state.rising};
    }
    __syncwarp();
    if (lane_id() == 0) state.job.full[stage].arrive();
    if (!more) break;
    find_steps(state, job, parts);
  }
  if (lane_id() == 0) arguments.tickets.close(), state.found_all = true;
}

// ---- the clearing warp ----

// As long as there is work for the others, at a pace that leaves them their loads: 512 bytes in some 130 ns.
template <class C>
__device__ void clear_sums(const TableArguments& arguments, const TableStorage<C>& shared) {
  for (int64_t i = blockIdx.x * 32 + lane_id(); i < arguments.cleared_count; i += gridDim.x * 32) {
    ptx::st_global(arguments.cleared + i, make_uint4(0, 0, 0, 0));
    if (!shared.state.found_all) __nanosleep(64);
  }
}

// ---- the loading warp ----

template <class C>
struct TableLoader {
  const TableArguments& arguments;
  const TableStorage<C>& shared;
  // Steps left of a job when the next one is claimed, which takes as long as some of them.
  static constexpr int kClaimSteps = 8;

  Count jobs, parts;              // so far
  unsigned steps = 0, count = 0;  // of steps, and of tiles of a head each

  // A tile of two tensors, by one lane.
  __device__ void load(const CUtensorMap& map, const CUtensorMap& other, ptx::Mbarrier& full, uint32_t to, int head,
                       int row) const {
    for (int p = 0; p < C::kPanels; ++p) {
      const int panel = p * kTableTile * 128;
      ptx::tma_load_3d(to + panel, map, full, p * kPanel, head, row);
      ptx::tma_load_3d(to + C::kTileBytes + panel, other, full, p * kPanel, head, row);
    }
  }
  __device__ __forceinline__ void load_step(const TableJob& job, TableStep step) {
    const int heads = C::kHeads == 1 ? 1 : job.heads;
#pragma unroll 1
    for (int head = 0; head < heads; ++head, ++count) load_tiles(job, step, head);
    ++steps;
  }
  __device__ __forceinline__ void load_tiles(const TableJob& job, TableStep step, int number) {
    TableState<C>& state = shared.state;
    const Sequence& s = job.job.sequence;
    const int head = job.job.item.head + number, row = step.number() * kTableTile,
              col = row - job.diagonal * kTableTile;
    ptx::Mbarrier& full = state.tiles[count % C::kSteps];
    state.key_empty[count % C::kKeyStages].wait(count / C::kKeyStages % 2 ^ 1);
    state.query_empty[count % C::kQueryStages].wait(count / C::kQueryStages % 2 ^ 1);
    if (lane_id() == 0) {
      if (number == 0) state.steps[steps % C::kSteps] = {step, s.first_row + row, col, static_cast<int>(jobs.count)};
      full.arrive_expect_tx(2 * C::kTileBytes * ((step.kept() != 0) + step.keys()));
      if (step.keys())
        load(arguments.k, arguments.v, full, shared.key(count), head, static_cast<int>(s.begin_kv) + col);
      if (step.kept())
        load(arguments.q, arguments.grad_out, full, shared.query(count), head, static_cast<int>(s.begin_q) + row);
    }
    if (number == 0) write_times(job, s.first_row + row, col);
    __syncwarp();
    if (lane_id() == 0) full.arrive();
  }
  __device__ void write_times(const TableJob& job, int row, int col) const {
    const TimeTerm time(arguments.params.problem.relative, job.job.sequence, job.job.item.head, nullptr);
    if (!time.weight) return;
    uint32_t rows[2], cols[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows[i] = static_cast<uint32_t>(time.query_time(row + i * 32 + lane_id()));
      cols[i] = static_cast<uint32_t>(time.key_time(col + i * 32 + lane_id()));
    }
    const uint32_t left = __shfl_sync(~0u, cols[0], 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ptx::st_shared(shared.query_times(steps).at(i * 32 + lane_id()), rows[i]);
      ptx::st_shared(shared.key_times(steps).at(i * 32 + lane_id()), cols[i] - left);
    }
    if (lane_id() == 0) ptx::st_shared(shared.key_times(steps).left(), left);
  }

  __device__ void load_job(const TableJob& job) {
    TableState<C>& state = shared.state;
    TableStep step, mine;
    unsigned left = 0;  // of the part's steps: a bit each
    int before = 0, noted = -1;
    bool last = false, pending = false, wanted = false;
#pragma unroll 1
    for (;;) {
      while (left == 0 && !last) {
        const int stage = parts.stage<kTableParts>();
        state.part.full[stage].wait(parts.round<kTableParts>());
        mine = state.parts[stage].steps[lane_id()], last = state.parts[stage].last;
        left = __ballot_sync(~0u, mine.visited());
        __syncwarp();
        if (lane_id() == 0) state.part.empty[stage].arrive();
        parts.next();
      }
      if (!wanted && last && __popc(left) <= kClaimSteps) {
        if (lane_id() == 0) state.wanted.arrive();
        wanted = true;
      }
      if (!pending && left == 0) step = TableStep(0), pending = true;  // a job has a step, even if it keeps nothing
      if (pending) {                                                   // by now it is known whether it is the last
        if (left == 0) step.set_last();
        step.set_before(before++);
        if (step.number() >> 5 != noted) step.set_unnoted(), noted = step.number() >> 5;
        load_step(job, step);
      }
      if (left == 0) return;
      step = mine.of_lane(__ffs(left) - 1), left &= left - 1, pending = true;
    }
  }

  __device__ void run() {
    Gate<kTableJobs>& gate = shared.state.job;
    for (;; jobs.next()) {
      const int stage = jobs.stage<kTableJobs>();
      gate.full[stage].wait(jobs.round<kTableJobs>());
      const TableJob& job = shared.state.jobs[stage];
      if (!job.more) return;
      load_job(job);
      __syncwarp();
      if (lane_id() == 0) gate.empty[stage].arrive();
    }
  }
};

}  // namespace hstu_ops::cuda::sm90
