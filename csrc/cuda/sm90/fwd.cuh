// Attention forward without bias with Hopper's copy engine and asynchronous tensor cores.
//
// A block of threads stays on its SM and takes item after item (kRows queries of one head). In the first warpgroup
// three warps find items and one requests tiles; the other warpgroups compute, 64 queries each, on what has arrived:
//
//   find     | item i + 2 | item i + 3 ...
//   load     | Q | K0 V0 | K1 V1 | K2 V2 ...           (the next item already while this one is computed)
//   compute  |  S0 = Q K0^T | S1 = Q K1^T, O += P0 V0 | S2 = Q K2^T, O += P1 V1 | ...
//            |              P0 = silu(S0)        P1 = silu(S1) while the second product runs
//
// P never leaves the registers. Barriers, each with the arrivals that complete it:
//
//   job_full    the finding warp               job_empty    each computing warpgroup, and the loading warp
//   query_full  the loading lane, the bytes    query_empty  each computing warpgroup
//   key_full    the loading lane, the bytes    key_empty    each computing warpgroup; value_* likewise
#pragma once

#include "core/launch.h"
#include "cuda/ptx/named_barrier.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/items.h"
#include "cuda/sm90/ring.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/load.h"
#include "cuda/tile/product.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/score.h"
#include "cuda/tile/walk.h"

namespace hstu_ops::cuda::sm90 {

struct FwdArguments {
  CUtensorMap q, k, v;
  AttentionFwdParams params;
  Schedule schedule;
};

constexpr int kJobs = 4;     // items found ahead
constexpr int kFinders = 3;  // warps that find them: one takes longer for an item than short sequences do

template <class C>
struct FwdBarriers {
  ptx::Mbarrier job_full[kJobs], job_empty[kJobs];
  ptx::Mbarrier query_full[C::kQueryStages], query_empty[C::kQueryStages];
  ptx::Mbarrier key_full[C::kStages], key_empty[C::kStages], value_full[C::kStages], value_empty[C::kStages];

  __device__ void init() {
    for (ptx::Mbarrier& b : job_full) b.init(1);
    for (ptx::Mbarrier& b : job_empty) b.init(C::kGroups + 1);
    for (ptx::Mbarrier& b : query_full) b.init(1);
    for (ptx::Mbarrier& b : query_empty) b.init(C::kGroups);
    for (int i = 0; i < C::kStages; ++i) {
      key_full[i].init(1), value_full[i].init(1);
      key_empty[i].init(C::kGroups), value_empty[i].init(C::kGroups);
    }
    ptx::fence_mbarrier_init();
  }
};

// What both roles see of shared memory.
template <class C, class T>
struct FwdStorage {
  using Panel = SmemTile<T, kPanel>;  // its swizzle is the copy engine's

  FwdBarriers<C>& barrier;
  FwdJob (&jobs)[kJobs];
  FwdTile (&tiles)[C::kStages];
  uint32_t queries, keys, values;

  __device__ FwdStorage(FwdBarriers<C>& barrier, FwdJob (&jobs)[kJobs], FwdTile (&tiles)[C::kStages],
                        const unsigned char* memory)
      : barrier(barrier), jobs(jobs), tiles(tiles) {
    queries = (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u;
    keys = queries + C::kQueryStages * C::kQueryBytes;
    values = keys + C::kStages * C::kKeyBytes;
  }
  __device__ Panel query_panel(int stage, int panel) const {
    return {queries + stage * C::kQueryBytes + panel * C::kRows * 128};
  }
  __device__ Panel key_panel(int stage, int panel) const {
    return {keys + stage * C::kKeyBytes + panel * C::kCols * 128};
  }
  __device__ Panel value_panel(int stage, int panel) const {
    return {values + stage * C::kKeyBytes + panel * C::kCols * 128};
  }
};

// ---- the finding warps ----

// Warp `finder` finds every kFinders-th item of the block.
template <class C, class T>
__device__ void find_items(const FwdArguments& arguments, const FwdStorage<C, T>& shared, int finder) {
  const AttentionProblem& problem = arguments.params.problem;
  for (int64_t j = finder;; j += kFinders) {
    // Every other round backwards: items get shorter along a group, so whoever had a long one gets a short one.
    const int64_t round_first = j * gridDim.x, place = j % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const WorkItem item = find_work_inline<C::kRows, false>(arguments.schedule, round_first + place);
    const bool more = item.block >= 0;
    FwdJob& job = shared.jobs[j % kJobs];
    shared.barrier.job_empty[j % kJobs].wait(j / kJobs % 2 ^ 1);
    if (lane_id() == 0) {
      job.more = more;
      if (more) job.job = {item, load_sequence(problem.jagged, problem.mask, item.sequence), 0};
    }
    __syncwarp();
    if (more) {
      const FwdTile tile = classify<C>(job.job, lane_id());
      job.first_tiles[lane_id()] = tile;
      __syncwarp();
      FwdTile any;
      const bool any_tile = FwdWalk<C>(job).next(any);
      if (lane_id() == 0) job.any_tile = any_tile;
    }
    __syncwarp();
    if (lane_id() == 0) shared.barrier.job_full[j % kJobs].arrive();
    if (!more) return;
  }
}

// ---- the loading warp ----

template <class C, class T>
struct FwdLoader {
  const FwdArguments& arguments;
  const FwdStorage<C, T>& shared;
  Ring<C::kStages> tile_ring;
  Ring<C::kQueryStages> query_ring;

