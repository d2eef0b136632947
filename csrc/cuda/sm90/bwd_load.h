// The warps of the Hopper backward that feed the others: one finds items, one requests their tiles.
#pragma once

#include "cuda/ptx/dependent.h"
#include "cuda/ptx/tma.h"
#include "cuda/sm90/bwd_bias_prepare.h"
#include "cuda/sm90/bwd_finish.h"

namespace hstu_ops::cuda::sm90 {

// ---- the finding warp ----

// Read again each time: what is derived from it would be kept over all items, in registers that are not there.
__device__ __forceinline__ int find_lane() { return ptx::thread_index() % 32; }

// Classifies an item's tiles, 32 at once, and hands them over.
template <class C, class T>
__device__ __forceinline__ void find_tiles(const BwdStorage<C, T>& shared, const Job& job, Count& parts) {
  Gate<kBwdParts>& gate = shared.state.barrier.part;
  int first = C::kFromLast ? (job.sequence.num_q - 1) / C::kQueries / 32 * 32 : 0;
#pragma unroll 1
  for (bool last = false; !last; first += C::kFromLast ? -32 : 32, parts.next()) {
    gate.empty[parts.stage<kBwdParts>()].wait(parts.round<kBwdParts>() ^ 1);
    TilePart& part = shared.state.parts[parts.stage<kBwdParts>()];
    const int lane = find_lane();
    part.tiles[lane] = classify_queries<C>(job, first + (C::kFromLast ? 31 - lane : lane));
    last = C::kFromLast ? first == 0 : (first + 32) * C::kQueries >= job.sequence.num_q;
    if (find_lane() == 0) part.last = last;
    __syncwarp();
    if (find_lane() == 0) gate.full[parts.stage<kBwdParts>()].arrive();
  }
}

template <class C, class T>
__device__ void find_blocks(const BwdArguments& arguments, const BwdStorage<C, T>& shared) {
  const AttentionProblem& problem = arguments.params.problem;
  BwdState<C>& state = shared.state;
  Count parts;
#pragma unroll 1
  for (Count found;; found.next()) {
    state.barrier.job.empty[found.stage<kBwdJobs>()].wait(found.round<kBwdJobs>() ^ 1);
    if (found.count > 0) state.barrier.wanted.wait(found.before().round<1>());
    const Tickets& tickets = arguments.tickets;
    const bool own = found.count == 0 && tickets.has_own();
    const WorkItem item = find_work_inline<C::kKeys, true>(arguments.schedule, own ? tickets.first() : tickets.next());
    BwdJob& job = state.jobs[found.stage<kBwdJobs>()];
    const bool more = item.block >= 0;
    if (find_lane() == 0) {
      job.more = more;
      if (more) job.job = {item, load_sequence(problem.jagged, problem.mask, item.sequence), 0, false};
      if constexpr (C::kQuerySums)
        if (more) set_sum_rows<C>(arguments, job.job, state.sum_rows[found.stage<kSumItems>()]);
    }
    __syncwarp();
    if (find_lane() == 0) state.barrier.job.full[found.stage<kBwdJobs>()].arrive();
    if (!more) break;
    find_tiles(shared, job.job, parts);
    if (found.count == 0) tickets.await_open();
  }
  if (find_lane() == 0) arguments.tickets.close();
  if (C::kBias) ptx::wait_for_prerequisites();  // whoever waits for this kernel means that of the tables, too
}

// ---- the loading warp ----

template <class C, class T>
struct BwdLoader {
  const BwdArguments& arguments;
  const BwdStorage<C, T>& shared;
  Count items, tiles, parts;  // so far

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
      shared.state.tiles[tiles.stage<C::kTileStages>()] = tile;
      load(arguments.q, barrier.query.full[tiles.stage<C::kQueryStages>()],
           shared.query_panel(tiles.stage<C::kQueryStages>(), 0).base, C::kQueries, head, row);
    }
    barrier.grad.empty[tiles.stage<C::kGradStages>()].wait(tiles.round<C::kGradStages>() ^ 1);
    if (lane_id() == 0)
      load(arguments.grad_out, barrier.grad.full[tiles.stage<C::kGradStages>()],
           shared.grad_panel(tiles.stage<C::kGradStages>(), 0).base, C::kQueries, head, row);
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

  // The next item is claimed only now, near the end of this one: whoever is ahead takes more.
  __device__ void want_item() const {
    if (lane_id() == 0) shared.state.barrier.wanted.arrive();
  }

  __device__ __forceinline__ void fill_bias(const Job& job, BwdTile tile) const {
    if constexpr (C::kBias) BwdFiller<C, T>{arguments, shared, tiles}.fill(job, tile);
  }
  // The first tile's bias may come later than the item's keys, that of others comes before their queries: its stage is
  // free earlier.
  __device__ __forceinline__ void load_tile(const Job& job, BwdTile tile, bool first) {
    if (C::kBias && !first) fill_bias(job, tile);
    load_queries(job, tile);
    if (first) {
      load_keys(job);  // their stage is free later than that of queries
      if (C::kBias) fill_bias(job, tile);
    }
    tiles.next();
  }

  __device__ void load_item(const Job& job) {
    BwdState<C>& state = shared.state;
    BwdTile tile, mine;
    unsigned left = 0;  // of the part's tiles: a bit each
    bool last = false, pending = false, keys = false, wanted = false;
#pragma unroll 1
    for (;;) {
      while (left == 0 && !last) {
        const int stage = parts.stage<kBwdParts>();
        state.barrier.part.full[stage].wait(parts.round<kBwdParts>());
        mine = state.parts[stage].tiles[lane_id()], last = state.parts[stage].last;
        left = __ballot_sync(~0u, mine.visited());
        __syncwarp();
        if (lane_id() == 0) state.barrier.part.empty[stage].arrive();
        parts.next();
      }
      if (!wanted && last && __popc(left) <= C::kClaimTiles) want_item(), wanted = true;
      if (!pending && left == 0)
        tile = BwdTile(0), pending = true;  // an item has a tile, even if nothing of it is kept
      if (pending) {                        // by now it is known whether it is the last
        if (left == 0) tile.set_last();
        load_tile(job, tile, !keys);
        keys = true;
      }
      if (left == 0) return;
      tile = mine.of_lane(__ffs(left) - 1), left &= left - 1, pending = true;
    }
  }

  __device__ void run() {
    Gate<kBwdJobs>& gate = shared.state.barrier.job;
    for (;; items.next()) {
      gate.full[items.stage<kBwdJobs>()].wait(items.round<kBwdJobs>());
      const BwdJob& job = shared.state.jobs[items.stage<kBwdJobs>()];
      if (!job.more) return;
      load_item(job.job);
      __syncwarp();
      if (lane_id() == 0) gate.empty[items.stage<kBwdJobs>()].arrive();
    }
  }
};

}  // namespace hstu_ops::cuda::sm90
