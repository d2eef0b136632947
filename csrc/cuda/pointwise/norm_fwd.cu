// The norm of rows, with or without a gate, forward: a team reads its group of a row once, sums x and its square in one
// pass over its threads, and writes once.
#include "core/silu.h"
#include "cuda/pointwise/sigmoid.h"
#include "cuda/pointwise/team_launch.h"

namespace hstu_ops::cuda {
namespace {

// Shared memory and registers of a block follow from these.
template <Gate kGate>
struct Config {
  static constexpr int kTensors = kGate == Gate::kNone ? 1 : 2;
  static constexpr int kStages = kGate == Gate::kNone ? 6 : 4;
  static constexpr int kBlocks = kGate == Gate::kNone ? 4 : kGate == Gate::kAny ? 2 : 3;  // of a processor
};

template <class T, Gate kGate>
struct Forward {
  using R = Ring<T, Config<kGate>::kTensors, Config<kGate>::kStages>;
  using Floats = typename Piece<T>::Floats;
  static constexpr int kElements = Piece<T>::kElements;
  static constexpr bool kCopies = kGate == Gate::kAny;

  const NormProblem& p;
  const Place<T> at;
  const Dropper dropper;
  float* shared;
  Stream<T> x, u, out;
  int64_t section_bytes;  // from a section of the result to the next

  __device__ Forward(const NormFwdParams& params, const TeamLayout& layout, float* shared)
      : p(params.problem), at(p, layout), dropper(p.dropout), shared(shared), x(at, p.x), out(at, params.out) {
    if constexpr (kGate != Gate::kNone) u = Stream<T>(at, p.u);
    section_bytes = kCopies && p.concat ? p.columns * int64_t{sizeof(T)} : 0;
  }

  __device__ __forceinline__ void fetch(uint32_t stage, int iteration) {
    R::fetch(stage, 0, at, iteration, x);
    if constexpr (kGate != Gate::kNone) R::fetch(stage, 1, at, iteration, u);
  }

  __device__ __forceinline__ void run(uint32_t stage, int iteration) {
    const float pivot = pivot_of<R>(at, stage, iteration, shared);
    float sums[2] = {0, 0};  // of x - pivot and of its square
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (iteration >= at.counts[piece]) continue;
      const Piece<T> in = R::get(stage, 0, piece);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float z = in[e] - pivot;
        sums[0] += z, sums[1] += z * z;
      }
    }
    team_sum(sums, at.lanes, shared);
    const Statistics s(p, pivot, sums[0], sums[1]);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
      if (iteration < at.counts[piece]) write(stage, iteration, piece, s);
    out.advance();
  }

  __device__ __forceinline__ void write(uint32_t stage, int iteration, int piece, const Statistics& s) const {
    const Piece<T> in = R::get(stage, 0, piece);
    Floats z;
#pragma unroll
    for (int e = 0; e < kElements; ++e) z[e] = s.template normed<T>(in[e]);
    with_affine(at, p.weight, piece, z, Times());
    with_affine(at, p.bias, piece, z, Plus());
    if constexpr (kGate != Gate::kNone) {
      const Piece<T> gate = R::get(stage, 1, piece);
      Floats g;
#pragma unroll
      for (int e = 0; e < kElements; ++e) g[e] = gate[e];
      if (kGate == Gate::kSilu || (kGate == Gate::kAny && p.silu_u)) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) g[e] = silu(g[e], sigmoid<T>(g[e]));
      }
#pragma unroll
      for (int e = 0; e < kElements; ++e) z[e] *= g[e];
      if constexpr (kCopies) {
        put(iteration, piece, Section::kProduct, z);
        if (!section_bytes) return;
        put(iteration, piece, Section::kGate, g);
#pragma unroll
        for (int e = 0; e < kElements; ++e) g[e] = in[e];
        put(iteration, piece, Section::kInput, g);
        return;
      }
    }
    out.store(at, piece, z);
  }

  // With dropout.
  __device__ __forceinline__ void put(int iteration, int piece, Section section, Floats& values) const {
    const uint32_t kept = dropper.kept(at, at.row + iteration * at.step, piece, section);
#pragma unroll
    for (int e = 0; e < kElements; ++e) values[e] = dropper.apply(kept, e, values[e]);
    Stream<T> to = out;
    to.at += static_cast<int>(section) * section_bytes;
    to.store(at, piece, values);
  }
};

template <class T, Gate kGate>
__global__ void __launch_bounds__(kThreads, Config<kGate>::kBlocks)
    norm_fwd_kernel(const __grid_constant__ NormFwdParams params, const TeamLayout layout) {
  extern __shared__ uint4 memory[];
  __shared__ float shared[kTeamSumFloats<2>];
  Forward<T, kGate> rows(params, layout, shared);
  Forward<T, kGate>::R::walk(
      memory, rows.at.iterations, [&](uint32_t stage, int iteration) { rows.fetch(stage, iteration); },
      [&](uint32_t stage, int iteration) { rows.run(stage, iteration); });
}

}  // namespace

size_t norm_fwd_workspace(const NormFwdParams&) { return 0; }

Status norm_fwd(const NormFwdParams& params, void*, void* stream) {
  const NormProblem& p = params.problem;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::kFloat64) return {kNoFloat64};
  if (p.rows == 0) return {};
  if (!fits_teams(p) || !aligned(params.out, p.dtype)) return norm_any_fwd(params, queue);
  const TeamLayout layout = team_layout(p);
  return with_type(p.dtype, [&](auto element) {
    return with_gate(gate_of(p), [&](auto gate) -> Status {
      using C = Config<gate.value>;
      constexpr int kBytes = Forward<decltype(element), gate.value>::R::kBytes;
      const dim3 grid(static_cast<unsigned>(row_blocks(p, layout, C::kBlocks)), group_blocks(p, layout));
      const auto kernel = norm_fwd_kernel<decltype(element), gate.value>;
      HSTU_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
      kernel<<<grid, kThreads, kBytes, queue>>>(params, layout);
      HSTU_TRY(cudaGetLastError());
      return {};
    });
  });
}

}  // namespace hstu_ops::cuda