  __device__ void load_queries(const Job& job) {
    ptx::Mbarrier& full = shared.barrier.query_full[query_ring.stage];
    shared.barrier.query_empty[query_ring.stage].wait(query_ring.round ^ 1);
    if (lane_id() == 0) {
      full.arrive_expect_tx(C::kQueryBytes);
      const int row = static_cast<int>(job.sequence.begin_q) + job.item.block * C::kRows;
      for (int p = 0; p < C::kPanels; ++p)
        ptx::tma_load_3d(shared.query_panel(query_ring.stage, p).base, arguments.q, full, p * kPanel, job.item.head,
                         row);
    }
    query_ring.next();
  }

  __device__ void load_keys(const Job& job, FwdTile tile) {
    const int stage = tile_ring.stage, row = static_cast<int>(job.sequence.begin_kv) + tile.tile() * C::kCols;
    FwdBarriers<C>& barrier = shared.barrier;
    barrier.key_empty[stage].wait(tile_ring.round ^ 1);
    if (lane_id() == 0) {
      shared.tiles[stage] = tile;
      barrier.key_full[stage].arrive_expect_tx(C::kKeyBytes);
      for (int p = 0; p < C::kPanels; ++p)
        ptx::tma_load_3d(shared.key_panel(stage, p).base, arguments.k, barrier.key_full[stage], p * kPanel,
                         job.item.head, row);
    }
    barrier.value_empty[stage].wait(tile_ring.round ^ 1);
    if (lane_id() == 0) {
      barrier.value_full[stage].arrive_expect_tx(C::kKeyBytes);
      for (int p = 0; p < C::kPanels; ++p)
        ptx::tma_load_3d(shared.value_panel(stage, p).base, arguments.v, barrier.value_full[stage], p * kPanel,
                         job.item.head, row);
    }
    tile_ring.next();
  }

  __device__ void run() {
    for (Ring<kJobs> job_ring;; job_ring.next()) {
      const FwdJob& job = shared.jobs[job_ring.stage];
      shared.barrier.job_full[job_ring.stage].wait(job_ring.round);
      if (!job.more) return;
      load_queries(job.job);
      FwdWalk<C> walk(job);
      for (FwdTile tile; walk.next(tile);) load_keys(job.job, tile);
      __syncwarp();
      if (lane_id() == 0) shared.barrier.job_empty[job_ring.stage].arrive();
    }
  }
};

// ---- a computing warpgroup ----

template <class C, class T>
struct FwdComputer {
  using Scores = float[C::kCols / 2];
  using Part = Accumulator<1, C::kPartCols / 8>;  // of the tile's columns: what the mask works on at a time

  const FwdArguments& arguments;
  const FwdStorage<C, T>& shared;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // the shuffle tells the compiler that it is uniform
  const float alpha = static_cast<float>(arguments.params.problem.alpha) * Score<T>::kArgument;
  Ring<C::kStages> tile_ring;
  Ring<C::kQueryStages> query_ring;

  __device__ int thread() const { return threadIdx.x % 128; }
  __device__ int warp_row() const { return group * 64 + thread() / 32 * 16; }
  __device__ void sync() const { ptx::named_barrier_sync(1 + group, 128); }
  __device__ void release(ptx::Mbarrier& empty) const {
    if (thread() == 0) empty.arrive();
  }

  // S = Q K^T, begun.
  __device__ __forceinline__ void multiply_keys(Scores& s) const {
    const ptx::Descriptor q(shared.query_panel(query_ring.stage, 0).base + group * 64 * 128),
        k(shared.key_panel(tile_ring.stage, 0).base);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kDim / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 32;
      ptx::Wgmma<C::kCols, T>::multiply_rows(s, q.at(panel * C::kRows * 128 + inside),
                                             k.at(panel * C::kCols * 128 + inside), step > 0);
    }
    ptx::wgmma_commit();
  }

