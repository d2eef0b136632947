// The norm of rows, with or without a gate, forward: a team reads its group of kRows rows into registers, finds mean
// and variance over its threads, and writes the results. Blocks follow one another, and while one waits for its rows
// others compute. Where a thread has more to prepare (weights, dropout), blocks stay and walk over rows as those of
// norm_bwd.cu do.
#include "core/silu.h"
#include "cuda/pointwise/sigmoid.h"
#include "cuda/pointwise/team_launch.h"
#include "cuda/pointwise/walk.h"

namespace hstu_ops::cuda {
namespace {

constexpr int kStages = 2;  // of rows on their way, where blocks stay

// Registers of a thread follow from these.
template <Gate kGate, bool kAffine>
struct Config {
  static constexpr bool kStays = kGate == Gate::kAny || (kGate != Gate::kNone && kAffine);
  static constexpr int kRows = kStays ? 1 : 2;                                           // of a team
  static constexpr int kBlocks = kStays ? 2 : kGate == Gate::kNone && !kAffine ? 4 : 3;  // of a processor, at least
};

template <class T, Gate kGate, bool kAffine, Team kTeam>
struct Forward {
  static constexpr bool kStays = Config<kGate, kAffine>::kStays;
  static constexpr int kRows = Config<kGate, kAffine>::kRows, kElements = Piece<T>::kElements;
  static constexpr bool kGated = kGate != Gate::kNone, kCopies = kGate == Gate::kAny;
  using Floats = typename Piece<T>::Floats;

  const NormFwdParams& params;
  const NormProblem& p;
  const TeamLayout& layout;
  const Place<T, kTeam> at;
  const Dropper dropper;
  const int64_t section_bytes;  // from a section of the result to the next
  Stream<T> out;
  int64_t first_row;
  Piece<T> x[kRows][kPieces], u[kRows][kPieces];

  __device__ Forward(const NormFwdParams& params, const TeamLayout& layout)
      : params(params),
        p(params.problem),
        layout(layout),
        at(p, layout, kStays ? Span(p, layout).first : int64_t{blockIdx.x} * layout.slots * kRows),
        dropper(p.dropout, layout.scale),
        section_bytes(kCopies && p.concat ? p.columns * int64_t{sizeof(T)} : 0),
        out(at, params.out, layout.slots),
        first_row(at.row) {}

  __device__ int64_t row(int r) const { return first_row + r * layout.slots; }
  __device__ bool exists(int r, int piece) const { return at.has(piece) && row(r) < p.rows; }

  __device__ __forceinline__ void load(const Rows& tensor, Piece<T> (&to)[kRows][kPieces]) const {
    const Stream<T> from(at, tensor, layout.slots);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (exists(r, i)) to[r][i] = Piece<T>(__ldcs(at.piece(from.at + r * from.step, i)));
  }

  __device__ __forceinline__ void run(float* shared) {
    load(p.x, x);
    if constexpr (kGated) load(p.u, u);
    compute(shared, [&](int i, Floats& weight, Floats& bias) {
      if (!at.has(i)) return;
      read_affine<T>(p.weight, at.column_of(i), 1.f, weight);
      read_affine<T>(p.bias, at.column_of(i), 0.f, bias);
    });
  }

  // As run, for a block that stays.
  __device__ __forceinline__ void walk(void* memory, float* shared) {
    using R = Ring<T, 2, kStages>;
    static_assert(kRows == 1, "a stage holds one row of a team");
    const Span span(p, layout);
    const unsigned count = span.count_from(at.row);
    const SharedAffine<T> affine =
        kAffine ? SharedAffine<T>(at, ptx::shared_address(memory) + R::kBytes) : SharedAffine<T>();
    Stream<T> x_rows(at, p.x, span.step), u_rows(at, p.u, span.step);
    out = Stream<T>(at, params.out, span.step);
    R::walk(
        memory, span.count_from(span.first),
        [&](uint32_t stage, unsigned iteration) {
          R::fetch(stage, 0, at, iteration < count, x_rows);
          R::fetch(stage, 1, at, iteration < count, u_rows);
        },
        [&](uint32_t stage, unsigned) {
#pragma unroll
          for (int i = 0; i < kPieces; ++i)
            if (exists(0, i)) x[0][i] = R::get(stage, 0, i), u[0][i] = R::get(stage, 1, i);
          compute(shared, [&](int i, Floats& weight, Floats& bias) { affine.weight(i, weight), affine.bias(i, bias); });
          first_row += span.step;
          out.advance();
        });
  }

