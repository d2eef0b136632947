// What the computing warpgroups of the Hopper backward's kernel for dK and dV do in the same way: waiting for what has
// been loaded, products, scores, rows of the results.
#pragma once

#include "cuda/ptx/named_barrier.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/bwd_bias.h"
#include "cuda/sm90/bwd_load.h"
#include "cuda/sm90/bwd_store.h"
#include "cuda/tile/fragment.h"
#include "cuda/tile/score.h"
#include "cuda/tile/walk.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T>
struct BwdGroup {
  using Scores = float[C::kQueries / 2];
  using Operand = uint32_t[C::kQueries / 16][4];
  using Sums = float[C::kDim / 2];
  using Part = Accumulator<1, 8>;  // of the tile's queries: what the mask works on at a time
  struct Bits {
    unsigned words[C::kQueries / 64];  // of a part: bit 8 e + 7 - n says whether a lane's value [n][e] is kept
  };

  static constexpr bool kStarts = C::kBias || C::kDense;  // scores begin from a bias

  const BwdArguments& arguments;
  const BwdStorage<C, T>& shared;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // the shuffle tells the compiler that it is uniform

  __device__ BwdBarriers<C>& barrier() const { return shared.state.barrier; }
  __device__ int thread() const { return threadIdx.x % 128; }
  __device__ int warp_key() const { return (C::kSplitKeys ? group * 64 : 0) + thread() / 32 * 16; }
  __device__ void sync() const { ptx::named_barrier_sync(1 + group, 128); }
  __device__ void release(ptx::Mbarrier& empty) const {
    if (thread() == 0) empty.arrive();
  }
  __device__ static void arrive_warp(ptx::Mbarrier& barrier) {
    __syncwarp();
    if (lane_id() == 0) barrier.arrive();
  }
  // Of all scaled gradients; a scale of each row is in dS and P already.
  __device__ float factor(const Job& job) const {
    const ScaleParams& s = arguments.params.problem.scale;
    if (!s.values) return arguments.scale;
    return s.per_row ? 1.f : static_cast<const float*>(s.values)[job.item.sequence];
  }

  // Rows past the end of the sequence belong to others: 0 * NaN would be NaN. Every warpgroup writes the same zeros.
  __device__ __forceinline__ void clear_rows(uint32_t panel, int panel_rows, int there) const {
    for (int at = there * 8 + thread(); at < panel_rows * 8; at += 128)
#pragma unroll
      for (int p = 0; p < C::kPanels; ++p)
        ptx::st_shared(panel + p * panel_rows * 128 + at * 16, make_uint4(0, 0, 0, 0));
  }

  // S' = K Q' or dP' = V dO', begun: `left` and `right` are first panels. kAdd: s has something to start from.
  template <bool kAdd = false>
  __device__ __forceinline__ void multiply_scores(Scores& s, uint32_t left, uint32_t right) const {
    const ptx::Descriptor a = shared.descriptor(left + (C::kSplitKeys ? group * 64 * 128 : 0)),
                          b = shared.descriptor(right);
#pragma unroll
    for (int step = 0; step < C::kDim / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 32;
      ptx::Wgmma<C::kQueries, T>::multiply_rows(s, a.at(panel * C::kKeys * 128 + inside),
                                                b.at(panel * C::kQueries * 128 + inside), kAdd || step > 0);
    }
    ptx::wgmma_commit();
  }

  // dV += P' dO or dK += dS' Q, begun.
  __device__ __forceinline__ void accumulate(Sums& sums, const Operand& scores, uint32_t right) const {
    const ptx::Descriptor b = shared.descriptor(right, C::kQueries * 128);
#pragma unroll
    for (int step = 0; step < C::kQueries / 16; ++step)
      ptx::Wgmma<C::kDim, T>::multiply_fragment(sums, scores[step], b.at(step * 2048));
  }

