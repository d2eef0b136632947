// The Hopper backward's scratch memory, all of it zero when the kernel starts.
#pragma once

#include <cstddef>

#include "core/params.h"

namespace hstu_ops::cuda::sm90 {

struct BwdScratch {
  unsigned* ticket;  // next work item
  float* sums;       // [heads][padded dim / 64][total_q][64] of dQ: see bwd_sums.h
  size_t bytes;

  // `memory` may be null when only the size matters.
  BwdScratch(const AttentionProblem& a, int padded_dim, void* memory) {
    constexpr size_t kHeader = 256;
    ticket = static_cast<unsigned*>(memory);
    sums = memory ? reinterpret_cast<float*>(static_cast<char*>(memory) + kHeader) : nullptr;
    bytes = kHeader + static_cast<size_t>(a.jagged.total_q) * a.heads * padded_dim * sizeof(float);
  }
};

}  // namespace hstu_ops::cuda::sm90
