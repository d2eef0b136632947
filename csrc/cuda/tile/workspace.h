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
  TableSums position, time;
  size_t bytes = 0;

  // `base` may be null when only the size matters.
  static BwdWorkspace plan(const AttentionBwdParams& p, int padded_dim, int block_rows, void* base) {
    BwdWorkspace w;
    const AttentionProblem& a = p.problem;
    char* const start = static_cast<char*>(base);
    const auto take = [&](size_t bytes) {
      void* at = start ? start + w.bytes : nullptr;
      w.bytes += (bytes + 255) / 256 * 256;
      return at;
    };
    w.grad_q = static_cast<float*>(take(static_cast<size_t>(a.jagged.total_q) * a.heads * padded_dim * sizeof(float)));
    if (p.deterministic) {
      const size_t blocks = static_cast<size_t>(a.jagged.total_q / block_rows + a.jagged.batch) * a.heads;
      w.turns = static_cast<unsigned*>(take(blocks * sizeof(unsigned)));
      w.ticket = static_cast<unsigned*>(take(sizeof(unsigned)));
    }
    const auto table = [&](void* grad, int entries, int64_t stride) {
      TableSums t;
      if (!grad) return t;
      t.sums = static_cast<float*>(grad);
      t.head_stride = stride ? entries : 0;
      t.entries = stride ? static_cast<int64_t>(entries) * a.heads : entries;
      if (p.deterministic || a.dtype == DType::kFloat32)  // fp32 sums of thousands of fp32 values would be too coarse
        t.words = static_cast<unsigned long long*>(
            take(static_cast<size_t>(t.entries) * TableSums::kWords * sizeof(unsigned long long)));
      return t;
    };
    w.position = table(p.grad_position_weight, 2 * a.relative.positions - 1, a.relative.position_head_stride);
    w.time = table(p.grad_time_weight, a.relative.num_boundaries + 1, a.relative.time_head_stride);
    return w;
  }
};

}  // namespace hstu_ops::cuda