  // dS of the tile two before is used up.
  __device__ __forceinline__ void await_scores(Count tile) const {
    barrier().score.empty[tile.stage<C::kScoreStages>()].wait(tile.round<C::kScoreStages>() ^ 1);
  }
  // Slopes likewise.
  __device__ __forceinline__ void await_slopes(Count tile) const {
    barrier().slope.empty[tile.stage<2>()].wait(tile.round<2>() ^ 1);
  }
  __device__ __forceinline__ void await_bias(Count tile) const {
    if constexpr (C::kBias) barrier().bias.full[tile.stage<C::kBiasStages>()].wait(tile.round<C::kBiasStages>());
  }
  __device__ __forceinline__ void release_bias(Count tile) const {
    if constexpr (C::kBias) release(barrier().bias.empty[tile.stage<C::kBiasStages>()]);
  }

  // What the product S' is added to.
  __device__ __forceinline__ void start_scores(const Job& job, BwdTile tile, Count item, Count count, Scores& s) const {
    if constexpr (C::kBias) {
      await_bias(count);
      const int warp = ptx::thread_index() / 32 - 4;  // read again: kept, it would take a register
      const auto at = [&]() -> BiasTile {
        return {warp, job.item.block * C::kKeys + warp * 16, job.sequence.first_row + tile.tile() * C::kQueries,
                shared.state.rows[item.stage<kBwdJobs>()].times + warp * 16, shared.scratch(count) + warp * 2048};
      };
      start_from_bias(arguments.params.problem, job,
                      BiasStage<typename C::Relative>(shared.bias().stage(count.stage<C::kBiasStages>())),
                      shared.bias().tables(), at, arguments.factors.bias, reinterpret_cast<Part&>(s), [&] {
                        if (C::kQuerySums) await_scores(count);
                        if (!C::kSplitKeys) await_slopes(count);
                      });
      ptx::wgmma_settle(s);
    }
    if constexpr (C::kDense) {
      const DenseBias bias(arguments.params.problem, job, nullptr);
      const int key = job.item.block * C::kKeys + warp_key(),
                query = job.sequence.first_row + tile.tile() * C::kQueries;
#pragma unroll
      for (int i = 0; i < C::kQueries / 64; ++i)
        start_from_dense<true>(bias, key, query + i * 64, arguments.factors, reinterpret_cast<Part&>(s[i * 32]));
      ptx::wgmma_settle(s);
    }
  }
  // By the warpgroups that have S', before an item.
  __device__ __forceinline__ void turn_tables(const Job& job) const {
    if constexpr (C::kBias) {
      constexpr int kThreads = C::kSplitKeys ? 128 * C::kGroups : 128;
      shared.bias().tables().turn(arguments.params.problem.relative, arguments.cells, job.item.head,
                                  arguments.factors.bias, threadIdx.x - 128, kThreads,
                                  [] { meet(1 + C::kGroups, kThreads); });
    }
  }

  // The tile that has arrived next, without rows of other sequences.
  __device__ __forceinline__ BwdTile await_tile(const Job& job, Count at) const {
    barrier().query.full[at.stage<C::kQueryStages>()].wait(at.round<C::kQueryStages>());
    const BwdTile tile = shared.state.tiles[at.stage<C::kTileStages>()];
    barrier().grad.full[at.stage<C::kGradStages>()].wait(at.round<C::kGradStages>());
    const int there = job.sequence.num_q - tile.tile() * C::kQueries;
    if (there < C::kQueries) {
      clear_rows(shared.query_panel(at.stage<C::kQueryStages>(), 0).base, C::kQueries, there);
      clear_rows(shared.grad_panel(at.stage<C::kGradStages>(), 0).base, C::kQueries, there);
      ptx::fence_proxy_async();
      sync();
    }
    return tile;
  }

