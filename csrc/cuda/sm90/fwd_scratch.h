// The Hopper forward's scratch memory.
#pragma once

#include <cstddef>

#include "core/params.h"
#include "cuda/sm90/fwd_bias_cells.h"
#include "cuda/sm90/tickets.h"
#include "cuda/tile/scratch.h"

namespace hstu_ops::cuda::sm90 {

// Are times looked up in WideCells?
inline bool fwd_has_wide_cells(const AttentionProblem& a, int padded_dim) {
  return padded_dim == 256 && has_many_boundaries(a.relative);
}

struct FwdScratch {
  void *tickets, *cells;  // see tickets.h and WideCells
  size_t cell_bytes, bytes;

  // `memory` may be null when only the size matters.
  FwdScratch(const AttentionProblem& a, int padded_dim, void* memory) {
    Scratch scratch(memory);
    tickets = scratch.take(sizeof(TicketCounters));
    cell_bytes = fwd_has_wide_cells(a, padded_dim) ? wide_cell_bytes(a) : 0;
    cells = scratch.take(cell_bytes);
    bytes = scratch.bytes();
  }
};

}  // namespace hstu_ops::cuda::sm90
