// The Hopper backward's scratch memory.
#pragma once

#include <cstddef>

#include "core/params.h"

namespace hstu_ops::cuda::sm90 {

// Is dQ added up in global memory, or found by a kernel of its own? Beyond 128 dimensions a block has room for 64 keys
// only, so that sums of dQ are more than an L2 can add; and sums have no order.
constexpr bool bwd_sums_queries(int padded_dim, bool deterministic) { return padded_dim <= 128 && !deterministic; }

struct BwdScratch {
  void *key_tickets, *query_tickets, *bias_tickets;  // see tickets.h
  float* sums;  // [heads][padded dim / 64][total_q][64] of dQ, or none: see bwd_sums.h
  size_t sum_bytes, bytes;

  // `memory` may be null when only the size matters.
  BwdScratch(const AttentionBwdParams& p, int padded_dim, void* memory) {
    constexpr size_t kHeader = 256;
    const AttentionProblem& a = p.problem;
    char* at = static_cast<char*>(memory);
    key_tickets = at;
    query_tickets = at ? at + kHeader / 2 : nullptr;
    bias_tickets = at ? at + kHeader / 4 : nullptr;
    sums = at ? reinterpret_cast<float*>(at + kHeader) : nullptr;
    sum_bytes = bwd_sums_queries(padded_dim, p.deterministic)
                    ? static_cast<size_t>(a.jagged.total_q) * a.heads * padded_dim * sizeof(float)
                    : 0;
    bytes = kHeader + sum_bytes;
  }
};

}  // namespace hstu_ops::cuda::sm90
