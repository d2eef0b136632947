// The Hopper backward's scratch memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>

#include "core/params.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/fwd_bias_cells.h"
#include "cuda/sm90/tickets.h"
#include "cuda/tile/table_grad.h"

namespace hstu_ops::cuda::sm90 {

// May dQ be added up in global memory, rather than found by a kernel of its own? Beyond 128 dimensions a block has room
// for 64 keys only, so that sums of dQ are more than an L2 can add.
constexpr bool bwd_may_sum_queries(int padded_dim) { return padded_dim <= 128; }

// Are those sums finished by the kernel that adds them (bwd_finish.h)? Right for every mask with a key for each query,
// but slower where a sequence's first block keeps tiles that others reach long before it (windows with a prefix), where
// its last block alone completes rows that look ahead, and where sequences are long at 128 dimensions. Only such a
// kernel can add in a fixed order: in deterministic mode it is faster than a kernel for dQ at any length.
inline bool bwd_finishes_sums(const AttentionBwdParams& p, int padded_dim) {
  constexpr int64_t kLong = 4096;  // mean queries of a sequence
  const AttentionProblem& a = p.problem;
  const JaggedParams& j = a.jagged;
  return !a.relative && !j.offsets_q && !a.looks_ahead() && !a.mask.leaves_gaps() &&
         (p.deterministic || padded_dim < 128 || j.total_q <= kLong * j.batch);
}

inline bool bwd_sums_queries(const AttentionBwdParams& p, int padded_dim) {
  return bwd_may_sum_queries(padded_dim) && (!p.deterministic || bwd_finishes_sums(p, padded_dim));
}

// Does the kernel that sums dQ sum gradients of the bias tables, too (bwd_tables.h)? By bucket of time that pays at 128
// dimensions; by position nearly everywhere, but where one entry has most of the distances: additions to it would wait
// for each other.
inline bool bwd_sums_tables(const AttentionBwdParams& p, int padded_dim) {
  const AttentionProblem& a = p.problem;
  if (p.deterministic || !bwd_may_sum_queries(padded_dim)) return false;
  if (has_many_boundaries(a.relative) || (p.grad_position_weight && !p.distances_fit)) return false;
  if (padded_dim == 128) return p.grad_position_weight || p.grad_time_weight;
  constexpr int64_t kLong = 512;  // mean keys of a sequence
  return p.grad_position_weight && !p.grad_time_weight && a.jagged.total_kv >= kLong * a.jagged.batch;
}

// Is scratch memory cleared that need not be? For compute-sanitizer's initcheck, which does not see what the copy
// engine writes, nor that a word is polled until somebody has written it.
inline bool clears_scratch() {
  static const bool clears = std::getenv("HSTU_OPS_CLEAR_SCRATCH") != nullptr;
  return clears;
}

// Are times looked up in WideCells, for dK, dV and dQ? At 128 dimensions shared memory has room for square roots of 4
// years of minutes: long sequences have more, which would be searched for; short ones are slower with them.
inline bool bwd_has_wide_cells(const AttentionBwdParams& p, int padded_dim) {
  constexpr int64_t kLong = 4096;  // mean keys of a sequence
  const JaggedParams& j = p.problem.jagged;
  return has_many_boundaries(p.problem.relative) &&
         (padded_dim == 256 || (padded_dim == 128 && !p.deterministic && j.total_kv >= kLong * j.batch));
}

// And for the gradient of their table?
inline bool table_grads_have_wide_cells(const AttentionBwdParams& p, int padded_dim) {
  return p.grad_time_weight && padded_dim == 256 && has_many_boundaries(p.problem.relative);
}

// How far the sums of dQ are (bwd_sums.h): zeros before the kernel. Places of sequence b begin at its first row's tile
// or block, plus b.
struct SumProgress {
  static constexpr int kTile = 64, kLeastKeys = 128;  // queries of a tile, keys of a block: set_sum_rows counts on both

  TicketCounters* tickets = nullptr;  // of items
  unsigned* written = nullptr;        // [heads][tiles][parts]
  unsigned* added = nullptr;          // [heads][blocks]
  int64_t tiles = 0, blocks = 0;
  size_t bytes = 0;

  static SumProgress plan(const AttentionProblem& a, int parts, Scratch& scratch) {
    SumProgress p;
    p.tiles = a.jagged.total_q / kTile + a.jagged.batch;
    p.blocks = a.jagged.total_kv / kLeastKeys + a.jagged.batch;
    p.bytes = sizeof(TicketCounters) + (p.tiles * parts + p.blocks) * a.heads * sizeof(unsigned);
    p.tickets = static_cast<TicketCounters*>(scratch.take(p.bytes));
    if (!p.tickets) return p;
    p.written = reinterpret_cast<unsigned*>(p.tickets + 1);
    p.added = p.written + p.tiles * parts * a.heads;
    return p;
  }
};

// Copies of the tables' gradients that blocks of threads add to, and their sums in the end (bwd_sums.h).
struct TableCopies {
  static constexpr int64_t kEntries = 1 << 18;  // of all

  float* sums = nullptr;  // [count][stride]: position and time
  unsigned count = 1;
  int64_t stride = 0;

  static TableCopies plan(const TableGrads& tables, Scratch& scratch) {
    TableCopies c;
    c.stride = tables.entries();
    c.count = static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(kEntries / c.stride, 1), 32));
    c.sums = static_cast<float*>(scratch.take(c.bytes()));
    return c;
  }
  size_t bytes() const { return sizeof(float) * count * stride; }
  // Tables whose sums are the first copy's.
  TableGrads first(TableGrads tables) const {
    if (tables.position.sums) tables.position.sums = sums;
    if (tables.time.sums) tables.time.sums = sums + tables.position.entries;
    return tables;
  }
};

struct BwdScratch {
  void *key_tickets = nullptr, *query_tickets = nullptr, *bias_tickets = nullptr;  // see tickets.h
  void *cells, *table_cells;                                                       // see WideCells
  float* sums = nullptr;  // [heads][padded dim / 64][total_q][64] of dQ, or none: see bwd_sums.h
  SumProgress progress;
  TableGrads tables;
  TableCopies copies;
  size_t sum_bytes = 0, bytes;

  // `memory` may be null when only the size matters.
  BwdScratch(const AttentionBwdParams& p, int padded_dim, void* memory) {
    const AttentionProblem& a = p.problem;
    Scratch scratch(memory);
    for (void** tickets : {&key_tickets, &query_tickets, &bias_tickets})
      *tickets = scratch.take(sizeof(TicketCounters));
    cells = scratch.take(bwd_has_wide_cells(p, padded_dim) ? wide_cell_bytes(a) : 0);
    table_cells = scratch.take(table_grads_have_wide_cells(p, padded_dim) ? wide_cell_bytes(a) : 0);
    if (bwd_sums_queries(p, padded_dim)) {
      const size_t rows = static_cast<size_t>(a.jagged.total_q) * a.heads;
      sum_bytes = rows * padded_dim * sizeof(float);
      sums = static_cast<float*>(scratch.take(sum_bytes));
      progress = SumProgress::plan(a, padded_dim / kPanel, scratch);
    }
    tables = TableGrads::plan(p, scratch);
    if (bwd_sums_tables(p, padded_dim)) copies = TableCopies::plan(tables, scratch);
    bytes = scratch.bytes();
  }
};

}  // namespace hstu_ops::cuda::sm90
