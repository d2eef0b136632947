// What the roles of the Hopper backward share: barriers and the layout of shared memory.
//
// Barriers, each with the arrivals that complete it:
//
//   job_full    the finding warp               job_empty    each computing warpgroup, the loading and noting warps
//   part_full   the finding warp               part_empty   the loading and noting warps
//   wanted      the loading warp, near the end of an item: the next may be claimed
//   key_full    the loading lane, the bytes    key_empty    each computing warpgroup; value_*, query_*, grad_* likewise
//   score_full  each warp that writes dS       score_empty  each computing warpgroup, or the one whose turn it is
//   slope_full  each warp that writes slopes   slope_empty  each warp that reads them
//   notes_full  the noting warp                notes_empty  the loading warp
//   bias_full   each loading lane's copies, and the loading warp
//                                              bias_empty   each computing warpgroup that has S
//   sum_full    each warp of the warpgroup     sum_empty    the warp that adds to global memory
//   finished    the first adding warp, when all of an item's rows of dQ are complete
//
// The warps that sum gradients of tables, if there are any, wait for job_full and score_full, and arrive at job_empty,
// score_empty and bias_empty.
#pragma once

#include "core/params.h"
#include "cuda/ptx/tma.h"
#include "cuda/sm90/bwd_config.h"
#include "cuda/sm90/bwd_items.h"
#include "cuda/sm90/bwd_scratch.h"
#include "cuda/sm90/gate.h"
#include "cuda/sm90/origin.h"
#include "cuda/sm90/ring.h"
#include "cuda/sm90/score_factors.h"
#include "cuda/sm90/tickets.h"
#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda::sm90 {

struct BwdArguments {
  CUtensorMap q, k, v, grad_out;
  AttentionBwdParams params;
  Schedule schedule;
  Tickets tickets;  // of items: whoever is done first takes the next, since items differ in length
  void* cells;      // of WideCells
  float* sums;      // of dQ: see bwd_sums.h
  SumProgress progress;
  TableGrads tables;  // sums: of the first copy
  unsigned table_copies;
  int64_t table_stride;
  float alpha, scale;  // alpha: as much of it as dQ and dK take
  ScoreFactors factors;
};

constexpr int kBwdJobs = 2;  // an item and the next

// Rows of dQ that are complete with an item are converted behind the next but one. Known are those two, the one in work
// and the next.
constexpr int kSumLag = 2, kSumItems = kSumLag + 2;

constexpr int kBwdParts = 2;  // 32 tiles each, found ahead

template <class C>
struct BwdBarriers {
  Gate<kBwdJobs> job;
  Gate<kBwdParts> part;
  ptx::Mbarrier wanted;
  Gate<C::kKeyStages> key;
  Gate<C::kValueStages> value;
  Gate<C::kQueryStages> query;
  Gate<C::kGradStages> grad;
  Gate<C::kScoreStages> score;
  Gate<2> slope;
  Gate<C::Notes::kTiles> notes;
  Gate<C::kBiasStages> bias;
  Gate<1> sum[C::kSumStages];
  ptx::Mbarrier finished[kSumItems];

  __device__ void init() {
    constexpr int kSummers = C::kTables ? 4 : 0;
    job.init(1, C::kGroups + 1 + C::kBias + kSummers), part.init(1, 1 + C::kBias), wanted.init(1);
    key.init(1, C::kGroups), value.init(1, C::kGroups);
    query.init(1, C::kGroups), grad.init(1, C::kGroups);
    score.init(C::kSplitKeys ? 4 * C::kGroups : 4, (C::kTurns ? 1 : C::kGroups) + kSummers);
    slope.init(4, 4), notes.init(1, 1), bias.init(32 + 1, (C::kSplitKeys ? C::kGroups : 1) + kSummers);
    for (Gate<1>& s : sum) s.init(4, 1);
    for (ptx::Mbarrier& b : finished) b.init(1);
    ptx::fence_mbarrier_init();
  }
};

