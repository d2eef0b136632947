// The bias as a template axis. A bias is made per work item, its Tile per tile of one warp. prepare() looks at many
// tiles of a warp at a time, before the first Tile of them; a Tile begins to load what add() needs, so make it before a
// product; add() turns products s into u = argument * (alpha s + bias); add_grad() sums gradients ds into tables.
// A tile has queries as rows, or as columns if kTransposed; queries and keys are rows and columns of the mask. Tiles a
// warp works on differ in their columns: number `tile` is kN * 8 columns from number `tile` - 1.
#pragma once

#include <new>

#include "core/bias.h"
#include "core/params.h"
#include "cuda/tile/bias_notes.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/position_bias.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/time_bias.h"
#include "cuda/tile/time_steps.h"

namespace hstu_ops::cuda {

// Room in shared memory for the bias itself, in front of its tables.
constexpr int kBiasBytes = 128;

struct NoGradState {
  __device__ void finish(const BiasGradients&) {}
};

struct NoBias {
  static constexpr int shared_bytes(int) { return 0; }
  using GradState = NoGradState;

  __device__ NoBias(const AttentionProblem&, const Job&, void*) {}
  template <bool kTransposed>
  __device__ static void make(const AttentionProblem&, const Job&, void*, int, int) {}

  template <bool kTransposed, int kRows, int kCols>
  __device__ void prepare(int, TileOrigin, int) const {}

  template <bool kTransposed, int kM, int kN>
  struct Tile {
    __device__ Tile(const NoBias&, int, TileOrigin, int) {}
    __device__ __forceinline__ void add(Accumulator<kM, kN>& s, float alpha, float) const {
      s.each([=](float& x, int, int) { x *= alpha; });
    }
    template <class T, class Slots>
    __device__ void add_grad(const Accumulator<kM, kN>&, const BiasGradients&, GradState&, const Slots&) const {}
  };
};

// Its gradient has a kernel of its own.
struct DenseBias {
  static constexpr int shared_bytes(int) { return kBiasBytes; }
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
  template <bool kTransposed>
  __device__ static void make(const AttentionProblem& problem, const Job& job, void* shared, int thread, int) {
    if (thread == 0) new (shared) DenseBias(problem, job, nullptr);
  }

  template <bool kTransposed, int kRows, int kCols>
  __device__ void prepare(int, TileOrigin, int) const {}

  template <bool kTransposed, int kM, int kN>
  struct Tile {
    const DenseBias& bias;
    TileOrigin origin;

    __device__ Tile(const DenseBias& bias, int, TileOrigin origin, int) : bias(bias), origin(origin) {}
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
    __device__ void add_grad(const Accumulator<kM, kN>&, const BiasGradients&, GradState&, const Slots&) const {}
  };
};

// kLines: see TimeTerm.
template <bool kLines>
struct RelativeBiasOf {
  static constexpr int shared_bytes(int warps) {
    return kBiasBytes + TimeTerm::kSharedBytes + warps * BiasNotes::kBytes;
  }

  // One warp's part of the gradients.
  struct GradState {
    TimeWindow window;

    __device__ void finish(const BiasGradients& to) {
      if (to.time.sums) window.finish({to.time, to.head, to.factor});
    }
  };

  const Mask& mask;
  PositionTerm position;
  TimeTerm time;

  __device__ RelativeBiasOf(const AttentionProblem& problem, const Job& job, void* shared)
      : mask(job.sequence.mask),
        position(problem.relative, job.item.head),
        time(problem.relative, job.sequence, job.item.head, static_cast<char*>(shared) + kBiasBytes) {}

  // Set where times do not rise: behind the bias, cleared before the item.
  __device__ static int& disorder(void* shared) { return static_cast<int*>(shared)[kBiasBytes / 4 - 1]; }
  __device__ bool sorted() const { return disorder(const_cast<RelativeBiasOf*>(this)) == 0; }

  template <bool kTransposed>
  __device__ static __forceinline__ void make(const AttentionProblem& problem, const Job& job, void* shared, int thread,
                                              int threads) {
    const RelativeBiasOf bias(problem, job, shared);
    if (bias.time.weight) {
      bias.time.template make_cells<kLines>(static_cast<char*>(shared) + kBiasBytes, thread, threads);
      if (!bias.time.template rising<kTransposed>(thread, threads)) disorder(shared) = 1;
    }
    static_assert(sizeof(RelativeBiasOf) <= kBiasBytes - sizeof(int));
    if (thread == 0) new (shared) RelativeBiasOf(bias);
    bias.notes(thread / 32).reset();
  }

  // Behind the cells.
  __device__ BiasNotes notes(int warp) const { return {time.cells + TimeTerm::kSharedBytes, warp}; }

  template <bool kTransposed, int kRows, int kCols>
  __device__ __forceinline__ void prepare(int warp, TileOrigin at, int tile) const {
    notes(warp).template prepare<kTransposed, kRows, kCols>(mask, position, time, sorted(), tile, at);
  }

