// The norm of rows, with or without a gate, backward. Blocks stay and walk over rows; cp.async brings the next row's
// tensors into shared memory meanwhile. A team reads its group of a row once, finds the mean, then all sums that the
// deviation and the gradient need, and writes both gradients. For the gradients of weight and bias it keeps sums of its
// own columns in registers; a block adds its teams' in order, column_sums_kernel the blocks', so the order of every sum
// is fixed.
#include "core/silu.h"
#include "cuda/device.h"
#include "cuda/pointwise/sigmoid.h"
#include "cuda/pointwise/team_launch.h"
#include "cuda/pointwise/walk.h"
#include "cuda/ptx/dependent.h"

namespace hstu_ops::cuda {
namespace {

// Shared memory and registers of a block follow from these.
template <Gate kGate, bool kSums>
struct Config {
  static constexpr int kTensors = kGate == Gate::kNone ? 2 : kGate == Gate::kAny ? 5 : 3;
  static constexpr int kStages = 2;
  static constexpr int kBlocks = kGate == Gate::kPlain && !kSums ? 3 : 2;  // of a processor
  static constexpr int kTurns = kGate == Gate::kAny || (kGate != Gate::kNone && kSums) ? kManyTurns : 1;
  static_assert(kBlocks <= kMostBlocks, "can_walk counts on it");
};

// What a row's mean and variance take from the gradient of its elements, and what is left of each.
struct Taken {
  float scaled, shift, slope;
};

// kSums: there is a weight or a bias, or their gradients are wanted.
template <class T, Gate kGate, bool kSums, Team kTeam>
struct Backward {
  using R = Ring<T, Config<kGate, kSums>::kTensors, Config<kGate, kSums>::kStages>;
  using Floats = typename Piece<T>::Floats;
  static constexpr int kElements = Piece<T>::kElements;
  static constexpr bool kGated = kGate != Gate::kNone, kCopies = kGate == Gate::kAny;
  enum Tensor { kX, kGrad, kU, kGradOfGate, kGradOfInput };  // in the ring; the last two are those of copies

  const NormBwdParams& params;
  const NormProblem& p;
  const TeamLayout& layout;
  const Span span;
  const Place<T, kTeam> at;
  const unsigned count;  // of the team's rows
  const Dropper dropper;
  const SharedAffine<T> affine;
  Stream<T> x, u, grad, grad_of_gate, grad_of_input, grad_x, grad_u;
  float sum_weight[kPieces][kElements], sum_bias[kPieces][kElements];

  __device__ Backward(const NormBwdParams& params, const TeamLayout& layout, void* memory)
      : params(params),
        p(params.problem),
        layout(layout),
        span(p, layout),
        at(p, layout, span.first),
        count(span.count_from(at.row)),
        dropper(p.dropout, layout.scale),
        affine(kSums ? SharedAffine<T>(at, ptx::shared_address(memory) + R::kBytes) : SharedAffine<T>()) {
    const int64_t step = span.step;
    x = Stream<T>(at, p.x, step);
    grad = Stream<T>(at, params.grad_out, step, concat() ? 2 * int64_t{p.columns} : 0);
    grad_x = Stream<T>(at, params.grad_x, step);
    if constexpr (kGated) u = Stream<T>(at, p.u, step), grad_u = Stream<T>(at, params.grad_u, step);
    if (concat()) {
      grad_of_gate = Stream<T>(at, params.grad_out, step);
      grad_of_input = Stream<T>(at, params.grad_out, step, p.columns);
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum_weight[i][e] = sum_bias[i][e] = 0;
  }

  __device__ bool concat() const { return kCopies && p.concat; }
  __device__ bool with_silu() const { return kGate == Gate::kSilu || (kCopies && p.silu_u); }

  __device__ __forceinline__ void fetch(uint32_t stage, unsigned iteration) {
    const bool exists = iteration < count;
    R::fetch(stage, kX, at, exists, x);
    R::fetch(stage, kGrad, at, exists, grad);
    if constexpr (kGated) R::fetch(stage, kU, at, exists, u);
    if (!concat()) return;
    R::fetch(stage, kGradOfGate, at, exists, grad_of_gate);
    R::fetch(stage, kGradOfInput, at, exists, grad_of_input);
  }

  __device__ __forceinline__ void run(uint32_t stage, unsigned iteration, float* shared) {
    TeamSum<3> team_sum(shared, at.lanes());  // its two places are each used once a row
    const int64_t row = at.row + iteration * span.step;
    const bool exists = iteration < count;
    uint4 kept[kPieces];  // of the products: drawn here, where both pieces' chains of instructions overlap
    if constexpr (kCopies) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) kept[i] = dropper.template mask<T>(row, at.column_of(i), Section::kProduct);
    }
    float mean[1] = {0};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (!(exists && at.has(i))) continue;
      const Piece<T> in = R::get(stage, kX, i);
#pragma unroll
      for (int e = 0; e < kElements; ++e) mean[0] += in[e];
    }
    team_sum(mean);
    mean[0] *= layout.inverse;