  // O += P V, begun.
  __device__ __forceinline__ void multiply_values(float (&out)[C::kDim / 2], const uint32_t (&p)[C::kCols / 16][4],
                                                  int stage) const {
    const ptx::Descriptor v(shared.value_panel(stage, 0).base, C::kCols * 128);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kCols / 16; ++step)
      ptx::Wgmma<C::kDim, T>::multiply_fragment(out, p[step], v.at(step * 2048));
    ptx::wgmma_commit();
  }

  // Rows of V past the end of the sequence belong to others: 0 * NaN would be NaN. Every warpgroup writes the same
  // zeros.
  __device__ __forceinline__ void clear_values(const Job& job, int tile, int stage) const {
    const int there = job.sequence.mask.len - tile * C::kCols;
    if (there >= C::kCols) return;
    for (int at = there * 8 + thread(); at < C::kCols * 8; at += 128)
#pragma unroll
      for (int p = 0; p < C::kPanels; ++p)
        ptx::st_shared(shared.value_panel(stage, p).base + at * 16, make_uint4(0, 0, 0, 0));
    ptx::fence_proxy_async();
    sync();
  }

  __device__ __forceinline__ void activate(const Job& job, FwdTile tile, Scores& s) const {
    const int row = job.sequence.first_row + job.item.block * C::kRows + warp_row();
#pragma unroll
    for (int i = 0; i < C::kCols / C::kPartCols; ++i) {
      Part& part = reinterpret_cast<Part&>(s[i * C::kPartCols / 2]);
      const int col = tile.tile() * C::kCols + i * C::kPartCols;
      part.each([this](float& x, int, int) { x *= alpha; });
      Score<T>::activate(part);
      if (!tile.covered(group)) mask_rows(job.sequence.mask, row, col, part);
    }
  }

  __device__ __forceinline__ void round(const Scores& s, uint32_t (&p)[C::kCols / 16][4]) const {
#pragma unroll
    for (int i = 0; i < C::kCols / 16; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[i][e] = pack(s[i * 8 + e * 2], s[i * 8 + e * 2 + 1], T{});
  }

  // The tile that has arrived next; its keys are here, its values may not be.
  __device__ __forceinline__ FwdTile await_tile() const {
    shared.barrier.key_full[tile_ring.stage].wait(tile_ring.round);
    return shared.tiles[tile_ring.stage];
  }

  // Gives back a tile of which this warpgroup keeps nothing. No values may be held: the loading warp would wait for
  // their stage.
  __device__ __forceinline__ void skip_tile() {
    shared.barrier.value_full[tile_ring.stage].wait(tile_ring.round);
    sync();  // no product holds the warps together here: all must have seen the tile before its stage is used again
    release(shared.barrier.key_empty[tile_ring.stage]);
    release(shared.barrier.value_empty[tile_ring.stage]);
    tile_ring.next();
  }

  // Waits for the tile's values and begins their product.
  __device__ __forceinline__ void begin_values(const Job& job, FwdTile tile, Ring<C::kStages> at,
                                               float (&out)[C::kDim / 2], const uint32_t (&p)[C::kCols / 16][4]) const {
    shared.barrier.value_full[at.stage].wait(at.round);
    clear_values(job, tile.tile(), at.stage);
    multiply_values(out, p, at.stage);
  }

  // One run of tiles of which this warpgroup keeps something, the first of which has arrived. Returns its last tile.
  __device__ __forceinline__ FwdTile compute_run(const Job& job, FwdTile tile, float (&out)[C::kDim / 2]) {
    FwdBarriers<C>& barrier = shared.barrier;
    Scores s;
    uint32_t p[C::kCols / 16][4];
    Ring<C::kStages> current = tile_ring;
    multiply_keys(s);
    ptx::wgmma_wait<0>();
    release(barrier.key_empty[current.stage]);
    tile_ring.next();
    activate(job, tile, s);
    round(s, p);
    while (!tile.last()) {
      const FwdTile next = await_tile();
      if (!next.kept(group)) break;
      multiply_keys(s);
      begin_values(job, tile, current, out, p);
      ptx::wgmma_wait<1>();
      release(barrier.key_empty[tile_ring.stage]);
      activate(job, next, s);
      ptx::wgmma_wait<0>();
      release(barrier.value_empty[current.stage]);
      round(s, p);
      tile = next;
      current = tile_ring;
      tile_ring.next();
    }
    begin_values(job, tile, current, out, p);
    ptx::wgmma_wait<0>();
    release(barrier.value_empty[current.stage]);
    return tile;
  }

  __device__ __forceinline__ void compute(const Job& job, float (&out)[C::kDim / 2]) {
    FwdTile tile;
    do {
      tile = await_tile();
      if (tile.kept(group)) {
        tile = compute_run(job, tile, out);
      } else {
        skip_tile();
      }
    } while (!tile.last());
  }

  // Through the warp's own rows of Q, so that global writes are whole rows.
  __device__ __forceinline__ void store(const Job& job, const float (&out)[C::kDim / 2]) const {
    const AttentionFwdParams& params = arguments.params;
    const int first = job.item.block * C::kRows + warp_row();
    const RowScale scale(params.problem.scale, job.item.sequence, job.sequence.begin_q);
    const GlobalRows<T> to(params.out, job.sequence.begin_q, job.item.head, params.problem.dim_v);
    sync();  // all four warps are done with Q
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const auto tile = shared.query_panel(query_ring.stage, panel);
      put_accumulator<T>(tile, warp_row(), 0, reinterpret_cast<const Accumulator<1, 8>&>(out[panel * 32]), [&](int r) {
        const int query = first + r + lane_row();
        return query < job.sequence.num_q ? scale(query) : 0.f;
      });
      __syncwarp();
      GlobalRows<T> columns = to;
      columns.data += panel * kPanel;
      columns.dim -= panel * kPanel;
      store_tile<16, 32>(tile, warp_row(), columns, first, job.sequence.num_q, lane_id());
    }
    ptx::fence_proxy_async();  // the copy engine writes these rows next
    sync();
  }

