// The warps of the Hopper backward that sum gradients of relative bias tables (kTables), out of dS', which the
// computing warps leave in shared memory for dQ: a warp each of 32 keys. They have few registers, and keep in shared
// memory what lasts longer than a few instructions. Blocks of threads add to several copies of the tables, as additions
// to one address wait for each other; who converts the sums of dQ (bwd_sums.h) adds the copies up.
#pragma once

#include "cuda/sm90/bwd_tables_position.h"
#include "cuda/sm90/bwd_tables_time.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T>
struct TableSummer : TableWarp<C, T> {
  using Warp = TableWarp<C, T>;
  using Warp::arguments, Warp::done, Warp::items, Warp::kCarried, Warp::kItems, Warp::lane, Warp::put, Warp::shared,
      Warp::tile, Warp::tiles, Warp::warp;

  __device__ __forceinline__ void run() {
    BwdBarriers<C>& barrier = shared.state.barrier;
    put(kItems, 0), put(kCarried, -1);
    if (has_times()) times().begin();
#pragma unroll 1
    for (;; put(kItems, items().count + 1)) {
      barrier.job.full[items().template stage<kBwdJobs>()].wait(items().template round<kBwdJobs>());
      if (!shared.state.jobs[items().template stage<kBwdJobs>()].more) break;
      begin_item();
#pragma unroll 1
      for (bool last = false; !last;) last = next_tile();
      if (has_positions()) positions().finish();
      if (has_times()) times().end_item();
      arrive(barrier.job.empty[items().template stage<kBwdJobs>()]);
    }
  }

 private:
  __device__ bool has_positions() const { return arguments.tables.position.sums; }
  __device__ bool has_times() const { return arguments.tables.time.sums; }
  __device__ PositionSums<C, T> positions() const { return {*this}; }
  __device__ TimeSums<C, T> times() const { return {*this}; }

  __device__ __forceinline__ void arrive(ptx::Mbarrier& barrier) const {
    __syncwarp();
    if (lane() == 0) barrier.arrive();
  }

  __device__ __forceinline__ void begin_item() const {
    const Job& job = this->job();
    const ScaleParams& s = arguments.params.problem.scale;
    float f = arguments.scale;
    if (s.values) f = s.per_row ? 1.f : static_cast<const float*>(s.values)[job.item.sequence];  // a row's is in dS'
    put(Warp::kFactor, __float_as_int(f * Score<T>::kSlope));
    put(Warp::kDistance, Warp::first_key(job) + warp() * Warp::kKeys - job.sequence.first_row);
    this->put_table(Warp::kPosition, arguments.tables.position);
    if (!has_times()) return;
    this->put_table(Warp::kTime, arguments.tables.time);
    times().begin_item();
  }

  // Was it the item's last?
  __device__ __forceinline__ bool next_tile() {
    BwdBarriers<C>& barrier = shared.state.barrier;
    barrier.score.full[tiles().template stage<C::kScoreStages>()].wait(tiles().template round<C::kScoreStages>());
    if (tile().kept(warp() * Warp::kKeys / 64)) {
      if (has_positions()) positions().sum_tile(notes() & WarpNote::kClamped);
      if (has_times()) times().sum_tile(notes() & WarpNote::kUnknown);
    }
    const bool last = tile().last();
    arrive(barrier.score.empty[tiles().template stage<C::kScoreStages>()]);
    if (lane() == 0) barrier.bias.empty[tiles().template stage<C::kBiasStages>()].arrive();
    ++done;
    return last;
  }
  // Bits of the notes of the warp's keys.
  __device__ __forceinline__ unsigned notes() const {
    unsigned bits = 0;
#pragma unroll
    for (int n = 0; n < Warp::kKeys / 16; ++n) bits |= this->stage().note(warp() * (Warp::kKeys / 16) + n).head().x;
    return ptx::uniform(bits);
  }
};

}  // namespace hstu_ops::cuda::sm90