    float sums[3] = {0, 0, 0};  // of z's square, of the gradient d of the norm's result, of d z, where z = x - mean
    Floats d[kPieces], slope[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (!(exists && at.has(i))) continue;
      gradients(stage, i, kept[i], d[i], slope[i]);
      const Piece<T> in = R::get(stage, kX, i);
      Floats weight;
      if constexpr (kSums) affine.weight(i, weight);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float z = in[e] - mean[0], weighted = kSums ? d[i][e] * weight[e] : d[i][e];
        sums[0] += z * z, sums[1] += weighted, sums[2] += weighted * z;
      }
    }
    team_sum(sums);
    const Normed normed(mean[0], rsqrtf(sums[0] * layout.inverse + layout.eps));
    // What the mean and the variance take from each element's gradient: shift + slope * (x - mean) * rstd.
    const float scaled = normed.rstd * dropper.scale, per_column = scaled * layout.inverse;
    const Taken taken{scaled, per_column * sums[1], per_column * normed.rstd * sums[2]};
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (exists && at.has(i)) write(stage, row, i, d[i], slope[i], normed, taken);
    grad_x.advance();
    if constexpr (kGated) grad_u.advance();
  }

  // d: the gradient of the norm's own result, without dropout's scale; slope: SiLU's.
  __device__ __forceinline__ void gradients(uint32_t stage, int i, const uint4& kept, Floats& d, Floats& slope) const {
    Piece<T> g = R::get(stage, kGrad, i);
    if constexpr (kCopies) {
      g = Dropper::drop(g, kept);
      R::put(stage, kGrad, i, g);
    }
    const Piece<T> gate = R::get(stage, kGated ? kU : kX, i);
#pragma unroll
    for (int e = 0; e < kElements; ++e) d[e] = kGated ? g[e] * gate[e] : g[e];
    if (!with_silu()) return;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float s = sigmoid<T>(gate[e]);
      d[e] *= s;
      if constexpr (!kCopies) slope[e] = silu_grad(gate[e], s);
    }
  }

  __device__ __forceinline__ void write(uint32_t stage, int64_t row, int i, const Floats& d, const Floats& slope,
                                        const Normed& normed, const Taken& taken) {
    const Piece<T> in = R::get(stage, kX, i);
    Floats weight, bias, to;
    if constexpr (kSums) affine.weight(i, weight);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float y = normed.template of<T>(in[e]);
      if constexpr (kSums) sum_weight[i][e] += d[e] * y, sum_bias[i][e] += d[e];
      to[e] = (kSums ? d[e] * weight[e] : d[e]) * taken.scaled - (y * taken.slope + taken.shift);
    }
    add_copy(stage, row, i, kGradOfInput, Section::kInput, to);
    *at.piece(grad_x.at, i) = Piece<T>(to).word;
    if constexpr (kGated) {
      if constexpr (kSums) affine.bias(i, bias);
      const Piece<T> g = R::get(stage, kGrad, i);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float y = normed.template of<T>(in[e]);
        to[e] = g[e] * (kSums ? y * weight[e] + bias[e] : y);
        if constexpr (kCopies) to[e] *= dropper.scale;
      }
      add_copy(stage, row, i, kGradOfGate, Section::kGate, to);
      if (with_silu()) {
        const Piece<T> gate = R::get(stage, kU, i);
#pragma unroll
        for (int e = 0; e < kElements; ++e) to[e] *= kCopies ? silu_grad(gate[e], sigmoid<T>(gate[e])) : slope[e];
      }
      *at.piece(grad_u.at, i) = Piece<T>(to).word;
    }
  }

  // The gradient of a copy of u or x in the result.
  __device__ __forceinline__ void add_copy(uint32_t stage, int64_t row, int i, Tensor tensor, Section section,
                                           Floats& to) const {
    if (!concat()) return;
    const uint4 kept = dropper.template mask<T>(row, at.column_of(i), section);
    const Piece<T> g = Dropper::drop(R::get(stage, tensor, i), kept);
#pragma unroll
    for (int e = 0; e < kElements; ++e) to[e] += g[e] * dropper.scale;
  }

  // The block's sums, [2][columns]: teams of the same group, in the order of their slots. `block`: [slots][columns].
  __device__ __forceinline__ void finish(float* sums, float* block) const {
    const int columns = layout.groups * p.width(), first = static_cast<int>(blockIdx.y) * columns;
    const int count = min_int(columns, p.columns - first);
    const int slot = static_cast<int>(threadIdx.x) / at.lanes() / layout.groups;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (!at.has(i)) continue;
        float* const to = block + slot * columns + at.column_of(i) - first;
#pragma unroll
        for (int e = 0; e < kElements; ++e) to[e] = (which ? sum_bias[i][e] : sum_weight[i][e]) * dropper.scale;
      }
      __syncthreads();
      float* const to = sums + (int64_t{blockIdx.x} * 2 + which) * p.columns + first;
      for (int c = static_cast<int>(threadIdx.x); c < count; c += kThreads) {
        float total = 0;
        for (int s = 0; s < layout.slots; ++s) total += block[s * columns + c];
        to[c] = total;
      }
      __syncthreads();
    }
  }
};

