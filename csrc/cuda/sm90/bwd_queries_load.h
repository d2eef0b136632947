// What the roles of the Hopper backward's kernel for dQ share, and the warps that feed the others: one finds items, one
// requests tiles.
//
// Barriers, each with the arrivals that complete it:
//
//   item_full    the finding warp              item_empty   each computing warpgroup, the loading and preparing warps
//   query_full   the loading lane, the bytes   query_empty  each computing warpgroup, after its last use of Q and dO
//   key_full     the loading lane, the bytes   key_empty    each computing warpgroup that uses the tile
//
// value_* as key_*; notes_* and bias_*: see fwd_bias_prepare.h.
#pragma once

#include <cuda.h>

#include "cuda/ptx/dependent.h"
#include "cuda/ptx/tma.h"
#include "cuda/sm90/bwd_queries_config.h"
#include "cuda/sm90/bwd_scratch.h"
#include "cuda/sm90/gate.h"
#include "cuda/sm90/ring.h"
#include "cuda/sm90/score_factors.h"
#include "cuda/sm90/tickets.h"

namespace hstu_ops::cuda::sm90 {

struct BwdQueriesArguments {
  CUtensorMap q, k, v, grad_out;
  AttentionBwdParams params;
  Schedule schedule;
  Tickets tickets;
  void* cells;  // of WideCells
  ScoreFactors factors;
};

template <class C>
struct BwdQueriesBarriers {
  ptx::Mbarrier wanted;
  Gate<kItems> item;
  Gate<1> query;
  Gate<C::kKeyStages> key;
  Gate<C::kValueStages> value;
  Gate<C::Notes::kBuffers> notes;
  Gate<C::kBiasStages> bias;

  __device__ void init() {
    wanted.init(1), item.init(1, C::kGroups + 1 + C::kPreparers);
    query.init(1, C::kGroups), key.init(1, C::kUsers), value.init(1, C::kUsers);
    notes.init(1, 1), bias.init(1, C::kUsers);
    ptx::fence_mbarrier_init();
  }
};

template <class C>
struct BwdQueriesStorage {
  BwdQueriesBarriers<C>& barrier;
  FwdItem<C> (&items)[kItems];
  uint32_t queries, grads, keys, values;

  __device__ BwdQueriesStorage(BwdQueriesBarriers<C>& barrier, FwdItem<C> (&items)[kItems], const unsigned char* memory)
      : barrier(barrier), items(items) {
    queries = (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u;
    grads = queries + C::kQueryBytes;
    keys = grads + C::kQueryBytes;
    values = keys + C::kKeyStages * C::kKeyBytes;
  }
  __device__ uint32_t key(Count at) const { return keys + at.stage<C::kKeyStages>() * C::kKeyBytes; }
  __device__ uint32_t value(Count at) const { return values + at.stage<C::kValueStages>() * C::kKeyBytes; }
  __device__ BiasMemory<C> bias() const { return {values + C::kValueStages * C::kKeyBytes}; }
  // Of a warp, where scores wait.
  __device__ uint32_t scratch(int warp) const { return bias().end() + warp * 2048; }
};

// ---- the finding warp ----

template <class C>
__device__ void find_query_items(const BwdQueriesArguments& arguments, const BwdQueriesStorage<C>& shared) {
  const AttentionProblem& problem = arguments.params.problem;
  WorkFinder<C::kRows, false> finder(arguments.schedule);
  bool first = true, more = true;
  unsigned wanted = 0;
  for (Ring<kItems> at; more; at.next()) {
    FwdItem<C>& job = shared.items[at.stage];
    shared.barrier.item.empty[at.stage].wait(at.round ^ 1);
    if (!first) shared.barrier.wanted.wait(wanted), wanted ^= 1;
    const int64_t ticket = arguments.tickets.take(first);
    const WorkItem item = finder.find(ticket);
    first = false, more = item.block >= 0;
    if (more) job.set(item, load_sequence(problem.jagged, problem.mask, item.sequence), ticket, 0, 1);
    if (lane_id() == 0) job.more = more;
    __syncwarp();
    if (lane_id() == 0) shared.barrier.item.full[at.stage].arrive();
  }
  if (lane_id() == 0) arguments.tickets.close();
  ptx::wait_for_prerequisites();  // nothing here needs them, but whoever waits for this kernel means both
}

// ---- the loading warp ----

template <class C>
struct BwdQueriesLoader {
  const BwdQueriesArguments& arguments;
  const BwdQueriesStorage<C>& shared;
  Count items, tiles;  // so far

  // Panels of kRows rows from `row` on; one lane asks.
  template <int kRows>
  __device__ void load(const CUtensorMap& map, ptx::Mbarrier& full, uint32_t to, int head, int row) const {
    for (int p = 0; p < C::kPanels; ++p) ptx::tma_load_3d(to + p * kRows * 128, map, full, p * kPanel, head, row);
  }
  __device__ void load_queries(const FwdItem<C>& item) const {
    Gate<1>& gate = shared.barrier.query;
    gate.empty[0].wait(items.round<1>() ^ 1);
    if (lane_id() != 0) return;
    const int row = static_cast<int>(item.job.sequence.begin_q) + item.first, head = item.job.item.head;
    gate.full[0].arrive_expect_tx(2 * C::kQueryBytes);
    load<C::kRows>(arguments.q, gate.full[0], shared.queries, head, row);
    load<C::kRows>(arguments.grad_out, gate.full[0], shared.grads, head, row);
  }
  template <int kStages>
  __device__ void load_tile(const CUtensorMap& map, Gate<kStages>& gate, uint32_t to, int head, int row) const {
    const int stage = tiles.stage<kStages>();
    gate.empty[stage].wait(tiles.round<kStages>() ^ 1);
    if (lane_id() != 0) return;
    gate.full[stage].arrive_expect_tx(C::kKeyBytes);
    load<C::kCols>(map, gate.full[stage], to, head, row);
  }

  // The next item is claimed only now, near the end of this one: whoever is ahead takes more.
  __device__ void want_item() const {
    if (lane_id() == 0) shared.barrier.wanted.arrive();
  }

  __device__ void load_item(const FwdItem<C>& item) {
    const TileSpans walk = item.tiles();
    const int head = item.job.item.head, begin = static_cast<int>(item.job.sequence.begin_kv);
    bool queries = false;
    int left = walk.size();
    if (left <= C::kClaimTiles) want_item();
    for (int tile = walk.next(-1); tile < walk.end(); tile = walk.next(tile)) {
      const int row = begin + tile * C::kCols;
      load_tile(arguments.k, shared.barrier.key, shared.key(tiles), head, row);
      if (!queries) load_queries(item), queries = true;  // behind keys, which need not wait for the item before
      load_tile(arguments.v, shared.barrier.value, shared.value(tiles), head, row);
      tiles.next();
      if (--left == C::kClaimTiles) want_item();
    }
    if (!queries) load_queries(item);
  }

  __device__ void run() {
    for (;; items.next()) {
      const int stage = items.stage<kItems>();
      shared.barrier.item.full[stage].wait(items.round<kItems>());
      const FwdItem<C>& item = shared.items[stage];
      if (!item.more) return;
      load_item(item);
      __syncwarp();
      if (lane_id() == 0) shared.barrier.item.empty[stage].arrive();
    }
  }
};

}  // namespace hstu_ops::cuda::sm90
