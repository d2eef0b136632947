// The bias as a template axis. A bias is made per work item, its Tile per tile of one warp:
//   add        turns products s into u = argument * (alpha s + bias)
//   add_grad   sums gradients ds of the bias into its tables
// A tile has queries as rows, or as columns if kTransposed; queries and keys are rows and columns of the mask.
#pragma once

#include <new>

#include "core/bias.h"
#include "core/params.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/time_buckets.h"

namespace hstu_ops::cuda {

// The tile's first query and key; queries run along the rows unless kTransposed.
struct TileOrigin {
  int query, key;
};

// Room in shared memory for the bias itself, in front of its tables.
constexpr int kBiasBytes = 128;

struct NoGradState {
  __device__ NoGradState(int, float) {}
  __device__ void finish(const BiasGradients&) {}
};

struct NoBias {
  static constexpr int kSharedBytes = 0;
  using GradState = NoGradState;

  __device__ NoBias(const AttentionProblem&, const Job&, void*) {}

  template <bool kTransposed, int kM, int kN>
  struct Tile {
    __device__ Tile(const NoBias&, TileOrigin) {}
    __device__ __forceinline__ void add(Accumulator<kM, kN>& s, float alpha, float) const {
      s.each([=](float& x, int, int) { x *= alpha; });
    }
    __device__ void add_grad(const Accumulator<kM, kN>&, const BiasGradients&, GradState&) const {}
  };
};

// Its gradient has a kernel of its own.
struct DenseBias {
  static constexpr int kSharedBytes = kBiasBytes;
  using GradState = NoGradState;

  const float* data;
  int64_t row_stride;
  int size;

  __device__ DenseBias(const AttentionProblem& problem, const Job& job, void*)
      : DenseBias(problem.dense, job.item.sequence, job.item.head) {}
  __device__ DenseBias(const DenseBiasParams& p, int sequence, int head)
      : data(static_cast<const float*>(p.data) + sequence * p.batch_stride + head * p.head_stride),
        row_stride(p.row_stride),
        size(p.size) {}

  template <bool kTransposed, int kM, int kN>
  struct Tile {
    const DenseBias& bias;
    TileOrigin origin;

    __device__ Tile(const DenseBias& bias, TileOrigin origin) : bias(bias), origin(origin) {}
    __device__ __forceinline__ void add(Accumulator<kM, kN>& s, float alpha, float argument) const {
      const int query0 = origin.query + (kTransposed ? lane_col() : lane_row());
      const int key0 = origin.key + (kTransposed ? lane_row() : lane_col());
      const float* corner = bias.data + query0 * bias.row_stride + key0;
      s.each([&](float& x, int row, int col) {
        const int i = kTransposed ? col : row, j = kTransposed ? row : col;
        const bool inside = query0 + i >= 0 && query0 + i < bias.size && key0 + j < bias.size;
        x = fmaf(x, alpha, inside ? argument * __ldg(corner + i * bias.row_stride + j) : 0.f);
      });
    }
    __device__ void add_grad(const Accumulator<kM, kN>&, const BiasGradients&, GradState&) const {}
  };
};

// Table of 2 * positions - 1 weights by the distance of logical positions.
struct PositionTerm {
  const float* weight;  // null: absent
  int positions;

  __device__ PositionTerm(const RelativeBiasParams& p, int head)
      : weight(p.position_weight ? static_cast<const float*>(p.position_weight) + head * p.position_head_stride : nullptr),
        positions(p.positions) {}

  // Do all elements of the tile read entries that run along its diagonals, with nothing to clamp?
  __device__ __forceinline__ bool diagonal(const Mask& mask, TileOrigin o, int queries, int keys) const {
    const int lowest = o.key - (o.query + queries - 1) + positions - 1, highest = o.key + keys - 1 - o.query + positions - 1;
    return min_int(o.query, o.key) >= mask.shift() && max_int(o.query + queries, o.key + keys) <= mask.history + 1 &&
           lowest >= 0 && highest <= 2 * positions - 2;
  }

  // s = alpha s + argument (weight + constant)
  template <bool kTransposed, int kM, int kN>
  __device__ __forceinline__ void add(Accumulator<kM, kN>& s, const Mask& mask, TileOrigin o, float alpha, float argument,
                                      float constant) const {
    constexpr int kRows = kM * 16, kCols = kN * 8;
    if (!weight) {
      const float b = argument * constant;
      s.each([=](float& x, int, int) { x = fmaf(x, alpha, b); });
    } else if (diagonal(mask, o, kTransposed ? kCols : kRows, kTransposed ? kRows : kCols)) {
      const int step = lane_col() - lane_row();
      const float* from = weight + (o.key - o.query + positions - 1 + (kTransposed ? -step : step));
      // One load serves all elements of a diagonal: those with the same 8 (n - 2 m - h) + c.
#pragma unroll
      for (int d = 1 - 2 * kM; d < kN; ++d)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int offset = 8 * d + c;
          const float b = argument * (__ldg(from + (kTransposed ? -offset : offset)) + constant);
#pragma unroll
          for (int r = 0; r < 2 * kM; ++r)
            if (d + r >= 0 && d + r < kN) {
              float& x = s.x[r / 2][d + r][r % 2 * 2 + c];
              x = fmaf(x, alpha, b);
            }
        }
    } else {
      s.each([&](float& x, int row, int col) {
        const int i = row + lane_row(), j = col + lane_col();
        const int at = position_index(mask.position(o.query + (kTransposed ? j : i)), mask.position(o.key + (kTransposed ? i : j)), positions);
        x = fmaf(x, alpha, argument * (__ldg(weight + at) + constant));
      });
    }
  }