template <class T, Gate kGate, bool kSums, Team kTeam>
__global__ void __launch_bounds__(kThreads, Config<kGate, kSums>::kBlocks)
    norm_bwd_kernel(const __grid_constant__ NormBwdParams params, const __grid_constant__ TeamLayout layout,
                    float* sums) {
  using B = Backward<T, kGate, kSums, kTeam>;
  extern __shared__ uint4 memory[];
  __shared__ float shared[TeamSum<3>::kFloats];
  B rows(params, layout, memory);
  B::R::walk(
      memory, rows.span.count_from(rows.span.first),
      [&](uint32_t stage, unsigned iteration) { rows.fetch(stage, iteration); },
      [&](uint32_t stage, unsigned iteration) { rows.run(stage, iteration, shared); });
  if constexpr (kSums) {
    if (!params.grad_weight) return;
    __syncthreads();  // the ring is free
    rows.finish(sums, reinterpret_cast<float*>(memory));
  }
}

constexpr int kSumColumns = 8, kSumSlices = 64;

// Each slice's sums in turn, then the slices' in pairs. blockIdx.y: weight, bias.
__global__ void __launch_bounds__(kSumColumns* kSumSlices)
    column_sums_kernel(const float* sums, int count, int columns, float* weight, float* bias) {
  __shared__ float slices[kSumSlices][kSumColumns];
  const int lane = static_cast<int>(threadIdx.x) % kSumColumns, slice = static_cast<int>(threadIdx.x) / kSumColumns;
  const int column = static_cast<int>(blockIdx.x) * kSumColumns + lane;
  ptx::wait_for_prerequisites();
  float total = 0;
  if (column < columns) {
#pragma unroll 8
    for (int b = slice; b < count; b += kSumSlices) total += sums[(int64_t{b} * 2 + blockIdx.y) * columns + column];
  }
  slices[slice][lane] = total;
#pragma unroll
  for (int half = kSumSlices / 2; half > 0; half /= 2) {
    __syncthreads();
    if (slice < half) slices[slice][lane] += slices[slice + half][lane];
  }
  if (slice == 0 && column < columns) (blockIdx.y ? bias : weight)[column] = slices[0][lane];
}

int summing_blocks(const NormProblem& p) {
  int blocks = 0;
  with_gate(gate_of(p), [&](auto gate) -> Status {
    using C = Config<gate.value, true>;
    TeamLayout layout = team_layout(p);
    blocks = staying_blocks(p, layout, C::kBlocks, C::kTurns);
    return {};
  });
  return blocks;
}

bool needs_sums(const NormBwdParams& params) {
  return params.grad_weight || params.problem.weight || params.problem.bias;
}

Status clear_sums(const NormBwdParams& params, cudaStream_t stream) {
  for (void* to : {params.grad_weight, params.grad_bias})
    if (to) HSTU_TRY(cudaMemsetAsync(to, 0, sizeof(float) * params.problem.columns, stream));
  return {};
}

}  // namespace

Status column_sums(const NormBwdParams& params, const float* sums, int count, cudaStream_t stream) {
  const int columns = params.problem.columns;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ceil_div(columns, kSumColumns), 2);
  config.blockDim = dim3(kSumColumns * kSumSlices);
  config.stream = stream;
  cudaLaunchAttribute early{};  // starts while the last blocks before it finish, and waits for them itself
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor, 8) >= 9 ? 1 : 0;
  HSTU_TRY(cudaLaunchKernelEx(&config, column_sums_kernel, sums, count, columns,
                              static_cast<float*>(params.grad_weight), static_cast<float*>(params.grad_bias)));
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
  float* const sums = static_cast<float*>(workspace);
  if (!fits_teams(p) || !can_walk(p, params.grad_out) || !can_walk(p, params.grad_x) || !can_walk(p, params.grad_u))
    return norm_any_bwd(params, params.grad_weight ? sums : nullptr, queue);
  TeamLayout layout = team_layout(p);
  const Status status = with_type(p.dtype, [&](auto element) {
    return with_gate(gate_of(p), [&](auto gate) {
      return with_flag(needs_sums(params), [&](auto summed) {
        return with_team(p, layout, [&](auto team) -> Status {
          using C = Config<gate.value, summed.value>;
          constexpr int kBytes = Backward<decltype(element), gate.value, summed.value, team.value>::R::kBytes;
          const dim3 grid(static_cast<unsigned>(staying_blocks(p, layout, C::kBlocks, C::kTurns)),
                          group_blocks(p, layout));
          const auto kernel = norm_bwd_kernel<decltype(element), gate.value, summed.value, team.value>;
          const int bytes =
              kBytes + (summed.value ? static_cast<int>(SharedAffine<decltype(element)>::bytes(layout)) : 0);
          HSTU_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
          kernel<<<grid, kThreads, bytes, queue>>>(params, layout, sums);
          HSTU_TRY(cudaGetLastError());
          return {};
        });
      });
    });
  });
  return status.ok() && params.grad_weight ? column_sums(params, sums, summing_blocks(p), queue) : status;
}

}  // namespace hstu_ops::cuda
