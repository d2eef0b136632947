// The warps of the Hopper backward that add parts of dQ to its sums in global memory (bwd_sums.h), and, where
// kFinishes, how rows become complete and are converted without another kernel.
//
// Items of a sequence and head are taken in order of their blocks of keys, and each walks the queries from the last to
// the first. The first block that keeps some of a tile writes it, and the others wait until it has or, where kOrdered,
// until the block before has had its turn: nothing needs clearing. Rows that no later block adds to are complete when
// this block and those before it are through; the computing warpgroups convert them behind the next item but one, for
// they are through by then. Who waits, waits for items taken earlier, by blocks that run: one of all always goes on.
#pragma once

#include "cuda/ptx/dependent.h"
#include "cuda/ptx/tma.h"
#include "cuda/sm90/bwd_storage.h"
#include "cuda/sm90/bwd_store.h"
#include "cuda/sm90/bwd_sums.h"
#include "cuda/sm90/ring.h"

namespace hstu_ops::cuda::sm90 {

// ---- the finding warp ----

constexpr int kSumPlaces = 2;  // of a block of threads; each has parts of every item's dQ, or one of them all

template <class C>
__device__ __forceinline__ void set_sum_rows(const BwdArguments& arguments, const Job& job, SumRows& to) {
  static_assert(C::kQueries == SumProgress::kTile && C::kKeys >= SumProgress::kLeastKeys, "places are within bounds");
  const AttentionProblem& a = arguments.params.problem;
  const SumProgress& progress = arguments.progress;
  const Sequence& s = job.sequence;
  const int block = job.item.block, head = job.item.head, parts = C::kPanels;
  to.sums = arguments.sums + sum_row(a.jagged.total_q, parts, head, 0, s.begin_q), to.num_q = s.num_q;
  if (!C::kFinishes) return;
  to.written = progress.written + (head * progress.tiles + s.begin_q / C::kQueries + job.item.sequence) * parts;
  to.added = progress.added + head * progress.blocks + s.begin_kv / C::kKeys + job.item.sequence + block;
  // Those of its keys: there is a query for each key, and none looks ahead (bwd_finishes_sums).
  to.block = block, to.begin = block * C::kKeys, to.end = min_int(to.begin + C::kKeys, s.num_q);
  to.head = head, to.row = s.begin_q + to.begin;
}

// ---- the adding warps ----

// Which of 32 tiles of an item, from the last one asked for down, it may add to: written at all or, where kOrdered, by
// the block before.
template <class C>
struct WrittenTiles {
  int anchor = 0;
  unsigned known = 0;

  __device__ bool has(int tile) const {
    const unsigned bit = anchor - tile;
    return bit < 32 && (known >> bit & 1);
  }
  __device__ __forceinline__ void ask(const unsigned* written, int tile, int block) {
    const int mine = tile - lane_id(), least = C::kOrdered ? block : 1;
    const bool there = mine >= 0 && static_cast<int>(ptx::ld_acquire(written + mine * C::kPanels)) >= least;
    anchor = tile, known = __ballot_sync(~0u, there);
    __syncwarp();
    ptx::fence_proxy_async_global();  // what comes next is the copy engine's
  }
};

// A warp that adds what waits in kPlaces places from `first` on, which are used in turn. Where kFinishes, the first of
// these warps also says which items' rows are complete, as long as nothing waits.
template <int kPlaces, class C, class T>
struct SumAdder {
  const BwdArguments& arguments;
  const BwdStorage<C, T>& shared;
  const int first;
  WrittenTiles<C> others;
  unsigned item = 0, finished = 0;  // what was added last belongs to; whose rows are the next to become complete

  __device__ void run() {
    if (C::kBias) ptx::wait_for_prerequisites();  // the sums are cleared
#pragma unroll 1
    for (Ring<kPlaces> ring;; ring.next()) {
      const int place = first + ring.stage;
      Gate<1>& gate = shared.state.barrier.sum[place];
      if (C::kFinishes && first == 0)
#pragma unroll 1
        while (finished != item && !gate.full[0].ready(ring.round)) ask_finished();
      gate.full[0].wait(ring.round);
      const SumJob job = shared.state.sums[place];
      if (job.item != item) item = job.item, others.known = 0;
      if (job.last < 0) break;
      add(job, place, gate);
    }
    if (C::kFinishes && first == 0)
#pragma unroll 1
      while (finished != item) ask_finished();
    ptx::bulk_wait<0>();
  }

