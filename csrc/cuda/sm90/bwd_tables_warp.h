// A warp of the Hopper backward that sums gradients of bias tables (bwd_tables.h): where it is, and its part of dS'.
#pragma once

#include "cuda/ptx/math.h"
#include "cuda/sm90/bwd_storage.h"
#include "cuda/sm90/fwd_bias.h"
#include "cuda/tile/table_grad.h"

namespace hstu_ops::cuda::sm90 {

// Eight elements of a row of dS', in pairs, or sums of up to four such rows: of float16 a quarter of them, which does
// not overflow.
template <class T>
struct ScoreWords {
  static constexpr bool kQuarters = std::is_same_v<T, __half>;
  static constexpr float kUnit = kQuarters ? 4.f : 1.f;  // of sums

  uint32_t x[4];

  __device__ __forceinline__ static ScoreWords load(uint32_t at) {
    const uint4 x = ptx::ld_shared_u4(at);
    return {{x.x, x.y, x.z, x.w}};
  }
  __device__ __forceinline__ void store(uint32_t at) const { ptx::st_shared(at, make_uint4(x[0], x[1], x[2], x[3])); }

  __device__ __forceinline__ void add(const ScoreWords& row) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = kQuarters ? ptx::fma_f16x2(row.x[i], pack(.25f, .25f, T{}), x[i]) : ptx::add_bf16x2(row.x[i], x[i]);
  }
  __device__ __forceinline__ float at(int i) const {
    const uint32_t pair = x[i / 2];
    if constexpr (kQuarters) {
      const float2 y = unpack(pair, T{});
      return i % 2 ? y.y : y.x;
    } else {
      return __uint_as_float(i % 2 ? pair & 0xffff0000 : pair << 16);
    }
  }
  __device__ __forceinline__ float sum() const {
    return ((at(0) + at(1)) + (at(2) + at(3))) + ((at(4) + at(5)) + (at(6) + at(7)));
  }
};

template <class C, class T>
struct TableWarp {
  using B = typename C::Relative;
  static constexpr int kKeys = 32;  // of the item's, a warp

  const BwdArguments& arguments;
  const BwdStorage<C, T>& shared;
  const unsigned thread = threadIdx.x % 128;
  unsigned done = 0;  // tiles

  // What lasts longer than a tile, in shared memory: items so far, the tile that the sums carried belong to or -1; of
  // the item, where its sums go (64 bits each), how far the warp's first key lies behind the first query, and its
  // factor.
  enum Word { kPosition, kTime = 2, kItems = 4, kCarried, kDistance, kFactor };
  __device__ int get(int at) const { return ptx::ld_shared_int(memory().word(at)); }
  __device__ void put(int at, int x) const {
    __syncwarp();
    if (lane() == 0) ptx::st_shared(memory().word(at), static_cast<uint32_t>(x));
    __syncwarp();
  }
  __device__ Count items() const { return {static_cast<unsigned>(get(kItems))}; }
  __device__ float factor() const { return __int_as_float(get(kFactor)); }

  // Worked out again where they are used: kept, what is derived from them would take more registers than there are.
  __device__ unsigned mine() const { return ptx::again(thread); }
  __device__ Count tiles() const { return {ptx::again(done)}; }
  __device__ int lane() const { return mine() % 32; }
  __device__ int warp() const { return mine() / 32; }
  __device__ TableSumMemory memory() const { return shared.table_sums(warp()); }
  __device__ const Job& job() const { return shared.state.jobs[items().template stage<kBwdJobs>()].job; }
  __device__ static int first_key(const Job& job) { return job.item.block * C::kKeys; }
  __device__ static int first_query(const Job& job, int tile) { return job.sequence.first_row + tile * C::kQueries; }
  __device__ BwdTile tile() const { return shared.state.tiles[tiles().template stage<C::kTileStages>()]; }
  __device__ BiasStage<B> stage() const {
    return BiasStage<B>(shared.bias().stage(tiles().template stage<C::kBiasStages>()));
  }
  __device__ const RelativeBiasParams& relative() const { return arguments.params.problem.relative; }

  // Eight queries of block `chunk` of row `row` of the item's keys.
  __device__ __forceinline__ uint32_t address(int row, int chunk) const {
    return shared.score_panel(tiles().template stage<C::kScoreStages>(), 0).at(row, chunk);
  }
  __device__ __forceinline__ float element(int row, int query) const {
    const uint32_t pair = address(row, query / 8) + query % 8 / 2 * 4;
    const float2 x = unpack(static_cast<uint32_t>(ptx::ld_shared_int(pair)), T{});
    return query % 2 ? x.y : x.x;
  }

  // The item's part of a table, of the block's copy, as two words.
  __device__ __forceinline__ void put_table(int word, const TableSums& to) const {
    const int64_t copy = blockIdx.x % arguments.table_copies * arguments.table_stride;
    const auto at = reinterpret_cast<int64_t>(to.sums + copy + job().item.head * to.head_stride);
    put(word, static_cast<int>(at)), put(word + 1, static_cast<int>(at >> 32));
  }
  __device__ __forceinline__ float* table(int word) const {
    return reinterpret_cast<float*>(ptx::ld_shared_int64(memory().word(word)));
  }
};

}  // namespace hstu_ops::cuda::sm90
