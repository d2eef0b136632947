// Order among blocks of threads for a bitwise reproducible dQ: blocks of keys add to a block of queries one after
// another, lowest keys first. Work items are taken by ticket in that order, so whoever is waited for has started
// already.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda {

// The next work item in the order blocks ask for them, or `otherwise` if there is no counter. Called by all threads.
__device__ __forceinline__ int64_t take_ticket(unsigned* counter, int64_t otherwise) {
  if (!counter) return otherwise;
  __shared__ unsigned ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(counter, 1u);
  __syncthreads();
  const int64_t at = ticket;
  __syncthreads();
  return at;
}

// Do the rows of sequences follow one another, so that every block of queries has a counter of its own? Called by all
// threads.
__device__ __forceinline__ bool in_order(const IntArray& offsets, int batch, int64_t total) {
  bool yes = true;
  for (int b = threadIdx.x; b < batch; b += blockDim.x)
    yes = yes && clamped_offset(offsets, b, batch, total) <= clamped_offset(offsets, b + 1, batch, total);
  return __syncthreads_and(yes);
}

class Turn {
 public:
  __device__ __forceinline__ Turn(unsigned* counters, const Job& job, int query_block, int queries, int keys,
                                  const AttentionProblem& a)
      : counter_(nullptr) {
    if (!job.ordered) return;
    const Mask& mask = job.sequence.mask;
    const int m0 = job.sequence.first_row + query_block * queries;
    const RowSpans spans = mask.rows(m0, m0 + queries);
    int before = 0;
    for (int n = 0; n < job.item.block; n += 32) {
      const int block = n + lane_id(), n0 = block * keys;
      before += __popc(__ballot_sync(~0u, block < job.item.block && spans.meets(n0, min_int(n0 + keys, mask.len))));
    }
    order_ = before;
    const int64_t slot = job.sequence.begin_q / queries + job.item.sequence + query_block;
    counter_ = counters + slot * a.heads + job.item.head;
  }

  __device__ __forceinline__ void wait() const {
    if (!counter_) return;
    if (threadIdx.x == 0)
      while (ptx::ld_acquire(counter_) < order_) {
      }
    __syncthreads();
  }
  __device__ __forceinline__ void pass() const {
    if (!counter_) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(counter_, 1u);
  }

 private:
  unsigned* counter_;
  unsigned order_ = 0;
};

}  // namespace hstu_ops::cuda