  template <bool kTransposed, int kM, int kN>
  __device__ __forceinline__ void add_grad(const Accumulator<kM, kN>& ds, const Mask& mask, TileOrigin o, const TableSums& sums,
                                           int head, float factor) const {
    constexpr int kRows = kM * 16, kCols = kN * 8;
    if (diagonal(mask, o, kTransposed ? kCols : kRows, kTransposed ? kRows : kCols)) {
      const int step = lane_col() - lane_row();
      const int from = o.key - o.query + positions - 1 + (kTransposed ? -step : step);
#pragma unroll
      for (int d = 1 - 2 * kM; d < kN; ++d)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int offset = 8 * d + c;
          float sum = 0.f;
#pragma unroll
          for (int r = 0; r < 2 * kM; ++r)
            if (d + r >= 0 && d + r < kN) sum += ds.x[r / 2][d + r][r % 2 * 2 + c];
          sums.add(head, from + (kTransposed ? -offset : offset), sum * factor);
        }
    } else {
#pragma unroll 1
      for (int at = 0; at < kM * kN * 4; ++at) {
        const int i = element_row<kN>(at), j = element_col<kN>(at);
        const int query = mask.position(o.query + (kTransposed ? j : i)), key = mask.position(o.key + (kTransposed ? i : j));
        sums.add(head, position_index(query, key, positions), ds.pick(at) * factor);
      }
    }
  }
};

struct RelativeBias {
  static constexpr int kSharedBytes = kBiasBytes + TimeTerm::kSharedBytes;

  // One lane's part of the gradients; factor turns what add_grad is given into ds.
  struct GradState {
    TimeRun run;

    __device__ GradState(int head, float factor) : run{head, 0, factor, 0.f} {}
    __device__ void finish(const BiasGradients& to) {
      if (to.time.sums) run.finish(to.time);
    }
  };

  const Mask& mask;
  PositionTerm position;
  TimeTerm time;

  // Leaves its table in shared memory; all threads wait before using it.
  __device__ RelativeBias(const AttentionProblem& problem, const Job& job, void* shared)
      : mask(job.sequence.mask),
        position(problem.relative, job.item.head),
        time(problem.relative, job.sequence, job.item.head, static_cast<char*>(shared) + kBiasBytes) {}

  template <bool kTransposed, int kM, int kN>
  struct Tile {
    using Times = TileTimes<kTransposed, kM * 16, kN * 8>;

    const RelativeBias& bias;
    TileOrigin origin;

    __device__ Tile(const RelativeBias& bias, TileOrigin origin) : bias(bias), origin(origin) {}

    __device__ __forceinline__ void add(Accumulator<kM, kN>& s, float alpha, float argument) const {
      const Times times(bias.time, origin.query, origin.key);
      const bool constant = times.constant();
      const float weight = bias.time.weight && constant ? __ldg(bias.time.weight + times.bucket) : 0.f;
      bias.position.template add<kTransposed>(s, bias.mask, origin, alpha, argument, weight);
      if (!constant) times.add(bias.time, s, argument);
    }
    __device__ __forceinline__ void add_grad(const Accumulator<kM, kN>& ds, const BiasGradients& to, GradState& state) const {
      if (to.position.sums)
        bias.position.template add_grad<kTransposed>(ds, bias.mask, origin, to.position, state.run.head, state.run.factor);
      // Working the times out again takes less than holding them over two products.
      if (to.time.sums) Times(bias.time, origin.query, origin.key).add_grad(bias.time, ds, to.time, state.run);
    }
  };
};

// Makes the bias of a work item in shared memory, where it costs no registers; all threads wait before using it.
template <class Bias>
__device__ const Bias& make_bias(const AttentionProblem& problem, const Job& job, void* shared) {
  static_assert(sizeof(Bias) <= kBiasBytes);
  const Bias bias(problem, job, shared);
  if (threadIdx.x == 0 && Bias::kSharedBytes > 0) new (shared) Bias(bias);
  return *static_cast<const Bias*>(shared);
}

}  // namespace hstu_ops::cuda
