// The norm of rows, with or without a gate, backward. A team reads x, the gate and the gradient of its group of a row
// once, makes all sums that the statistics and the gradient need in one pass over its threads, and writes both
// gradients. For the gradients of weight and bias it keeps sums of its own columns in registers; a block adds its
// teams' in order, column_sums_kernel the blocks', so the order of every sum is fixed.
#include "core/silu.h"
#include "cuda/pointwise/sigmoid.h"
#include "cuda/pointwise/team_launch.h"

namespace hstu_ops::cuda {
namespace {

// Shared memory and registers of a block follow from these.
template <Gate kGate, bool kSums>
struct Config {
  static constexpr int kTensors = kGate == Gate::kNone ? 2 : 3;
  static constexpr int kStages = 4;
  static constexpr int kBlocks = kGate == Gate::kNone && !kSums ? 3 : 2;  // of a processor
};

template <class T, Gate kGate, bool kSums>
struct Backward {
  using R = Ring<T, Config<kGate, kSums>::kTensors, Config<kGate, kSums>::kStages>;
  using Floats = typename Piece<T>::Floats;
  static constexpr int kElements = Piece<T>::kElements;
  static constexpr bool kGated = kGate != Gate::kNone, kCopies = kGate == Gate::kAny;

  const NormBwdParams& params;
  const NormProblem& p;
  const Place<T> at;
  const Dropper dropper;
  float* shared;
  Stream<T> x, u, grad_out, grad_x, grad_u;
  float sum_weight[kPieces][kElements], sum_bias[kPieces][kElements];

  __device__ Backward(const NormBwdParams& params, const TeamLayout& layout, float* shared)
      : params(params), p(params.problem), at(p, layout), dropper(p.dropout), shared(shared), x(at, p.x) {
    grad_out = Stream<T>(at, params.grad_out, kCopies && p.concat ? 2 * int64_t{p.columns} : 0);
    grad_x = Stream<T>(at, params.grad_x);
    if constexpr (kGated) u = Stream<T>(at, p.u), grad_u = Stream<T>(at, params.grad_u);
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum_weight[i][e] = sum_bias[i][e] = 0;
  }

  __device__ __forceinline__ void fetch(uint32_t stage, int iteration) {
    R::fetch(stage, 0, at, iteration, x);
    R::fetch(stage, 1, at, iteration, grad_out);
    if constexpr (kGated) R::fetch(stage, 2, at, iteration, u);
  }

  __device__ bool with_silu() const { return kGate == Gate::kSilu || (kGate == Gate::kAny && p.silu_u); }
  __device__ Piece<T> gate(uint32_t stage, int piece) const { return R::get(stage, kGated ? 2 : 0, piece); }

  // Gradients of the result's product, `product`, and of the norm's own result, `normed`.
  __device__ __forceinline__ void gradients(uint32_t stage, int piece, const Piece<T>& gate, uint32_t kept,
                                            Floats& product, Floats& normed) const {
    const Piece<T> g = R::get(stage, 1, piece);
#pragma unroll
    for (int e = 0; e < kElements; ++e) product[e] = kCopies ? dropper.apply(kept, 8 * piece + e, g[e]) : g[e];
#pragma unroll
    for (int e = 0; e < kElements; ++e) normed[e] = kGated ? product[e] * gate[e] : product[e];
    if (with_silu()) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) normed[e] *= sigmoid<T>(gate[e]);
    }
  }

  __device__ __forceinline__ void run(uint32_t stage, int iteration) {
    const float pivot = pivot_of<R>(at, stage, iteration, shared);
    float sums[4] = {0, 0, 0, 0};  // of x - pivot, its square, its gradient d, d (x - pivot)
    uint32_t kept = 0;             // a byte for each piece
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (iteration >= at.counts[piece]) continue;
      if constexpr (kCopies) kept |= (dropped(iteration, piece, Section::kProduct) & 0xff) << (8 * piece);
      const Piece<T> in = R::get(stage, 0, piece);
      Floats product, d;
      gradients(stage, piece, gate(stage, piece), kept, product, d);
      with_affine(at, p.weight, piece, d, Times());
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float z = in[e] - pivot;
        sums[0] += z, sums[1] += z * z, sums[2] += d[e], sums[3] += d[e] * z;
      }
    }
    team_sum(sums, at.lanes, shared);
    const Statistics s(p, pivot, sums[0], sums[1]);
    // What the mean and the variance take from each element's gradient.
    const float inverse = 1.f / static_cast<float>(at.width), shift = sums[2] * inverse;
    const float slope = (sums[3] * inverse - (s.mean - pivot) * shift) * s.rstd;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
      if (iteration < at.counts[piece]) write(stage, iteration, piece, kept, s, shift, slope);
    grad_x.advance();
    if constexpr (kGated) grad_u.advance();
  }

  __device__ __forceinline__ void write(uint32_t stage, int iteration, int piece, uint32_t kept, const Statistics& s,
                                        float shift, float slope) {
    const Piece<T> in = R::get(stage, 0, piece), u_in = gate(stage, piece);
    Floats product, d, to;
    gradients(stage, piece, u_in, kept, product, d);
    if constexpr (kSums) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sum_weight[piece][e] += d[e] * s.template normed<T>(in[e]);
        sum_bias[piece][e] += d[e];
      }
    }
    with_affine(at, p.weight, piece, d, Times());