  __device__ void run() {
    Ring<kJobs> job_ring;
    for (;; job_ring.next()) {
      shared.barrier.job_full[job_ring.stage].wait(job_ring.round);
      if (!shared.jobs[job_ring.stage].more) return;
      const Job& job = shared.jobs[job_ring.stage].job;
      shared.barrier.query_full[query_ring.stage].wait(query_ring.round);
      float out[C::kDim / 2];
#pragma unroll
      for (float& x : out) x = 0.f;
      if (shared.jobs[job_ring.stage].any_tile) compute(job, out);
      store(job, out);
      release(shared.barrier.query_empty[query_ring.stage]);
      release(shared.barrier.job_empty[job_ring.stage]);
      query_ring.next();
    }
  }
};

// ---- kernel and launch ----

template <class C, class T>
__global__ void __launch_bounds__(C::kThreads, 1) attention_fwd_kernel(const __grid_constant__ FwdArguments arguments) {
  extern __shared__ unsigned char memory[];
  __shared__ FwdBarriers<C> barriers;
  __shared__ FwdJob jobs[kJobs];
  __shared__ FwdTile tiles[C::kStages];
  const FwdStorage<C, T> shared(barriers, jobs, tiles, memory);
  if (threadIdx.x == 0) barriers.init();
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::set_max_registers_down<C::kLoadRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      FwdLoader<C, T>{arguments, shared, {}, {}}.run();
    } else {
      find_items(arguments, shared, warp - 1);
    }
  } else {
    ptx::set_max_registers_up<C::kComputeRegisters>();
    FwdComputer<C, T>{arguments, shared}.run();
  }
}

template <class T, int kDim>
Status attention_fwd(const AttentionFwdParams& params, int processors, cudaStream_t stream) {
  using C = FwdConfig<kDim>;
  const AttentionProblem& a = params.problem;
  FwdArguments arguments{{}, {}, {}, params, query_schedule(a)};
  const auto make = [&](CUtensorMap& map, const View& view, int64_t rows, int dim, int box) {
    return make_tensor_map(map, a.dtype, view, rows, a.heads, dim, box);
  };
  if (Status s = make(arguments.q, a.q, a.jagged.total_q, a.dim_qk, C::kRows); !s.ok()) return s;
  if (Status s = make(arguments.k, a.k, a.jagged.total_kv, a.dim_qk, C::kCols); !s.ok()) return s;
  if (Status s = make(arguments.v, a.v, a.jagged.total_kv, a.dim_v, C::kCols); !s.ok()) return s;
  const auto kernel = attention_fwd_kernel<C, T>;
  HSTU_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  const int64_t items = most_items(a.jagged.total_q, a.jagged.batch, C::kRows, a.heads);
  kernel<<<static_cast<unsigned>(items < processors ? items : processors), C::kThreads, C::kSharedBytes, stream>>>(
      arguments);
  HSTU_TRY(cudaGetLastError());
  return {};
}

}  // namespace hstu_ops::cuda::sm90
