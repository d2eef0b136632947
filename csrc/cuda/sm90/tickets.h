// Numbers handed out to the blocks of a launch, each once: whoever is free takes the next item.
//
// The memory holds anything at the start, so block 0 writes the counters and then a tag that no other launch has;
// everybody else waits for the tag. Whoever asks last takes it away, so that a replay of the same launch starts anew.
//
// Where items wait for earlier ones, a block must not have one before it runs: others would wait for as long as other
// kernels keep it from its processor. There the host clears the memory, and blocks ask for their first number, too.
#pragma once

#include <atomic>
#include <cstdint>

#include "cuda/ptx/cluster.h"
#include "cuda/ptx/memory.h"
#include "cuda/tile/layout.h"

namespace hstu_ops::cuda::sm90 {

struct TicketCounters {
  unsigned long long tag;
  unsigned next, done;
};

class Tickets {
 public:
  // `memory`: room for TicketCounters; null: each block (or cluster) takes one item, that of its number.
  explicit Tickets(void* memory) : counters_(static_cast<TicketCounters*>(memory)) {
    static std::atomic<unsigned long long> launches{0};
    unsigned long long x = ++launches * 0x9e3779b97f4a7c15ull;  // mixed: small numbers are what memory is full of
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    tag_ = x ^ x >> 27;
  }

  // The same from memory that is cleared before each launch.
  static Tickets of_cleared(void* memory) {
    Tickets t;
    t.counters_ = static_cast<TicketCounters*>(memory);
    return t;
  }

  // Has each block (or cluster) a first number of its own?
  __device__ bool has_own() const { return tag_ != 0; }
  // Once in block 0, before anyone can get a ticket.
  __device__ void open() const {
    if (!counters_ || !has_own()) return;
    counters_->next = gridDim.x, counters_->done = 0;
    ptx::st_release(&counters_->tag, tag_);
  }
  // The next number, by a warp; a block's first is its own.
  __device__ int64_t take(bool is_first) const {
    if (is_first) return first();
    await_open();
    return next();
  }
  // The same in steps, for those who have something else to do meanwhile: the first where has_own(), the second once,
  // before the third.
  __device__ int64_t first() const { return blockIdx.x / ptx::cluster_size(); }
  __device__ void await_open() const {
    if (counters_ && has_own() && lane_id() == 0) await_tag();
    __syncwarp();
  }
  __device__ unsigned ask() const { return counters_ && lane_id() == 0 ? atomicAdd(&counters_->next, 1u) : 0; }
  __device__ int64_t answer(unsigned asked) const { return counters_ ? __shfl_sync(~0u, asked, 0) : INT64_MAX; }
  __device__ int64_t next() const { return answer(ask()); }
  // Once in each block, by one lane, when it has taken its last.
  __device__ void close() const {
    if (!counters_ || !has_own()) return;
    await_tag();  // block 0 would not know of who was done before it counted
    if (atomicAdd(&counters_->done, 1u) == gridDim.x - 1) counters_->tag = 0;
  }

 private:
  Tickets() = default;
  __device__ void await_tag() const {
    while (ptx::ld_acquire(&counters_->tag) != tag_) {
    }
  }

  TicketCounters* counters_ = nullptr;
  unsigned long long tag_ = 0;  // 0: cleared
};

}  // namespace hstu_ops::cuda::sm90
