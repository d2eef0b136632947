// The bias as a template axis. A bias is made per work item, its Tile per tile of one warp:
//   add        turns products s into u = argument * (alpha s + bias)
//   add_grad   sums gradients ds of the bias into its tables, except what finish_tile leaves for later
// A tile has queries as rows, or as columns if kTransposed; queries and keys are rows and columns of the mask.
#pragma once

#include <new>

#include "core/bias.h"
#include "core/params.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/position_bias.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/time_bias.h"

namespace hstu_ops::cuda {

// Room in shared memory for the bias itself, in front of its tables.
constexpr int kBiasBytes = 128;

struct NoGradState {
  __device__ void finish(const BiasGradients&) {}
};

struct NoBias {
  static constexpr int kSharedBytes = 0;
  using GradState = NoGradState;

  __device__ NoBias(const AttentionProblem&, const Job&, void*) {}

  template <class T, int kKeys, int kQueries>
  __device__ bool finishes(TileOrigin) const {
    return false;
  }
  template <class T, int kKeys, int kQueries, int kWarps, class Shared>
  __device__ void finish_tile(const Shared&, TileOrigin, const BiasGradients&) const {}

  template <bool kTransposed, int kM, int kN>
  struct Tile {
    __device__ Tile(const NoBias&, TileOrigin) {}
    __device__ __forceinline__ void add(Accumulator<kM, kN>& s, float alpha, float) const {
      s.each([=](float& x, int, int) { x *= alpha; });
    }
    template <class T, class Slots>
    __device__ void add_grad(const Accumulator<kM, kN>&, const BiasGradients&, GradState&, const Slots&, bool) const {}
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

  template <class T, int kKeys, int kQueries>
  __device__ bool finishes(TileOrigin) const {
    return false;
  }
  template <class T, int kKeys, int kQueries, int kWarps, class Shared>
  __device__ void finish_tile(const Shared&, TileOrigin, const BiasGradients&) const {}

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
    template <class T, class Slots>
    __device__ void add_grad(const Accumulator<kM, kN>&, const BiasGradients&, GradState&, const Slots&, bool) const {}
  };
};

struct RelativeBias {
  static constexpr int kSharedBytes = kBiasBytes + TimeTerm::kSharedBytes;

  // One lane's part of the gradients.
  struct GradState {
    TimeRun run;

    __device__ void finish(const BiasGradients& to) {
      if (to.time.sums) run.finish({to.time, to.head, to.factor});
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
    // slots: scratch of this warp in shared memory; diagonal: finish_tile sums the position term.
    template <class T, class Slots>
    __device__ __forceinline__ void add_grad(const Accumulator<kM, kN>& ds, const BiasGradients& to, GradState& state,
                                             const Slots& slots, bool diagonal) const {
      if (to.position.sums && !diagonal)
        bias.position.template add_grad<kTransposed>(ds, bias.mask, origin,
                                                     TableTarget{to.position, to.head, to.factor});
      // Working the times out again takes less than holding them over two products.
      if (to.time.sums)
        Times(bias.time, origin.query, origin.key)
            .template add_grad<T>(bias.time, ds, TableTarget{to.time, to.head, to.factor}, state.run, slots);
    }
  };

  // Whether finish_tile takes the position term of a tile of a block of threads.
  template <class T, int kKeys, int kQueries>
  __device__ __forceinline__ bool finishes(TileOrigin o) const {
    return kIs16Bit<T> && position.weight && position.diagonal(mask, o, kQueries, kKeys);
  }
  // Once dS' of a whole tile is in shared memory.
  template <class T, int kKeys, int kQueries, int kWarps, class Shared>
  __device__ __forceinline__ void finish_tile(const Shared& ds, TileOrigin o, const BiasGradients& to) const {
    if constexpr (kIs16Bit<T>)
      if (to.position.sums && finishes<T, kKeys, kQueries>(o))
        position.template add_tile_grad<T, kKeys, kQueries, kWarps>(ds, o, {to.position, to.head, to.factor});
  }
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
