// Order among blocks of threads for a bitwise reproducible dQ: blocks of keys add to a block of queries one after another,
// lowest keys first. Work items are taken by ticket in that order, so whoever is waited for has started already.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda {

// Work items in the order blocks ask for them, or by block index if there is no counter.
class Tickets {
 public:
  __device__ explicit Tickets(unsigned* counter) : counter_(counter), at_(blockIdx.x) {}

  __device__ __forceinline__ int64_t next() {
    if (!counter_) {
      const int64_t at = at_;
      at_ += gridDim.x;
      return at;
    }
    __shared__ unsigned ticket;
    if (threadIdx.x == 0) ticket = atomicAdd(counter_, 1u);
    __syncthreads();
    const int64_t at = ticket;
    __syncthreads();
    return at;
  }

 private:
  unsigned* counter_;
  int64_t at_;
};

class Turn {
 public:
  __device__ __forceinline__ Turn(unsigned* counters, const Job& job, int query_block, int queries, int keys, const AttentionProblem& a)
      : counter_(nullptr) {
    if (!counters) return;
    const Mask& mask = job.sequence.mask;
    const int m0 = job.sequence.first_row + query_block * queries;
    const RowSpans spans = mask.rows(m0, m0 + queries);
    int before = 0;
    for (int n = 0; n < job.item.block; n += 32) {
      const int block = n + lane_id(), n0 = block * keys;
      before += __popc(__ballot_sync(~0u, block < job.item.block && spans.meets(n0, min_int(n0 + keys, mask.len))));
    }
    order_ = before;
    // One counter for every block of queries as long as offsets do not fall; otherwise collisions end the wait, see wait().
    const int64_t slots = a.jagged.total_q / queries + a.jagged.batch;
    const int64_t slot = job.sequence.begin_q / queries + job.item.sequence + query_block;
    counter_ = counters + min(slot, slots - 1) * a.heads + job.item.head;
  }

  // Ill-formed offsets make sequences share counters: then a count can pass without being seen, so `>=` ends the wait, and a
  // count that is never reached is waited for only so long.
  __device__ __forceinline__ void wait() const {
    if (!counter_) return;
    if (threadIdx.x == 0) {
      constexpr int64_t kPatience = int64_t{1} << 32;  // clocks: two seconds
      const int64_t start = clock64();
      while (ptx::ld_acquire(counter_) < order_ && clock64() - start < kPatience) {
      }
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