// A part of dQ that waits in shared memory to be added.
struct SumJob {
  unsigned item;  // its number
  BwdTile tile;
  int last;  // for how many places of the block this is the item's last part; negative: the block is done
};

// Where an item's sums of dQ go, and the rows that are complete with it.
struct SumRows {
  float* sums;        // of the sequence
  unsigned* written;  // of a tile's part: 1 + the last block that wrote it or added to it (if ordered), else 0
  unsigned* added;    // places of this item that are through; those of the blocks before it are in front
  int block;          // of keys
  int num_q;
  int begin, end, head;  // rows of the sequence
  int64_t row;           // number `begin` in grad_q
};

// Of the noting warp.
struct BwdProgress {
  Count items, parts, tiles;  // so far
  unsigned left;              // tiles of the part: a bit each
  bool some;                  // of the item so far
};

template <class C>
struct BwdState {
  BwdBarriers<C> barrier;
  BwdJob jobs[kBwdJobs];
  BwdRows<C> rows[kBwdJobs];
  BwdColumns columns[C::Notes::kTiles];
  BwdProgress progress;
  TilePart parts[kBwdParts];
  BwdTile tiles[C::kTileStages];
  SumJob sums[C::kSumStages];
  SumRows sum_rows[C::kQuerySums ? kSumItems : 1];
};

template <class C, class T>
struct BwdStorage {
  using Panel = SmemTile<T, kPanel>;  // its swizzle is the copy engine's

  BwdState<C>& state;
  uint32_t base;
  const Origin<true> origin;

  static constexpr int kValues = C::kKeyStages * C::kKeyBytes, kQueries = kValues + C::kValueStages * C::kKeyBytes,
                       kGrads = kQueries + C::kQueryStages * C::kQueryBytes,
                       kScores = kGrads + C::kGradStages * C::kQueryBytes,
                       kSlopes = kScores + C::kScoreStages * C::kScoreBytes,
                       kSums = kSlopes + C::kSlopeStages * C::kSlopeBytes, kBias = kSums + C::kSumStages * C::kSumBytes;

  __device__ BwdStorage(BwdState<C>& state, const unsigned char* memory)
      : state(state), base((static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u), origin(base) {}
  __device__ ptx::Descriptor descriptor(uint32_t panel, int panel_bytes = 16) const {
    return origin.descriptor(base, panel, panel_bytes);
  }
  __device__ Panel key_panel(int stage, int panel) const {
    return {base + stage * C::kKeyBytes + panel * C::kKeys * 128};
  }
  __device__ Panel value_panel(int stage, int panel) const {
    return {base + kValues + stage * C::kKeyBytes + panel * C::kKeys * 128};
  }
  __device__ Panel query_panel(int stage, int panel) const {
    return {base + kQueries + stage * C::kQueryBytes + panel * C::kQueries * 128};
  }
  __device__ Panel grad_panel(int stage, int panel) const {
    return {base + kGrads + stage * C::kQueryBytes + panel * C::kQueries * 128};
  }
  // dS: rows are keys, 64 queries a panel.
  __device__ Panel score_panel(int stage, int panel) const {
    return {base + kScores + stage * C::kScoreBytes + panel * C::kKeys * 128};
  }
  __device__ uint32_t slopes(int stage) const { return base + kSlopes + stage * C::kSlopeBytes; }
  __device__ BiasMemory<C> bias() const { return {base + kBias}; }
  // Where a tile's scores wait: free when score.empty or slope.empty says so, or always.
  __device__ uint32_t scratch(Count tile) const {
    return C::kQuerySums   ? score_panel(tile.stage<C::kScoreStages>(), 0).base
           : C::kSplitKeys ? bias().end()
                           : slopes(tile.stage<2>());
  }
  __device__ TableSumMemory table_sums(int warp) const { return {bias().end() + warp * TableSumMemory::kBytes}; }
  __device__ uint32_t boundaries() const { return table_sums(4).base; }
  __device__ uint32_t sums(int stage) const { return base + kSums + stage * C::kSumBytes; }
};

}  // namespace hstu_ops::cuda::sm90
