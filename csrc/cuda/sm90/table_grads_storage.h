// What the roles of the Hopper kernel for gradients of bias tables share: arguments, barriers and shared memory.
//
// Barriers, each with the arrivals that complete it:
//
//   job_full    the finding warp               job_empty    each computing warp, and the loading warp
//   part_full   the finding warp               part_empty   the loading warp
//   wanted      the loading warp, near the end of a job: the next may be claimed
//   tiles       the loading lane twice: the bytes of all four tensors; of a step's first head, times
//   query_empty each computing warp            key_empty    each computing warp, as many steps later as its group says
#pragma once

#include <cuda.h>

#include "core/params.h"
#include "cuda/sm90/gate.h"
#include "cuda/sm90/ring.h"
#include "cuda/sm90/table_grads_items.h"
#include "cuda/sm90/tickets.h"
#include "cuda/tile/table_grad.h"

namespace hstu_ops::cuda::sm90 {

struct TableArguments {
  CUtensorMap q, k, v, grad_out;
  AttentionBwdParams params;
  Schedule schedule;
  Tickets tickets;
  TableGrads tables;
  void* cells;      // of WideCells
  float4* cleared;  // to be zeroed beside all else: sums of dQ (bwd_sums.h), or none
  int64_t cleared_count;
  int heads;    // whose dS are added up before they are summed: more than one only where they share the tables
  float alpha;  // times the argument of SiLU
};

constexpr int kTableJobs = 2, kTableParts = 2;

template <class C>
struct TableState {
  Gate<kTableJobs> job;
  Gate<kTableParts> part;
  ptx::Mbarrier wanted;
  ptx::Mbarrier tiles[C::kSteps], query_empty[C::kQueryStages], key_empty[C::kKeyStages];
  TableJob jobs[kTableJobs];
  StepPart parts[kTableParts];
  StepTile steps[C::kSteps];
  Job item;                 // of the finding warp, which may have more bands of it
  bool rising;              // see TableJob
  volatile bool found_all;  // there are no more jobs

  __device__ void init() {
    found_all = false;
    job.init(1, C::kWarps + 1), part.init(1, 1), wanted.init(1);
    for (ptx::Mbarrier& b : tiles) b.init(2);
    for (ptx::Mbarrier& b : query_empty) b.init(C::kWarps);
    for (ptx::Mbarrier& b : key_empty) b.init(C::kWarps);
    ptx::fence_mbarrier_init();
  }
};

template <class C>
struct TableStorage {
  TableState<C>& state;
  unsigned char* memory;
  uint32_t base;

  __device__ TableStorage(TableState<C>& state, unsigned char* start) : state(state) {
    base = (static_cast<uint32_t>(__cvta_generic_to_shared(start)) + 1023) & ~1023u;
    memory = start + (base - static_cast<uint32_t>(__cvta_generic_to_shared(start)));
  }
  // Of tiles number `count`: queries and dO behind them; keys and values.
  __device__ uint32_t query(unsigned count) const { return stage(count % C::kQueryStages); }
  __device__ uint32_t key(unsigned count) const { return stage(C::kQueryStages + count % C::kKeyStages); }
  __device__ uint32_t stage(unsigned number) const { return base + number * (2 * C::kTileBytes); }
  __device__ void* cells() const { return memory + 2 * (C::kQueryStages + C::kKeyStages) * C::kTileBytes; }
  __device__ TableSlots<C> slots(int warp) const {
    return {stage(C::kQueryStages + C::kKeyStages) + TimeTerm::kSharedBytes + warp * C::kWarpBytes};
  }
  __device__ TableNotes notes(int warp) const { return {slots(warp).base + C::kNotes}; }
  __device__ BucketSums buckets(int warp) const { return {slots(warp).base + C::kBuckets}; }
  __device__ StepTimes times(unsigned stage) const { return {window(C::kGroups).base + stage * StepTimes::kBytes}; }
  __device__ StepTimes query_times(unsigned step) const { return times(step % C::kSteps); }
  __device__ StepTimes key_times(unsigned step) const { return times(C::kSteps + step % C::kSteps); }
  __device__ CellBuckets<typename C::Cells> cell_buckets() const { return {times(2 * C::kSteps).base}; }
  __device__ TableWindow window(int group) const { return {slots(C::kWarps).base + group * TableWindow::kBytes}; }
};

}  // namespace hstu_ops::cuda::sm90