#pragma unroll
    for (int e = 0; e < kElements; ++e) to[e] = s.rstd * ((d[e] - shift) - s.template normed<T>(in[e]) * slope);
    add_copy(iteration, piece, Section::kInput, to);
    (kCopies ? Stream<T>::at_row(at, params.grad_x, row_of(iteration)) : grad_x).store(at, piece, to);
    if constexpr (kGated) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) to[e] = s.template normed<T>(in[e]);
      with_affine(at, p.weight, piece, to, Times());
      with_affine(at, p.bias, piece, to, Plus());
#pragma unroll
      for (int e = 0; e < kElements; ++e) to[e] *= product[e];
      add_copy(iteration, piece, Section::kGate, to);
      if (with_silu()) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) to[e] *= silu_grad(u_in[e], sigmoid<T>(u_in[e]));
      }
      (kCopies ? Stream<T>::at_row(at, params.grad_u, row_of(iteration)) : grad_u).store(at, piece, to);
    }
  }

  __device__ int64_t row_of(int iteration) const { return at.row + iteration * at.step; }
  __device__ __forceinline__ uint32_t dropped(int iteration, int piece, Section section) const {
    return dropper.kept(at, row_of(iteration), piece, section);
  }

  // The gradient of a copy of u or x in the result.
  __device__ __forceinline__ void add_copy(int iteration, int piece, Section section, Floats& to) const {
    if (!kCopies || !p.concat) return;
    const int64_t column = static_cast<int>(section) * int64_t{p.columns};
    const Piece<T> g = Stream<T>::at_row(at, params.grad_out, row_of(iteration), column).load(at, piece);
    const uint32_t kept = dropped(iteration, piece, section);
#pragma unroll
    for (int e = 0; e < kElements; ++e) to[e] += dropper.apply(kept, e, g[e]);
  }

  // The block's sums, [2][columns]: teams of the same group, in the order of their slots, add to `block`.
  __device__ __forceinline__ void finish(const TeamLayout& layout, float* sums, float* block) const {
    const int columns = layout.groups * at.width, first = static_cast<int>(blockIdx.y) * columns;
    const int count = min_int(columns, p.columns - first);
    const int team = static_cast<int>(threadIdx.x) / at.lanes, mine = team / layout.groups;
    const bool valid = mine < layout.slots && at.first < p.columns;
    bool there[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) there[i] = valid && at.column_of(i) < at.first + at.width;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      for (int slot = 0; slot < layout.slots; ++slot) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          if (mine != slot || !there[i]) continue;
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            float& x = block[at.column_of(i) - first + e];
            const float sum = which ? sum_bias[i][e] : sum_weight[i][e];
            x = slot ? x + sum : sum;
          }
        }
        __syncthreads();
      }
      float* const to = sums + (int64_t{blockIdx.x} * 2 + which) * p.columns + first;
      for (int c = static_cast<int>(threadIdx.x); c < count; c += kThreads) to[c] = block[c];
      __syncthreads();
    }
  }
};

template <class T, Gate kGate, bool kSums>
__global__ void __launch_bounds__(kThreads, Config<kGate, kSums>::kBlocks)
    norm_bwd_kernel(const __grid_constant__ NormBwdParams params, const TeamLayout layout, float* sums) {
  extern __shared__ uint4 memory[];
  __shared__ float shared[kTeamSumFloats<4>];
  Backward<T, kGate, kSums> rows(params, layout, shared);
  Backward<T, kGate, kSums>::R::walk(
      memory, rows.at.iterations, [&](uint32_t stage, int iteration) { rows.fetch(stage, iteration); },
      [&](uint32_t stage, int iteration) { rows.run(stage, iteration); });
  if constexpr (kSums) {
    __syncthreads();  // the ring is free
    rows.finish(layout, sums, reinterpret_cast<float*>(memory));
  }
}

