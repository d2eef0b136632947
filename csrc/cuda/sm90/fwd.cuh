// Attention forward with Hopper's copy engine and asynchronous tensor cores.
//
// A block of threads stays on its SM and takes item after item (kRows queries of one head). One warp of the first warpgroup
// finds items and requests tiles; the other warpgroups compute, 64 queries each, on what has arrived:
//
//   load     | find item | Q | K0 V0 | K1 V1 | K2 V2 ...           (next item already while this one is computed)
//   compute  |  S0 = Q K0^T | S1 = Q K1^T, O += P0 V0 | S2 = Q K2^T, O += P1 V1 | ...
//            |              P0 = silu(S0)        P1 = silu(S1) while the second product runs
//
// P never leaves the registers. Barriers, each with the arrivals that complete it:
//   job_full    1: the loading lane       job_empty    kGroups: a thread of each computing warpgroup
//   query_full  1 and the bytes           query_empty  kGroups
//   key_full    1 and the bytes           key_empty    kGroups      (value_* likewise)
#pragma once

#include "core/launch.h"
#include "cuda/ptx/named_barrier.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/bias.h"
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

constexpr int kJobs = 2;

template <class C>
struct FwdBarriers {
  ptx::Mbarrier job_full[kJobs], job_empty[kJobs];
  ptx::Mbarrier query_full[C::kQueryStages], query_empty[C::kQueryStages];
  ptx::Mbarrier key_full[C::kStages], key_empty[C::kStages], value_full[C::kStages], value_empty[C::kStages];

  __device__ void init() {
    for (ptx::Mbarrier& b : job_full) b.init(1);
    for (ptx::Mbarrier& b : job_empty) b.init(C::kGroups);
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
  Job (&jobs)[kJobs];  // item.sequence < 0: no more
  uint32_t queries, keys, values;

  __device__ FwdStorage(FwdBarriers<C>& barrier, Job (&jobs)[kJobs], const unsigned char* memory) : barrier(barrier), jobs(jobs) {
    queries = (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u;
    keys = queries + C::kQueryStages * C::kQueryBytes;
    values = keys + C::kStages * C::kKeyBytes;
  }
  __device__ Panel query_panel(int stage, int panel) const { return {queries + stage * C::kQueryBytes + panel * C::kRows * 128}; }
  __device__ Panel key_panel(int stage, int panel) const { return {keys + stage * C::kKeyBytes + panel * C::kCols * 128}; }
  __device__ Panel value_panel(int stage, int panel) const { return {values + stage * C::kKeyBytes + panel * C::kCols * 128}; }
};

// A stage of a ring and the parity of its current round.
template <int kStages>
struct Ring {
  int stage = 0;
  unsigned round = 0;

  __device__ void next() {
    if (++stage == kStages) stage = 0, round ^= 1;
  }
};

// The tiles of keys an item visits, as seen by the queries [begin, end) of it.
template <class C>
struct FwdWalk {
  const Job& job;
  int begin, end;

  __device__ Classes operator()(int tile) const {
    const Sequence& s = job.sequence;
    const int first = job.item.block * C::kRows, last = min_int(first + C::kRows, s.num_q);
    const int n0 = tile * C::kCols, n1 = n0 + C::kCols;
    const int m0 = min_int(first + begin, last), m1 = min_int(first + end, last);
    const auto row = [&](int query) { return s.first_row + query; };
    return {s.mask.touches(row(first), row(last), n0, min_int(n1, s.mask.len)), s.mask.touches(row(m0), row(m1), n0, min_int(n1, s.mask.len)),
            s.mask.covers(row(m0), row(m1), n0, n1)};
  }
};

template <class C>
__device__ TileWalk<FwdWalk<C>> walk_tiles(const Job& job, int begin, int end) {
  return {ceil_div(job.sequence.mask.len, C::kCols), FwdWalk<C>{job, begin, end}};
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
        ptx::tma_load_3d(shared.query_panel(query_ring.stage, p).base, arguments.q, full, p * kPanel, job.item.head, row);
    }
    query_ring.next();
  }

  __device__ void load_keys(const Job& job, int tile) {
    const int stage = tile_ring.stage, row = static_cast<int>(job.sequence.begin_kv) + tile * C::kCols;
    FwdBarriers<C>& barrier = shared.barrier;
    barrier.key_empty[stage].wait(tile_ring.round ^ 1);
    if (lane_id() == 0) {
      barrier.key_full[stage].arrive_expect_tx(C::kKeyBytes);
      for (int p = 0; p < C::kPanels; ++p)
        ptx::tma_load_3d(shared.key_panel(stage, p).base, arguments.k, barrier.key_full[stage], p * kPanel, job.item.head, row);
    }
    barrier.value_empty[stage].wait(tile_ring.round ^ 1);
    if (lane_id() == 0) {
      barrier.value_full[stage].arrive_expect_tx(C::kKeyBytes);
      for (int p = 0; p < C::kPanels; ++p)
        ptx::tma_load_3d(shared.value_panel(stage, p).base, arguments.v, barrier.value_full[stage], p * kPanel, job.item.head, row);
    }
    tile_ring.next();
  }

