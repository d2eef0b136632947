// Attention forward with the instructions of sm_80.
//
// A block of threads owns kRows queries of one head; each warp keeps its queries' output in registers. Tiles of keys
// and values stream through two stages of shared memory:
//
//   wait for stage i, barrier | request stage i + 1 | S = Q K^T | P = silu(S) in registers | O += P V
//
// P never leaves the registers: the accumulator of the first product is the left operand of the second.
#pragma once

#include "core/launch.h"
#include "cuda/device.h"
#include "cuda/errors.h"
#include "cuda/sm80/config.h"
#include "cuda/tile/bias.h"
#include "cuda/tile/load.h"
#include "cuda/tile/product.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/score.h"
#include "cuda/tile/walk.h"

namespace hstu_ops::cuda::sm80 {

struct FwdArguments {
  AttentionFwdParams params;
  Schedule schedule;
  float alpha;
};

template <class C>
struct FwdStorage {
  using T = typename C::T;
  SmemTile<T, C::kDim> q, k, v;  // k and v: kStages tiles each
  void* bias;

  __device__ explicit FwdStorage(unsigned char* shared) {
    const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    q.base = base;
    k.base = q.base + C::kRows * C::kTileBytes;
    v.base = k.base + C::kStages * C::kCols * C::kTileBytes;
    bias = shared + C::kSharedBytes;
  }
};

template <class C, class Bias>
struct FwdTile {
  using T = typename C::T;

  const AttentionFwdParams& params;
  const Job& job;          // in shared memory: kept in registers it would cost as much as half an accumulator
  const RowPair<T>& keys;  // and values, likewise
  const FwdStorage<C>& shared;
  const float alpha;  // as add() of a bias wants it
  Accumulator<C::kM, C::kDim / 8> out;

  __device__ FwdTile(const FwdArguments& arguments, const Job& job, const RowPair<T>& keys, const FwdStorage<C>& shared)
      : params(arguments.params), job(job), keys(keys), shared(shared), alpha(arguments.alpha) {}

  __device__ int first() const { return job.item.block * C::kRows; }
  __device__ int warp_row() const { return static_cast<int>(threadIdx.x / 32) * C::kWarpRows; }
  __device__ int mask_row(int query) const { return job.sequence.first_row + query; }

  __device__ __forceinline__ void load_queries() const {
    const AttentionProblem& a = params.problem;
    load_tile<C::kRows, C::kThreads>(shared.q, GlobalRows<T>(a.q, job.sequence.begin_q, job.item.head, a.dim_qk),
                                     first(), job.sequence.num_q);
  }

  __device__ static GlobalRows<T> key_rows(const AttentionProblem& a, const Job& job) {
    return {a.k, job.sequence.begin_kv, job.item.head, a.dim_qk};
  }
  __device__ static GlobalRows<T> value_rows(const AttentionProblem& a, const Job& job) {
    return {a.v, job.sequence.begin_kv, job.item.head, a.dim_v};
  }
  __device__ __forceinline__ void load_keys(int tile, int stage) const {
    const auto k = shared.k.stage(stage, C::kCols), v = shared.v.stage(stage, C::kCols);
    const int first = tile * C::kCols;
    load_pair<C::kCols, C::kThreads>(k, v, keys, first, [&] {
      load_tile<C::kCols, C::kThreads>(k, key_rows(params.problem, job), first, job.sequence.mask.len);
      load_tile<C::kCols, C::kThreads>(v, value_rows(params.problem, job), first, job.sequence.mask.len);
    });
  }

  __device__ Classes classify(int tile) const {
    const Mask& mask = job.sequence.mask;
    const int n0 = tile * C::kCols, n1 = n0 + C::kCols;
    const int row = mask_row(first()), end = mask_row(min_int(first() + C::kRows, job.sequence.num_q));
    const int m0 = row + warp_row(), m1 = min_int(m0 + C::kWarpRows, end);
    return {mask.touches(row, end, n0, min_int(n1, mask.len)), mask.touches(m0, m1, n0, min_int(n1, mask.len)),
            mask.covers(m0, m1, n0, n1)};
  }

  using Scores = Accumulator<C::kM, C::kStep / 8>;