constexpr int kSumColumns = 32, kSumSlices = 16;

// Each slice's sums in turn, then the slices'. blockIdx.y: weight, bias.
__global__ void __launch_bounds__(kSumColumns* kSumSlices)
    column_sums_kernel(const float* sums, int count, int columns, float* weight, float* bias) {
  __shared__ float slices[kSumSlices][kSumColumns];
  const int lane = static_cast<int>(threadIdx.x) % kSumColumns, slice = static_cast<int>(threadIdx.x) / kSumColumns;
  const int column = static_cast<int>(blockIdx.x) * kSumColumns + lane;
  float total = 0;
  if (column < columns) {
#pragma unroll 8
    for (int b = slice; b < count; b += kSumSlices) total += sums[(int64_t{b} * 2 + blockIdx.y) * columns + column];
  }
  slices[slice][lane] = total;
  __syncthreads();
  if (slice > 0 || column >= columns) return;
  for (int s = 1; s < kSumSlices; ++s) total += slices[s][lane];
  (blockIdx.y ? bias : weight)[column] = total;
}

int summing_blocks(const NormProblem& p) {
  int blocks = 0;
  with_gate(gate_of(p), [&](auto gate) -> Status {
    blocks = row_blocks(p, team_layout(p), Config<gate.value, true>::kBlocks);
    return {};
  });
  return blocks;
}

Status clear_sums(const NormBwdParams& params, cudaStream_t stream) {
  for (void* to : {params.grad_weight, params.grad_bias})
    if (to) HSTU_TRY(cudaMemsetAsync(to, 0, sizeof(float) * params.problem.columns, stream));
  return {};
}

}  // namespace

Status column_sums(const NormBwdParams& params, const float* sums, int count, cudaStream_t stream) {
  const int columns = params.problem.columns;
  column_sums_kernel<<<dim3(ceil_div(columns, kSumColumns), 2), kSumColumns * kSumSlices, 0, stream>>>(
      sums, count, columns, static_cast<float*>(params.grad_weight), static_cast<float*>(params.grad_bias));
  HSTU_TRY(cudaGetLastError());
  return {};
}

size_t norm_bwd_workspace(const NormBwdParams& params) {
  const NormProblem& p = params.problem;
  if (!params.grad_weight || p.rows == 0) return 0;
  const int count = max_int(norm_any_sums(p), fits_teams(p) ? summing_blocks(p) : 0);
  return sizeof(float) * 2 * static_cast<size_t>(p.columns) * count;
}

Status norm_bwd(const NormBwdParams& params, void* workspace, void* stream) {
  const NormProblem& p = params.problem;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::kFloat64) return {kNoFloat64};
  if (p.rows == 0) return clear_sums(params, queue);
  float* const sums = params.grad_weight ? static_cast<float*>(workspace) : nullptr;
  if (!fits_teams(p) || !aligned(params.grad_out, p.dtype) || !aligned(params.grad_x, p.dtype) ||
      !aligned(params.grad_u, p.dtype))
    return norm_any_bwd(params, sums, queue);
  const TeamLayout layout = team_layout(p);
  const Status status = with_type(p.dtype, [&](auto element) {
    return with_gate(gate_of(p), [&](auto gate) {
      return with_flag(sums != nullptr, [&](auto summed) -> Status {
        using C = Config<gate.value, summed.value>;
        constexpr int kBytes = Backward<decltype(element), gate.value, summed.value>::R::kBytes;
        const dim3 grid(static_cast<unsigned>(row_blocks(p, layout, C::kBlocks)), group_blocks(p, layout));
        const auto kernel = norm_bwd_kernel<decltype(element), gate.value, summed.value>;
        HSTU_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
        kernel<<<grid, kThreads, kBytes, queue>>>(params, layout, sums);
        HSTU_TRY(cudaGetLastError());
        return {};
      });
    });
  });
  return status.ok() && sums ? column_sums(params, sums, summing_blocks(p), queue) : status;
}

}  // namespace hstu_ops::cuda
