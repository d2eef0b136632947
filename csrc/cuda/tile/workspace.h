// The backward's scratch memory, all of it zero when the kernels start: fp32 sums of dQ, who has added to them, exact
// sums of table gradients. O(total queries) and O(tables).
#pragma once

#include <cstddef>

#include "core/params.h"
#include "cuda/tile/table_grad.h"

namespace hstu_ops::cuda {

struct BwdWorkspace {
  float* grad_q = nullptr;     // total_q * heads * padded dim_qk, in the kernel's order
  unsigned* turns = nullptr;   // [query blocks, heads]: blocks of keys that have added; null: any order will do
  unsigned* ticket = nullptr;  // next work item; null: block index
  TableGrads tables;
  size_t bytes = 0;

  // `base` may be null when only the size matters.
  static BwdWorkspace plan(const AttentionBwdParams& p, int padded_dim, int block_rows, void* base) {
    BwdWorkspace w;
    const AttentionProblem& a = p.problem;
    Scratch scratch(base);
    w.grad_q =
        static_cast<float*>(scratch.take(static_cast<size_t>(a.jagged.total_q) * a.heads * padded_dim * sizeof(float)));
    if (p.deterministic) {
      const size_t blocks = static_cast<size_t>(a.jagged.total_q / block_rows + a.jagged.batch) * a.heads;
      w.turns = static_cast<unsigned*>(scratch.take(blocks * sizeof(unsigned)));
      w.ticket = static_cast<unsigned*>(scratch.take(sizeof(unsigned)));
    }
    w.tables = TableGrads::plan(p, scratch);
    w.bytes = scratch.bytes();
    return w;
  }
};

}  // namespace hstu_ops::cuda
