// The warps of the Hopper forward that work ahead of the loading one: which item comes next, and what its rows keep.
#pragma once

#include "cuda/sm90/fwd_storage.h"
#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda::sm90 {

// An item is taken as late as its keys can still arrive in time (FwdItem::paced): what a block has taken, nobody else
// can do, and the end of a launch would be out of balance by that much (18 % of it with two items taken ahead, N 1024).
// Only where nearly all are so short that finding them binds (`early`) is the next but one taken while the next is
// being found.
template <class C, class T>
__device__ void find_items(const FwdArguments& arguments, const FwdStorage<C, T>& shared) {
  const AttentionProblem& problem = arguments.params.problem;
  const Tickets& tickets = arguments.tickets;
  WorkFinder<C::kRows, false> finder(arguments.schedule);
  int64_t ticket = tickets.first();
  unsigned wanted = 0, asked = 0;
  bool early = false;
  for (Ring<kItems> at;;) {
    FwdItem<C>& job = shared.items[at.stage];
    WorkItem item = finder.find(ticket);
    item.head *= C::kHeads;
    const bool more = item.block >= 0;
    if (early && more) asked = tickets.ask();
    if (more)
      job.set(item, load_sequence(problem.jagged, problem.mask, item.sequence), ticket, ptx::cluster_rank(),
              ptx::cluster_size());
    if (lane_id() == 0) job.more = more;
    __syncwarp();
    if (lane_id() == 0) shared.barrier.item.full[at.stage].arrive();
    if (!more) break;
    at.next();
    if (ticket == tickets.first()) tickets.await_open();
    const bool paced = job.paced();
    if (paced) shared.barrier.item_wanted.wait(wanted), wanted ^= 1;
    shared.barrier.item.empty[at.stage].wait(at.round ^ 1);
    ticket = tickets.answer(early ? asked : tickets.ask());
    early = C::kSpans && arguments.early && !paced;
  }
  if (lane_id() == 0) tickets.close();
}

// What each row of an item keeps, {end of the prefix, begin and end of the window, begin of the group}: worked out by
// the computing warps, it costs every masked tile a quarter of its time. Two buffers: that of the item before the last
// is free when that item is done.
template <class C, class T>
__device__ void write_spans(const FwdStorage<C, T>& shared) {
  Ring<kItems> older;
  bool second = false, third = false;  // item of the block, at least
  for (Ring<kItems> at;; at.next()) {
    shared.barrier.item.full[at.stage].wait(at.round);
    const FwdItem<C>& item = shared.items[at.stage];
    if (!item.more) return;
    if (third) shared.barrier.item.empty[older.stage].wait(older.round), older.next();
    third = second, second = true;
    const Sequence& s = item.job.sequence;
#pragma unroll 1
    for (int row = lane_id(); row < C::kRows; row += 32) {
      const int i = s.first_row + item.first + row;
      const RowSpans r = s.mask.row(i);
      const int group = r.group.lo < r.group.hi ? r.group.lo : i + 1;  // it ends with its own row
      ptx::st_shared(shared.row_spans(at.parity(), row), make_uint4(r.prefix.hi, r.window.lo, r.window.hi, group));
    }
    __syncwarp();
    if (lane_id() == 0) shared.barrier.spans_full[at.stage].arrive();
  }
}

}  // namespace hstu_ops::cuda::sm90
