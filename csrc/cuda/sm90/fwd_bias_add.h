// How a computing warp of the Hopper kernels adds the bias to its scores, in the forward beside the product that came
// before. Relative bias: one note and the weights of the diagonals from shared memory, and where the note says so a
// comparison of each score with a boundary of times, or a look-up. Dense bias is read from global memory.
#pragma once

#include "cuda/sm90/fwd_bias_time.h"

namespace hstu_ops::cuda::sm90 {

// The position term of a tile with targets or contextual rows, whose logical positions do not all differ, from its
// window.
template <class B>
__device__ __forceinline__ void add_from_window(const BiasStage<B>& stage, const Mask& mask, const BiasTile& at,
                                                float argument, Accumulator<1, 8>& s) {
  const Lane lane;
  const int row = at.row + lane.row(), col = at.col + lane.col();
  const int first = stage.window().distance(at.row - at.warp * 16, at.col);
  const uint32_t low = stage.window().at(-first - mask.position(row)),
                 high = stage.window().at(-first - mask.position(row + 8));
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint32_t away = 4 * mask.position(col + n * 8 + c);
      float* x = &s.x[0][n][c];
      x[0] = fmaf(argument, ptx::ld_shared(low + away), x[0]);
      x[2] = fmaf(argument, ptx::ld_shared(high + away), x[2]);
    }
}

// Weights by logical position, from the table, of rows `row` and row + 8, columns `col` and col + 1; kTransposed: rows
// are keys.
template <bool kTransposed>
__device__ __forceinline__ void find_positions(const AttentionProblem& problem, const Job& job, int row, int col,
                                               float (&x)[4]) {
  const PositionTerm position(problem.relative, job.item.head);
  const int rows[2] = {job.sequence.mask.position(row), job.sequence.mask.position(row + 8)};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int at = job.sequence.mask.position(col + c);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      x[2 * r + c] = ptx::ld_global(position.weight + (kTransposed ? position_index(at, rows[r], position.positions)
                                                                   : position_index(rows[r], at, position.positions)));
  }
}

// Weights by time of the same, by binary search among buckets first to last, for any times.
template <bool kTransposed>
__device__ __forceinline__ void search(const TimeTerm& time, int row, int col, int first, int last, float (&x)[4]) {
  int64_t gap[4];
  int bucket[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int i = row + e / 2 * 8, j = col + e % 2;
    gap[e] =
        kTransposed ? time_gap(time.query_time(j), time.key_time(i)) : time_gap(time.query_time(i), time.key_time(j));
    bucket[e] = first;
  }
#pragma unroll 1
  for (int step = 1 << (31 - __clz((last - first) | 1)); step > 0; step /= 2)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (bucket[e] + step <= last && __ldg(time.boundaries + bucket[e] + step - 1) <= gap[e]) bucket[e] += step;
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = ptx::ld_global(time.weight + bucket[e]);
}

// The terms that a tile's note has no shortcut for. Half of the scores at a time wait in 2 KB of shared memory, so that
// the loop over them is rolled and finds registers; the halves are not (rolled, too: a third slower).
template <bool kTransposed>
__device__ __forceinline__ void add_one_by_one(const AttentionProblem& problem, const Job& job, const WarpNote& note,
                                               unsigned code, const BiasTile& at, float argument,
                                               Accumulator<1, 8>& s) {
  const Lane lane;
  const uint32_t slot = at.scratch + lane.id * 16;
  const int row = at.row + lane.row();
#pragma unroll
  for (int first = 0; first < 8; first += 4) {
    s.each_block_from<4>(
        first, [&](float(&x)[4], int n) { ptx::st_shared(slot + n % 4 * 512, make_float4(x[0], x[1], x[2], x[3])); });
#pragma unroll 1
    for (int n = 0; n < 4; ++n) {
      if (!WarpNote::kept_block<kTransposed>(code, first + n, 1)) continue;
      const int col = (first + n) * 8 + lane.col();
      const auto add = [&](const float(&b)[4]) {
        const float4 y = ptx::ld_shared_v4(slot + n * 512);
        ptx::st_shared(slot + n * 512, make_float4(fmaf(argument, b[0], y.x), fmaf(argument, b[1], y.y),
                                                   fmaf(argument, b[2], y.z), fmaf(argument, b[3], y.w)));
      };
      float b[4];
      if (code & WarpNote::kBeyond) {
        find_positions<kTransposed>(problem, job, row, at.col + col, b);
        add(b);
      }
      if (!(code & WarpNote::kSearch)) continue;
      const TimeTerm time(problem.relative, job.sequence, job.item.head, nullptr);
      const int2 buckets = note.words();
      search<kTransposed>(time, row, at.col + col, buckets.x, buckets.x + buckets.y, b);
      add(b);
    }
    s.each_block_from<4>(first, [&](float(&x)[4], int n) {
      const float4 y = ptx::ld_shared_v4(slot + n % 4 * 512);
      x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    });
  }
}

