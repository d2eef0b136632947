// The Hopper forward's scratch memory.
#pragma once

#include <cstddef>

#include "core/params.h"
#include "cuda/sm90/fwd_bias_cells.h"
#include "cuda/sm90/tickets.h"
#include "cuda/tile/scratch.h"

namespace hstu_ops::cuda::sm90 {

struct FwdScratch {
  void *tickets, *cells;  // see tickets.h and WideCells
  size_t cell_bytes, bytes;

  // `memory` may be null when only the size matters.
  FwdScratch(const AttentionProblem& a, int padded_dim, void* memory) {
    Scratch scratch(memory);
    tickets = scratch.take(sizeof(TicketCounters));
    cell_bytes = padded_dim == 256 ? wide_cell_bytes(a) : 0;
    cells = scratch.take(cell_bytes);
    bytes = scratch.bytes();
  }
};

}  // namespace hstu_ops::cuda::sm90