  // With kAhead, step i + 1 of Q K' stands before step i of SiLU, so that tensor cores have work during the latter.
  // silu(0) = 0: masked before SiLU, what follows is one run of instructions (kMaskFirst), masked behind it, it
  // overlaps with the product before.
  static constexpr bool kMaskFirst = C::kDim <= 64 || !std::is_same_v<Bias, NoBias>;

  // kWhole: the tile is known to need no mask, and then is one run of instructions, which the compiler interleaves.
  template <bool kWhole>
  __device__ __forceinline__ void compute(const Bias& bias, const TileState& state, int stage) {
    const auto k = shared.k.stage(stage, C::kCols), v = shared.v.stage(stage, C::kCols);
    const int row = mask_row(first() + warp_row());
    constexpr int kSteps = C::kCols / C::kStep;
    Scores s[C::kAhead ? 2 : 1];
    bias.template prepare<false, C::kWarpRows, C::kStep>(threadIdx.x / 32, {row, state.tile() * C::kCols},
                                                         state.tile() * kSteps);
    if (C::kAhead) multiply_rows<T, C::kDim>(s[0], shared.q, warp_row(), k, 0);
#pragma unroll(C::kAhead ? kSteps : 1)
    for (int i = 0; i < kSteps; ++i) {
      const int coming = C::kAhead ? i + 1 : i, col = state.tile() * C::kCols + i * C::kStep;
      const typename Bias::template Tile<false, C::kM, C::kStep / 8> offsets(bias, threadIdx.x / 32, {row, col},
                                                                             state.tile() * kSteps + i);
      Scores& now = s[C::kAhead ? i % 2 : 0];
      const auto multiply = [&] {
        if (coming < kSteps)
          multiply_rows<T, C::kDim>(s[C::kAhead ? coming % 2 : 0], shared.q, warp_row(), k, coming * C::kStep);
      };
      const auto mask = [&] {
        if (!kWhole && !state.covered()) mask_rows(job.sequence.mask, row, col, now);
      };
      if (!C::kAhead || !kMaskFirst) multiply();
      offsets.add(now, alpha, Score<T>::kArgument);
      if (kMaskFirst) mask();
      if (C::kAhead && kMaskFirst) multiply();
      Score<T>::activate(now);
      if (!kMaskFirst) mask();
      const Fragment<T, C::kM, C::kStep / 8> p(now);
      multiply_fragment<T>(out, p, v, i * C::kStep, 0);
    }
  }

  // Offsets that fall somewhere may make more items than there are blocks: `more` is set if that must be assumed.
  __device__ __forceinline__ void look_for_more(const Schedule& s, int& more) const {
    constexpr int kMost = 8 * C::kThreads;  // sequences; beyond, looking for an item takes less time
    bool falls = s.batch > kMost;
    for (int b = threadIdx.x; b < min_int(s.batch, kMost); b += C::kThreads)
      if (clamped_offset(s.offsets, b, s.batch, s.total) > clamped_offset(s.offsets, b + 1, s.batch, s.total))
        falls = true;
    if (falls) more = 1;
  }

