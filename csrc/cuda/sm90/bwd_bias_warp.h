// What a computing warp of the Hopper backward knows of a relative bias: where its scratch lies, and the buckets of a
// tile before its products begin. Base of BwdBias.
#pragma once

#include "core/bias.h"
#include "cuda/ptx/named_barrier.h"
#include "cuda/sm90/bwd_load.h"
#include "cuda/sm90/bwd_tables.h"
#include "cuda/tile/bias.h"
#include "cuda/tile/score.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T>
struct BwdBiasWarp {
  using Plan = BwdBiasPlan<C::kQueries>;
  static constexpr float kArgument = Score<T>::kArgument;

  const BwdArguments& arguments;
  const BwdStorage<C, T>& shared;
  const Job& job;
  const int thread;  // read anew by each hook: kept, it and what is derived from it would take registers

  __device__ BwdBiasWarp(const BwdArguments& arguments, const BwdStorage<C, T>& shared, const Job& job)
      : arguments(arguments), shared(shared), job(job), thread(ptx::thread_index()) {}

  __device__ int warp() const { return thread / 32 - 4; }
  __device__ int lane() const { return thread % 32; }
  __device__ int row() const { return lane() / 4; }
  __device__ int col() const { return lane() % 4 * 2; }
  __device__ const RelativeBiasParams& params() const { return arguments.params.problem.relative; }
  __device__ uint32_t scratch(int part) const {
    return shared.bias() + Plan::kScratch + warp() * Plan::kWarpBytes + part * Plan::kPartBytes;
  }
  __device__ BiasNotes notes() const { return {shared.bias() + Plan::kNotes, warp()}; }
  __device__ BiasNote note(int tile, int part) const { return notes().at(number(tile, part)); }
  __device__ static int number(int tile, int part) { return tile * (C::kQueries / 64) + part; }
  __device__ TileOrigin origin(int tile, int part) const {
    return {job.sequence.first_row + tile * C::kQueries + part * 64, job.item.block * C::kKeys + warp() * 16};
  }
  __device__ TimeTerm time() const { return TimeTerm(params(), job.sequence, job.item.head, nullptr); }
  __device__ PositionTerm position() const { return PositionTerm(params(), job.item.head); }
  __device__ static bool few(BiasNote note) { return note.steps() != 0 && note.steps() != BiasNote::kMany; }
  __device__ BwdTables<T> tables() const {
    return {arguments, job, lane(), shared.bias() + Plan::kScratch + warp() * Plan::kWarpBytes + Plan::kWindow};
  }

  // One thread a cell, as tile/time_buckets.h describes them.
  __device__ static void make_cells(const BwdArguments& arguments, const BwdStorage<C, T>& shared) {
    const RelativeBiasParams& p = arguments.params.problem.relative;
    const int c = static_cast<int>(threadIdx.x) - 128;
    if (c < Plan::kCells && p.time_weight) {
      const int lo = time_bucket(TimeTerm::first_gap(c), p.time_boundaries, p.num_boundaries),
                hi = time_bucket(TimeTerm::first_gap(c + 1) - 1, p.time_boundaries, p.num_boundaries);
      const int64_t next = hi > lo ? p.time_boundaries[lo] : INT32_MAX;
      ptx::st_shared(shared.bias() + c * 8, static_cast<uint32_t>(next < INT32_MAX ? next : INT32_MAX));
      ptx::st_shared(shared.bias() + c * 8 + 4, static_cast<uint32_t>(hi - lo > 1 ? -1 : lo));
    }
    ptx::named_barrier_sync(3, 256);
  }
  __device__ int2 cell(int gap) const { return ptx::ld_shared_int_v2(shared.bias() + TimeTerm::cell_of(gap) * 8); }

  __device__ void begin() const {
    notes().reset();
    tables().begin();
    __syncwarp();
  }
  __device__ void finish() const {
    if (arguments.time.sums) tables().finish();
  }

  __device__ __forceinline__ void prepare(int tile, bool rising) const {
    notes().template prepare<true, 16, 64>(job.sequence.mask, position(), time(), rising, number(tile, 0),
                                           origin(tile, 0));
#pragma unroll 1
    for (int part = 0; part < C::kQueries / 64; ++part)  // whose notes are made together
      if (note(tile, part).steps() == BiasNote::kMany) find_buckets(origin(tile, part), scratch(part) + Plan::kBuckets);
    if (lane() == 0) ptx::st_shared(scratch(0) + Plan::kTile, static_cast<uint32_t>(tile));
    __syncwarp();
  }

  // Bytes: those of block n of 8 queries are word n % 4 of half n / 4 of the scratch, rows 0 and 8 apart.
  __device__ __forceinline__ void find_buckets(TileOrigin at, uint32_t to) const {
    const TimeTerm t = time();
    const int64_t base = t.key_time(at.key);
    bool fits = true;
    const auto relative = [&](int64_t time) {
      const int64_t d = time_gap(time, base);
      fits = fits && d > -(1 << 30) && d < (1 << 30);
      return static_cast<int>(d);
    };
    const int key = relative(t.key_time(at.key + lane() % 16));
    const int queries[2] = {relative(t.query_time(at.query + lane())), relative(t.query_time(at.query + 32 + lane()))};
    const bool fast = __all_sync(~0u, fits);
    bool known = fast;
    if (fast) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        uint32_t word = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int gap =
              __shfl_sync(~0u, queries[n / 4], n % 4 * 8 + col() + e % 2) - __shfl_sync(~0u, key, e / 2 * 8 + row());
          const int2 c = cell(gap);
          known = known && c.y >= 0;
          word |= static_cast<uint32_t>(c.y + (gap >= c.x)) << 8 * e;
        }
        ptx::st_shared(to + n / 4 * 512 + lane() * 16 + n % 4 * 4, word);
        __syncwarp();  // bounds the registers
      }
    }
    if (!__all_sync(~0u, known)) search_buckets(at, to);
  }
  __device__ __forceinline__ void search_buckets(TileOrigin at, uint32_t to) const {
    const TimeTerm t = time();
#pragma unroll 1
    for (int n = 0; n < 8; ++n) {
      uint32_t word = 0;
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const int64_t gap =
            time_gap(t.query_time(at.query + n * 8 + col() + e % 2), t.key_time(at.key + e / 2 * 8 + row()));
        word |= static_cast<uint32_t>(time_bucket(gap, t.boundaries, t.count)) << 8 * e;
      }
      ptx::st_shared(to + n / 4 * 512 + lane() * 16 + n % 4 * 4, word);
    }
  }
};

}  // namespace hstu_ops::cuda::sm90