  // Keys past the end of the sequence: see clear_rows.
  __device__ __forceinline__ void await_keys(const Job& job, Count at) const {
    barrier().key.full[at.stage<C::kKeyStages>()].wait(at.round<C::kKeyStages>());
    barrier().value.full[at.stage<C::kValueStages>()].wait(at.round<C::kValueStages>());
    const int there = job.sequence.mask.len - job.item.block * C::kKeys;
    if (there >= C::kKeys) return;
    clear_rows(shared.key_panel(at.stage<C::kKeyStages>(), 0).base, C::kKeys, there);
    clear_rows(shared.value_panel(at.stage<C::kValueStages>(), 0).base, C::kKeys, there);
    ptx::fence_proxy_async();
    sync();
  }

  // What is kept of a tile: worked out before accumulators fill the registers.
  __device__ __forceinline__ Bits keep_bits(const Job& job, BwdTile tile) const {
    const int row = job.sequence.first_row + tile.tile() * C::kQueries, col = job.item.block * C::kKeys + warp_key();
    Bits bits;
#pragma unroll
    for (int i = 0; i < C::kQueries / 64; ++i) {
      const ColumnBits<8> b(job.sequence.mask, row + i * 64, job.sequence.mask.len, col);
      bits.words[i] = 0;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const unsigned mine = __shfl_sync(~0u, b.words[n / 4], n % 4 * 8 + lane_col() + c) >> lane_row();
          bits.words[i] |= ((mine & 1) | (mine << 8 & 0x10000)) << (8 * c + 7 - n);
        }
    }
    return bits;
  }

  // Rounded pairs: half as many values as before, and registers for what tells them apart.
  __device__ static __forceinline__ void mask_part(unsigned kept, Operand& a, Operand& b, int step) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t mask = h ? ptx::spread_signs<3, 2>(kept << n) : ptx::spread_signs<1, 0>(kept << n);
        a[step + n / 2][n % 2 * 2 + h] &= mask, b[step + n / 2][n % 2 * 2 + h] &= mask;
      }
  }

  // P' and dS' of the tile, out of S' and dP', as operands.
  __device__ __forceinline__ void score(const Job& job, BwdTile tile, const Bits& bits, Scores& s, Scores& d,
                                        Operand& p, Operand& ds) const {
    const bool per_row = arguments.params.problem.scale.per_row;
#pragma unroll
    for (int i = 0; i < C::kQueries / 64; ++i) {
      Part &u = reinterpret_cast<Part&>(s[i * 32]), &g = reinterpret_cast<Part&>(d[i * 32]);
      u.each([this](float& x, int, int) { x *= arguments.factors.score; });
      Score<T>::differentiate(u, g);
      if (per_row) apply_row_scale(job, tile.tile() * C::kQueries + i * 64, u, g);
      round(u, p, i * 4);
      round(g, ds, i * 4);
      if (!tile.covered(group)) mask_part(bits.words[i], p, ds, i * 4);
    }
  }

  __device__ static __forceinline__ void round(const Part& part, Operand& to, int step) {
    const Fragment<T, 1, 8> f(part);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int e = 0; e < 4; ++e) to[step + k][e] = f.x[0][k][e];
  }

  __device__ __forceinline__ void apply_row_scale(const Job& job, int query, Part& s, Part& d) const {
    const RowScale scale(arguments.params.problem.scale, job.item.sequence, job.sequence.begin_q);
    float mine[2];  // of query `lane` and of the 32nd on
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = query + i * 32 + lane_id();
      mine[i] = at < job.sequence.num_q ? scale(at) : 0.f;
    }
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float f = __shfl_sync(~0u, mine[n / 4], n % 4 * 8 + lane_col() + c);
#pragma unroll
        for (int h = 0; h < 2; ++h) s.x[0][n][2 * h + c] *= f, d.x[0][n][2 * h + c] *= f;
      }
  }

  __device__ __forceinline__ void store(const Job& job, const View& view, int dim, const Sums& sums, float f) const {
    const GlobalRows<T> to(view, job.sequence.begin_kv, job.item.head, dim);
    const float factors[2] = {f, f};
    store_rows<T, C::kDim>(to, job.item.block * C::kKeys + warp_key(), job.sequence.mask.len, sums, factors);
  }
};

}  // namespace hstu_ops::cuda::sm90