  template <class ReadAffine>
  __device__ __forceinline__ void compute(float* shared, ReadAffine&& read) {
    TeamSum<kRows> team_sum(shared, at.lanes());  // its two places are each used once
    float mean[kRows], square[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      mean[r] = square[r] = 0;
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
#pragma unroll
        for (int e = 0; e < kElements; ++e) mean[r] += x[r][i][e];
    }
    team_sum(mean);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      mean[r] *= layout.inverse;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (kTeam == Team::kAny && !at.has(i)) continue;
#pragma unroll
        for (int e = 0; e < kElements; ++e) square[r] += (x[r][i][e] - mean[r]) * (x[r][i][e] - mean[r]);
      }
    }
    team_sum(square);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      Floats weight, bias;
      if constexpr (kAffine) read(i, weight, bias);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (exists(r, i)) write(r, i, Normed(mean[r], rsqrtf(square[r] * layout.inverse + layout.eps)), weight, bias);
    }
  }

  __device__ __forceinline__ void write(int r, int i, const Normed& normed, const Floats& weight,
                                        const Floats& bias) const {
    Floats z, g;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      z[e] = normed.template of<T>(x[r][i][e]);
      if constexpr (kAffine) z[e] = z[e] * weight[e] + bias[e];
    }
    if constexpr (kGated) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) g[e] = u[r][i][e];
      if (kGate == Gate::kSilu || (kCopies && p.silu_u)) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) g[e] = silu(g[e], sigmoid<T>(g[e]));
      }
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if constexpr (kCopies) g[e] *= dropper.scale;
        z[e] *= g[e];
      }
    }
    put(r, i, Section::kProduct, z);
    if constexpr (kCopies) {
      if (!section_bytes) return;
      put(r, i, Section::kGate, g);
#pragma unroll
      for (int e = 0; e < kElements; ++e) g[e] = x[r][i][e] * dropper.scale;
      put(r, i, Section::kInput, g);
    }
  }

  __device__ __forceinline__ void put(int r, int i, Section section, const Floats& values) const {
    Piece<T> to(values);
    if constexpr (kCopies) to = Dropper::drop(to, dropper.template mask<T>(row(r), at.column_of(i), section));
    *at.piece(out.at + r * out.step + static_cast<int>(section) * section_bytes, i) = to.word;
  }
};

template <class T, Gate kGate, bool kAffine, Team kTeam>
__global__ void __launch_bounds__(kThreads, Config<kGate, kAffine>::kBlocks)
    norm_fwd_kernel(const __grid_constant__ NormFwdParams params, const __grid_constant__ TeamLayout layout) {
  using F = Forward<T, kGate, kAffine, kTeam>;
  extern __shared__ uint4 memory[];
  __shared__ float shared[TeamSum<F::kRows>::kFloats];
  F forward(params, layout);
  if constexpr (Config<kGate, kAffine>::kStays)
    forward.walk(memory, shared);
  else
    forward.run(shared);
}

}  // namespace

size_t norm_fwd_workspace(const NormFwdParams&) { return 0; }

Status norm_fwd(const NormFwdParams& params, void*, void* stream) {
  const NormProblem& p = params.problem;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::kFloat64) return {kNoFloat64};
  if (p.rows == 0) return {};
  if (!fits_teams(p) || !can_walk(p, params.out)) return norm_any_fwd(params, queue);
  TeamLayout layout = team_layout(p);
  return with_type(p.dtype, [&](auto element) {
    return with_gate(gate_of(p), [&](auto gate) {
      return with_flag(p.weight || p.bias, [&](auto affine) {
        return with_team(p, layout, [&](auto team) -> Status {
          using C = Config<gate.value, affine.value>;
          const auto kernel = norm_fwd_kernel<decltype(element), gate.value, affine.value, team.value>;
          const int64_t rows = int64_t{layout.slots} * C::kRows;
          dim3 grid(static_cast<unsigned>((p.rows + rows - 1) / rows), group_blocks(p, layout));
          int bytes = 0;
          if constexpr (C::kStays) {
            grid.x = static_cast<unsigned>(staying_blocks(p, layout, C::kBlocks, p.concat ? kManyTurns : 1));
            bytes = Ring<decltype(element), 2, kStages>::kBytes +
                    (affine.value ? static_cast<int>(SharedAffine<decltype(element)>::bytes(layout)) : 0);
            HSTU_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
          }
          kernel<<<grid, kThreads, bytes, queue>>>(params, layout);
          HSTU_TRY(cudaGetLastError());
          return {};
        });
      });
    });
  });
}

}  // namespace hstu_ops::cuda