  __device__ __forceinline__ void run(const Schedule& schedule, int& more) {
    const Bias& bias = *static_cast<const Bias*>(shared.bias);  // there, it costs no registers
    const auto classes = [&](int tile) { return classify(tile); };
    TileWalk<std::is_same_v<Bias, ManyBucketsBias>, decltype(classes)> walk(ceil_div(job.sequence.mask.len, C::kCols),
                                                                            classes);
    load_queries();
    TileState current = walk.next();
    if (current.exists()) load_keys(current.tile(), 0);
    ptx::cp_async_commit();
    Bias::template make<false>(params.problem, job, shared.bias, ptx::thread_index(), C::kThreads);
    look_for_more(schedule, more);
    out.clear();
    if (!current.exists()) {  // nobody may store to Q's place before it has arrived
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
#pragma unroll 1
    for (int stage = 0; current.exists(); stage ^= 1) {
      const TileState next = walk.next();
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage has arrived; the other one, and before the first tile the bias table, are free to
                        // use
      if (next.exists()) load_keys(next.tile(), stage ^ 1);
      ptx::cp_async_commit();
      if (current.mine()) {
        if (C::kTwice && current.covered()) {
          compute<true>(bias, current, stage);
        } else {
          compute<false>(bias, current, stage);
        }
      }
      current = next;
    }
  }

  // Through the warp's own rows of Q, which nobody else reads, so that global writes are whole rows.
  __device__ __forceinline__ void store() const {
    const AttentionProblem& a = params.problem;
    const int row = warp_row(), warp_first = first() + row;
    const RowScale scale(a.scale, job.item.sequence, job.sequence.begin_q);
    put_accumulator<T>(shared.q, row, 0, out, [&](int r) {
      const int query = warp_first + r + lane_row();
      return query < job.sequence.num_q ? scale(query) : 0.f;
    });
    __syncwarp();
    const GlobalRows<T> to(params.out, job.sequence.begin_q, job.item.head, a.dim_v);
    store_tile<C::kWarpRows, 32>(shared.q, row, to, warp_first, job.sequence.num_q, lane_id());
  }
};

template <class C, class Bias>
__global__ void __launch_bounds__(C::kThreads, Bias::shared_bytes(1) == 0 ? C::kBlocks : C::kBiasBlocks)
    attention_fwd_kernel(const __grid_constant__ FwdArguments arguments) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Job job;
  __shared__ RowPair<typename C::T> keys;
  __shared__ int more;              // are there more items than blocks? Only where offsets are ill-formed
  __shared__ const Schedule* kept;  // where the schedule of further items is: in registers, its address would spill
  const FwdStorage<C> shared(memory);
  const AttentionProblem& problem = arguments.params.problem;
  const Schedule* schedule = &arguments.schedule;
  for (int64_t i = blockIdx.x;;) {
    const WorkItem item = find_work<C::kRows, false>(*schedule, i);
    if (item.block < 0) break;
    if (threadIdx.x == 0) {
      job = {item, load_sequence(problem.jagged, problem.mask, item.sequence), i, false};
      keys.set(FwdTile<C, Bias>::key_rows(problem, job), FwdTile<C, Bias>::value_rows(problem, job),
               job.sequence.mask.len, C::kDim);
      reset_bias<Bias>(shared.bias);
      more = gridDim.x == kMostBlocks;
      kept = schedule;
    }
    __syncthreads();
    FwdTile<C, Bias> tile(arguments, job, keys, shared);
    tile.run(arguments.schedule, more);
    tile.store();
    if (!more) break;
    i = job.index + gridDim.x;
    schedule = kept;
    __syncthreads();  // the next item reuses shared memory
  }
}

template <class C, class Bias>
Status launch_fwd(const AttentionFwdParams& params, cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  FwdArguments arguments{params, query_schedule(a), static_cast<float>(a.alpha) * Score<typename C::T>::kArgument};
  if constexpr (C::kDim >= 128) {  // below, what loads then take from beyond the L2 is more than what is won at the end
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount, 1);
    widen_last_group(arguments.schedule, C::kRows, processors * C::kBlocks);
  }
  const auto kernel = attention_fwd_kernel<C, Bias>;
  const int bytes = C::kSharedBytes + Bias::shared_bytes(C::kWarps);
  HSTU_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int64_t blocks = most_items(a.jagged.total_q, a.jagged.batch, C::kRows, a.heads);
  kernel<<<static_cast<unsigned>(blocks), C::kThreads, bytes, stream>>>(arguments);
  HSTU_TRY(cudaGetLastError());
  return {};
}

template <class T, int kDim>
Status attention_fwd(const AttentionFwdParams& params, cudaStream_t stream) {
  using C = FwdBiasConfig<T, kDim>;
  const AttentionProblem& a = params.problem;
  if (a.dense.data) return launch_fwd<C, DenseBias>(params, stream);
  if constexpr (kIs16Bit<T>)
    if (has_many_buckets<T>(a.relative))
      return launch_fwd<FwdManyBucketsConfig<T, kDim>, ManyBucketsBias>(params, stream);
  if (a.relative) return launch_fwd<C, RelativeBias>(params, stream);
  return launch_fwd<FwdConfig<T, kDim>, NoBias>(params, stream);
}

}  // namespace hstu_ops::cuda::sm80