  template <bool kTransposed, int kM, int kN>
  struct Tile {
    using Times = TileTimes<kTransposed, kM * 16, kN * 8, kLines>;
    using Steps = TimeSteps<kTransposed, kM, kN>;
    using Lines = Diagonals<kTransposed, kM, kN>;

    const RelativeBiasOf& bias;
    TileOrigin origin;
    BiasNote note;
    float weight;                   // of the first bucket of few
    float strip[Lines::kCount][2];  // weights of the position term by diagonal, where diagonal

    __device__ __forceinline__ Tile(const RelativeBiasOf& bias, int warp, TileOrigin origin, int tile)
        : bias(bias), origin(origin), note(bias.notes(warp).at(tile)) {
      const bool constant = bias.time.weight && few();
      weight = constant ? __ldg(bias.time.weight + note.first()) : 0.f;
      const float* from = Lines::zeros();  // a choice of addresses: choices of values take an address each
      if (note.diagonal()) from = bias.position.weight + Lines(bias.position, origin).from;
#pragma unroll
      for (int d = 0; d < Lines::kCount; ++d)
#pragma unroll
        for (int c = 0; c < 2; ++c) strip[d][c] = __ldg(from + Lines::offset(d + Lines::kFirst, c));
    }

    // slots: scratch of this warp in shared memory until add_grad, the same there; none without gradients.
    template <class Slots = NoSlots>
    __device__ __forceinline__ void add(Accumulator<kM, kN>& s, float alpha, float argument,
                                        const Slots& slots = {}) const {
      const float shift = argument * weight;
#pragma unroll
      for (int d = Lines::kFirst; d < kN; ++d)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float b = fmaf(argument, strip[d - Lines::kFirst][c], shift);
#pragma unroll
          for (int r = 0; r < 2 * kM; ++r)
            if (d + r >= 0 && d + r < kN) {
              float& x = s.x[r / 2][d + r][r % 2 * 2 + c];
              x = fmaf(x, alpha, b);
            }
        }
      if (note.elementwise()) bias.position.template add_elementwise<kTransposed>(s, bias.mask, origin, argument);
      if (note.steps() == 0) return;
      if (few()) {
        Steps(bias.time, origin.query, origin.key).add(bias.time, note.first(), note.steps(), argument, s);
      } else {
        Times(bias.time, origin.query, origin.key).add(bias.time, s, argument, slots);
      }
    }
    template <class T, class Slots>
    __device__ __forceinline__ void add_grad(const Accumulator<kM, kN>& ds, const BiasGradients& to, GradState& state,
                                             const Slots& slots) const {
      if (to.time.sums) add_time_grad<T>(ds, {to.time, to.head, to.factor}, state.window, slots);
      if (to.position.sums) add_position_grad<T>(ds, {to.position, to.head, to.factor});
    }

   private:
    __device__ bool few() const { return note.steps() != BiasNote::kMany; }
    template <class T, class Slots>
    __device__ __forceinline__ void add_time_grad(const Accumulator<kM, kN>& ds, const TableTarget& to,
                                                  TimeWindow& window, const Slots& slots) const {
      // Differences of sums would not be as accurate as fp32 is.
      if (note.steps() != 0 && !(kIs16Bit<T> && few())) {
        if (Times::template add_kept<T>(ds, to, slots)) return;
        Times(bias.time, origin.query, origin.key).template add_grad<T>(bias.time, ds, to, slots);
        return;
      }
      float part[4] = {};  // one sum would wait for itself
      ds.each([&](float x, int row, int col) { part[row % 16 / 8 * 2 + col % 8] += x; });
      const float total = (part[0] + part[1]) + (part[2] + part[3]);
      if (note.steps() == 0) {
        window.put(to, note.first(), total);
      } else {
        Steps(bias.time, origin.query, origin.key).sum(bias.time, note.first(), note.steps(), ds, total, to, window);
      }
    }
    template <class T>
    __device__ __forceinline__ void add_position_grad(const Accumulator<kM, kN>& ds, const TableTarget& to) const {
      if (note.elementwise()) {
        bias.position.template sum_elementwise<kTransposed>(ds, bias.mask, origin, to);
        return;
      }
      const Lines lines(bias.position, origin);
      if constexpr (kIs16Bit<T>) {
        lines.template sum_products<T>(bias.position, origin, ds, to);
      } else {
        lines.sum(ds, to);
      }
    }
  };
};

using RelativeBias = RelativeBiasOf<false>;
using ManyBucketsBias = RelativeBiasOf<true>;

template <class Bias>
constexpr bool kIsRelative = std::is_same_v<Bias, RelativeBias> || std::is_same_v<Bias, ManyBucketsBias>;

// Before the bias of the next item is made, with a barrier between.
template <class Bias>
__device__ __forceinline__ void reset_bias(void* shared) {
  if constexpr (kIsRelative<Bias>) Bias::disorder(shared) = 0;
}

}  // namespace hstu_ops::cuda