  __device__ void run() {
    const AttentionProblem& problem = arguments.params.problem;
    Ring<kJobs> job_ring;
    WorkItem item;
    for (int64_t i = blockIdx.x;; i += gridDim.x) {
      const bool more = find_work<C::kRows, false>(arguments.schedule, i, item);
      Job& job = shared.jobs[job_ring.stage];
      shared.barrier.job_empty[job_ring.stage].wait(job_ring.round ^ 1);
      if (lane_id() == 0) {
        job = {item, more ? load_sequence(problem.jagged, problem.mask, item.sequence) : Sequence{}};
        if (!more) job.item.sequence = -1;
        shared.barrier.job_full[job_ring.stage].arrive();
      }
      __syncwarp();
      if (!more) return;
      load_queries(job);
      auto walk = walk_tiles<C>(job, 0, C::kRows);
      for (TileState t = walk.next(); t.tile >= 0; t = walk.next()) load_keys(job, t.tile);
      job_ring.next();
    }
  }
};

// ---- a computing warpgroup ----

template <class C, class T, class Bias>
struct FwdComputer {
  using Scores = float[C::kCols / 2];
  using Half = Accumulator<1, 8>;  // 64 of the tile's columns

  const FwdArguments& arguments;
  const FwdStorage<C, T>& shared;
  void* bias_table;  // of this warpgroup
  const int group = static_cast<int>(threadIdx.x) / 128 - 1;
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
    const uint32_t q = shared.query_panel(query_ring.stage, 0).base + group * 64 * 128, k = shared.key_panel(tile_ring.stage, 0).base;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kDim / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 32;
      ptx::Wgmma<C::kCols, T>::multiply_rows(s, ptx::descriptor(q + panel * C::kRows * 128 + inside, 16),
                                             ptx::descriptor(k + panel * C::kCols * 128 + inside, 16), step > 0);
    }
    ptx::wgmma_commit();
  }

  // O += P V, begun.
  __device__ __forceinline__ void multiply_values(float (&out)[C::kDim / 2], const uint32_t (&p)[C::kCols / 16][4], int stage) const {
    const uint32_t v = shared.value_panel(stage, 0).base;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kCols / 16; ++step)
      ptx::Wgmma<C::kDim, T>::multiply_fragment(out, p[step], ptx::descriptor(v + step * 2048, C::kCols * 128));
    ptx::wgmma_commit();
  }

  // Rows of V past the end of the sequence belong to others: 0 * NaN would be NaN. Every warpgroup writes the same zeros.
  __device__ __forceinline__ void clear_values(const Job& job, int tile, int stage) const {
    const int there = job.sequence.mask.len - tile * C::kCols;
    if (there >= C::kCols) return;
    for (int at = there * 8 + thread(); at < C::kCols * 8; at += 128)
#pragma unroll
      for (int p = 0; p < C::kPanels; ++p) ptx::st_shared(shared.value_panel(stage, p).base + at * 16, make_uint4(0, 0, 0, 0));
    ptx::fence_proxy_async();
    sync();
  }

  __device__ __forceinline__ void activate(const Job& job, const Bias& bias, const TileState& tile, Scores& s) const {
    const float alpha = static_cast<float>(arguments.params.problem.alpha) * Score<T>::kArgument;
    const int row = job.sequence.first_row + job.item.block * C::kRows + warp_row();
#pragma unroll
    for (int h = 0; h < C::kCols / 64; ++h) {
      Half& half = reinterpret_cast<Half&>(s[h * 32]);
      const int col = tile.tile * C::kCols + h * 64;
      bias.template add<false>(half, {row, col}, alpha, Score<T>::kArgument);
      Score<T>::activate(half);
      if (!tile.covered) mask_rows(job.sequence.mask, row, col, half);
    }
  }

  __device__ __forceinline__ void round(const Scores& s, uint32_t (&p)[C::kCols / 16][4]) const {
#pragma unroll
    for (int i = 0; i < C::kCols / 16; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[i][e] = pack(s[i * 8 + e * 2], s[i * 8 + e * 2 + 1], T{});
  }

  // The next tile of which this warpgroup keeps anything; the others in between are given back unused.
  template <class Walk>
  __device__ __forceinline__ TileState next_tile(Walk& walk) {
    for (;;) {
      const TileState t = walk.next();
      if (t.tile < 0) return t;
      shared.barrier.key_full[tile_ring.stage].wait(tile_ring.round);
      if (t.mine) return t;
      shared.barrier.value_full[tile_ring.stage].wait(tile_ring.round);
      release(shared.barrier.key_empty[tile_ring.stage]);
      release(shared.barrier.value_empty[tile_ring.stage]);
      tile_ring.next();
    }
  }

  __device__ __forceinline__ void compute(const Job& job, const Bias& bias, float (&out)[C::kDim / 2]) {
    FwdBarriers<C>& barrier = shared.barrier;
    Scores s;
    uint32_t p[C::kCols / 16][4];
    auto walk = walk_tiles<C>(job, group * 64, group * 64 + 64);
    TileState tile = next_tile(walk);
    if (tile.tile < 0) return;
    Ring<C::kStages> current = tile_ring;
    multiply_keys(s);
    ptx::wgmma_wait<0>();
    release(barrier.key_empty[current.stage]);
    tile_ring.next();
    activate(job, bias, tile, s);
    round(s, p);
    for (TileState next = next_tile(walk); next.tile >= 0; next = next_tile(walk)) {
      multiply_keys(s);
      barrier.value_full[current.stage].wait(current.round);
      clear_values(job, tile.tile, current.stage);
      multiply_values(out, p, current.stage);
      ptx::wgmma_wait<1>();
      release(barrier.key_empty[tile_ring.stage]);
      activate(job, bias, next, s);
      ptx::wgmma_wait<0>();
      release(barrier.value_empty[current.stage]);
      round(s, p);
      tile = next;
      current = tile_ring;
      tile_ring.next();
    }
    barrier.value_full[current.stage].wait(current.round);
    clear_values(job, tile.tile, current.stage);
    multiply_values(out, p, current.stage);
    ptx::wgmma_wait<0>();
    release(barrier.value_empty[current.stage]);
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
      put_accumulator<T>(tile, warp_row(), 0, reinterpret_cast<const Half&>(out[panel * 32]), [&](int r) {
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
    int table_head = -1;
    for (;; job_ring.next()) {
      shared.barrier.job_full[job_ring.stage].wait(job_ring.round);
      const Job& job = shared.jobs[job_ring.stage];
      if (job.item.sequence < 0) return;
      const Bias bias(arguments.params.problem, job, bias_table, job.item.head == table_head ? 128 : thread(), 128);
      table_head = job.item.head;
      sync();
      shared.barrier.query_full[query_ring.stage].wait(query_ring.round);
      float out[C::kDim / 2];
#pragma unroll
      for (float& x : out) x = 0.f;
      compute(job, bias, out);
      store(job, out);
      release(shared.barrier.query_empty[query_ring.stage]);
      release(shared.barrier.job_empty[job_ring.stage]);
      query_ring.next();
    }
  }
};

// ---- kernel and launch ----

template <class C, class T, class Bias>
__global__ void __launch_bounds__(C::kThreads, 1) attention_fwd_kernel(const __grid_constant__ FwdArguments arguments) {
  extern __shared__ unsigned char memory[];
  __shared__ FwdBarriers<C> barriers;
  __shared__ Job jobs[kJobs];
  __shared__ __align__(16) unsigned char bias_tables[C::kGroups][Bias::kSharedBytes > 0 ? Bias::kSharedBytes : 16];
  const FwdStorage<C, T> shared(barriers, jobs, memory);
  if (threadIdx.x == 0) barriers.init();
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::set_max_registers_down<C::kLoadRegisters>();
    if (threadIdx.x < 32) FwdLoader<C, T>{arguments, shared, {}, {}}.run();
  } else {
    ptx::set_max_registers_up<C::kComputeRegisters>();
    FwdComputer<C, T, Bias>{arguments, shared, bias_tables[threadIdx.x / 128 - 1]}.run();
  }
}

template <class C, class T, class Bias>
Status launch_fwd(const AttentionFwdParams& params, int processors, cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  FwdArguments arguments{{}, {}, {}, params, query_schedule(a)};
  const auto make = [&](CUtensorMap& map, const View& view, int64_t rows, int dim, int box) {
    return make_tensor_map(map, a.dtype, view, rows, a.heads, dim, box);
  };
  if (Status s = make(arguments.q, a.q, a.jagged.total_q, a.dim_qk, C::kRows); !s.ok()) return s;
  if (Status s = make(arguments.k, a.k, a.jagged.total_kv, a.dim_qk, C::kCols); !s.ok()) return s;
  if (Status s = make(arguments.v, a.v, a.jagged.total_kv, a.dim_v, C::kCols); !s.ok()) return s;
  const auto kernel = attention_fwd_kernel<C, T, Bias>;
  HSTU_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  const int64_t items = most_items(a.jagged.total_q, a.jagged.batch, C::kRows, a.heads);
  kernel<<<static_cast<unsigned>(items < processors ? items : processors), C::kThreads, C::kSharedBytes, stream>>>(arguments);
  HSTU_TRY(cudaGetLastError());
  return {};
}

template <class T, int kDim>
Status attention_fwd(const AttentionFwdParams& params, int processors, cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  if (a.dense.data) return launch_fwd<FwdConfig<kDim, true>, T, DenseBias>(params, processors, stream);
  if (a.relative.position_weight || a.relative.time_weight)
    return launch_fwd<FwdConfig<kDim, true>, T, RelativeBias>(params, processors, stream);
  return launch_fwd<FwdConfig<kDim, false>, T, NoBias>(params, processors, stream);
}

}  // namespace hstu_ops::cuda::sm90