// What a tile's bias has besides one weight a diagonal and one bucket. Most tiles have nothing, or boundaries: each
// further branch that one of those takes costs a fetch of instructions. place(): the tile, asked where it is needed, as
// it is read from shared memory; ready(): called before the scratch is used, if it is.
template <class B, class Place, class Ready>
__device__ __forceinline__ void add_uncommon(const AttentionProblem& problem, const Job& job, const BiasStage<B>& stage,
                                             const BiasTables<B>& tables, const WarpNote& note, unsigned code,
                                             const Place& place, float argument, Accumulator<1, 8>& s,
                                             const Ready& ready) {
  if (code == 0) return;
  add_steps(stage, note, code & WarpNote::kSteps, place().times, s);
  if (!(code & WarpNote::kUncommon)) return;
  look_up_if_noted(stage, tables, note, code, place().times, s);
  if (!(code & (WarpNote::kOneByOne | WarpNote::kClamped))) return;
  const BiasTile at = place();
  if (code & WarpNote::kClamped && !(code & WarpNote::kBeyond))
    add_from_window(stage, job.sequence.mask, at, argument, s);
  if (!(code & WarpNote::kOneByOne)) return;
  ready();
  add_one_by_one<B::kTransposed>(problem, job, note, code, at, argument, s);
}

// The bias of one tile of a warp: made before the product, for it says what there is to do; load() comes before the
// wait for the scores, of which add() makes u = argument * (alpha s + bias); alpha comes multiplied by the argument.
template <class C, class Bias = typename C::Bias>
struct TileBias;

template <class C>
struct TileBias<C, NoBias> {
  __device__ TileBias(uint32_t, BiasTables<typename C::Relative>, const BiasTile&) {}
  __device__ void load(float) {}
};

template <class C>
struct TileBias<C, DenseBias> {
  __device__ TileBias(uint32_t, BiasTables<typename C::Relative>, const BiasTile&) {}
  __device__ void load(float) {}

  template <class Place>
  __device__ __forceinline__ void add(const AttentionProblem& problem, const Job& job, const Place& place, float alpha,
                                      float argument, Accumulator<1, 8>& s) const {
    const BiasTile at = place();
    const DenseBias bias(problem, job, nullptr);
    if (has_pairs(bias)) {
      add<true>(bias, at, alpha, argument, s);
    } else {
      add<false>(bias, at, alpha, argument, s);
    }
  }

 private:
  // Are columns 2 i and 2 i + 1 of a row on 8 bytes, and inside both or neither?
  __device__ static bool has_pairs(const DenseBias& b) {
    return b.size % 2 == 0 && b.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(b.data) % 8 == 0;
  }
  // kPairs: two columns a load, which are there or not.
  template <bool kPairs>
  __device__ __forceinline__ void add(const DenseBias& bias, const BiasTile& at, float alpha, float argument,
                                      Accumulator<1, 8>& s) const {
    const int lane = ptx::thread_index() % 32;
    const int row = at.row + lane / 4, col = at.col + lane % 4 * 2;
    const float* low = bias.data + row * bias.row_stride + col;
    const float* high = low + 8 * bias.row_stride;
    const int columns = bias.size - col;
    const bool inside[2] = {row >= 0 && row < bias.size, row + 8 >= 0 && row + 8 < bias.size};
    constexpr int kBatch = C::kDim == 128 ? 4 : 8;  // values in flight: registers are scarce
#pragma unroll
    for (int first = 0; first < 32; first += kBatch) {
      float b[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i += kPairs ? 2 : 1) {
        const int n = (first + i) / 4, e = (first + i) % 4, j = n * 8 + e % 2;
        const bool there = inside[e / 2] && j < columns;
        const float* from = (e / 2 ? high : low) + j;
        if constexpr (kPairs) {
          const float2 pair = ptx::ld_global_pair_if(there, from);
          b[i] = pair.x, b[i + 1] = pair.y;
        } else {
          b[i] = ptx::ld_global_if(there, from);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float& x = s.x[0][(first + i) / 4][(first + i) % 4];
        x = fmaf(x, alpha, argument * b[i]);
      }
    }
  }
};

template <class C>
struct TileBias<C, RelativeBias> {
  using B = typename C::Relative;
  BiasStage<B> stage;
  BiasTables<B> tables;
  WarpNote note;
  unsigned code;
  float weight;         // of the first bucket
  uint32_t window;      // see BiasTables::diagonals
  float2 diagonals[9];  // weights of the position term and the first bucket together

  __device__ __forceinline__ TileBias(uint32_t base, BiasTables<B> tables, const BiasTile& at)
      : stage(base), tables(tables), note(stage.note(at.warp)) {
    const int2 head = note.head();
    code = ptx::uniform(head.x);
    weight = __int_as_float(head.y);
    window = tables.diagonals(stage, code, at.warp * 16 + lane_row(), lane_col());
  }

  __device__ __forceinline__ void load(float argument) {
#pragma unroll
    for (int d = 0; d < 9; ++d) {
      const float2 x = ptx::ld_shared_v2(window + (d - 1) * 32);
      diagonals[d] = make_float2(fmaf(argument, x.x, weight), fmaf(argument, x.y, weight));
    }
  }

  template <class Place>
  __device__ __forceinline__ void add(const AttentionProblem& problem, const Job& job, const Place& place, float alpha,
                                      float argument, Accumulator<1, 8>& s) {
#pragma unroll
    for (int d = -1; d < 8; ++d)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (d + r < 8 && d + r >= 0) {
          float* x = &s.x[0][d + r][r * 2];
          x[0] = fmaf(x[0], alpha, diagonals[d + 1].x);
          x[1] = fmaf(x[1], alpha, diagonals[d + 1].y);
        }
    add_uncommon(problem, job, stage, tables, note, code, place, argument, s, [] {});
  }
};

template <class C>
struct TileBias<C, ManyBucketsBias> : TileBias<C, RelativeBias> {
  using TileBias<C, RelativeBias>::TileBias;
};

}  // namespace hstu_ops::cuda::sm90