  // Are this item's block and those before it through?
  __device__ __forceinline__ void ask_finished() {
    const SumRows& rows = shared.state.sum_rows[finished % kSumItems];
    bool there = true;
#pragma unroll 1
    for (int block = lane_id(); block <= rows.block; block += 32)
      there = there && ptx::ld_acquire(rows.added - block) >= kSumPlaces;
    if (!__all_sync(~0u, there)) return;
    __syncwarp();
    if (lane_id() == 0) shared.state.barrier.finished[finished % kSumItems].arrive();
    ++finished;
  }

  __device__ __forceinline__ void add(const SumJob& job, int place, Gate<1>& gate) {
    const SumRows& rows = shared.state.sum_rows[job.item % kSumItems];
    const int tile = job.tile.tile(), row = tile * C::kQueries, part = C::kPanels == 1 ? 0 : place;
    const int bytes = job.tile.visited() ? clamp_int(rows.num_q - row, 0, C::kQueries) * kPanel * 4 : 0;
    const bool is_first = C::kFinishes && job.tile.first();
    unsigned *written = rows.written + part, *added = rows.added;
    if (C::kFinishes && !is_first && bytes > 0)
      while (!others.has(tile)) others.ask(written, tile, rows.block);
    if (lane_id() == 0) {
      float* to = rows.sums + (part * arguments.params.problem.jagged.total_q + row) * kPanel;
      if (bytes > 0) {
        is_first ? ptx::bulk_store(to, shared.sums(place), bytes) : ptx::bulk_add(to, shared.sums(place), bytes);
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
      }
      gate.empty[0].arrive();
      const bool tells = is_first || (C::kOrdered && bytes > 0);
      if (C::kFinishes && (tells || job.last > 0)) {
        ptx::bulk_wait<0>();
        ptx::fence_proxy_async_global();
        // The largest: sequences that overlap, as ill-formed offsets make them, must not take a turn back.
        if (tells) ptx::red_release_max(written + tile * C::kPanels, rows.block + 1);
        if (job.last > 0) ptx::red_release(added, job.last);
      }
    }
    __syncwarp();
    // The next one, as long as there is time.
    if (C::kFinishes && !is_first && tile > 0 && !others.has(max_int(tile - 2, 0)))
      others.ask(written, tile - 1, rows.block);
  }
};

// ---- a computing warpgroup ----

// A lane's share of 16 rows whose sums are complete: of an item's, each warpgroup has 64 and each warp 16.
template <class C, class T>
struct FinishedRows {
  float4 x[C::kPanels][8];

  __device__ static int first_row(int group) { return group * 64 + ptx::thread_index() % 128 / 32 * 16; }

  // Requested: 64 columns of rows first, first + 1... of rows.begin on; lanes 16 to 31 have the odd ones. For those
  // that do not exist another is read, not used: a condition would take more registers.
  __device__ __forceinline__ void load(const SumRows& rows, int64_t total, int first, int part) {
    const int lane = ptx::thread_index() % 32, last = max_int(rows.end - rows.begin - 1, 0),
              row = min_int(first + lane / 16, last);
    const float* from = rows.sums + (part * total + rows.begin + row) * kPanel + lane % 16 * 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[part][i] = ptx::ld_global_v4(from);
      if (row + 2 * i + 2 <= last) from += 2 * kPanel;
    }
  }

  __device__ __forceinline__ void store(const SumRows& rows, const AttentionBwdParams& params, int first) const {
    if (first >= rows.end - rows.begin) return;
    const GlobalRows<T> to(params.grad_q, rows.row, rows.head, params.problem.dim_qk);
    // Columns of the lane's chunk: 16 b + 2 (lane % 4) + {0, 1, 8, 9}.
    const int lane = ptx::thread_index() % 32, block = sum_chunk(rows.row + lane / 16, lane % 16 / 4, 0) / 4;
    const int row = first + lane / 16 + (lane & 2), col = block * 16 + (lane & 1) * 8;
    T* const target = to.data + row * to.row_stride + col;
    by_chunks(to, [&](auto has_chunks) {
#pragma unroll
      for (int part = 0; part < C::kPanels; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 &a = x[part][2 * i], &b = x[part][2 * i + 1];
          uint32_t y[4] = {pack(a.x, a.y, T{}), pack(a.z, a.w, T{}), pack(b.x, b.y, T{}), pack(b.z, b.w, T{})};
          transpose_quad(y);
          const int left = row + 4 * i < rows.end - rows.begin ? to.dim - col - part * kPanel : 0;
          store_chunk(has_chunks, target + 4 * i * to.row_stride + part * kPanel, left,
                      make_uint4(y[0], y[1], y[2], y[3]));
        }
      }
    });
  }
};

}  // namespace hstu_ops::cuda::sm90
