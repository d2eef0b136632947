// How a norm is cut into teams and blocks, and its element type and alignment as constants.
#pragma once

#include <string>

#include "cuda/device.h"
#include "cuda/errors.h"
#include "cuda/pointwise/statistics.h"

namespace hstu_ops::cuda {

inline size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Every row starts on 16 bytes.
inline bool aligned(const Rows& rows, DType dtype) {
  const size_t step = static_cast<size_t>(rows.row_stride) * element_size(dtype);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && step % 16 == 0;
}

inline TeamLayout team_layout(const NormProblem& p) {
  TeamLayout layout;
  layout.lanes = 1;
  while (layout.lanes * 32 < p.width() * static_cast<int>(element_size(p.dtype))) layout.lanes *= 2;
  const int teams = kThreads / layout.lanes;
  layout.groups = min_int(p.groups, teams);
  layout.slots = teams / layout.groups;
  layout.inverse = 1.f / static_cast<float>(p.width());
  layout.eps = static_cast<float>(p.eps);
  layout.scale = p.dropout ? static_cast<float>(p.dropout.scale) : 1.f;
  return layout;
}

inline unsigned group_blocks(const NormProblem& p, const TeamLayout& layout) {
  return static_cast<unsigned>(ceil_div(p.groups, layout.groups));
}

// Blocks along the rows: what a device holds at a time, or fewer.
inline int row_blocks(const NormProblem& p, const TeamLayout& layout, int blocks_per_processor) {
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, 128);
  const int held = max_int(blocks_per_processor * processors / static_cast<int>(group_blocks(p, layout)), 1);
  const int64_t needed = (p.rows + layout.slots - 1) / layout.slots;
  return needed < held ? static_cast<int>(needed) : held;
}

// Blocks that stay and walk over rows: in so many turns where there are rows enough.
inline int staying_blocks(const NormProblem& p, TeamLayout& layout, int blocks_per_processor, int turns) {
  const int held = row_blocks(p, layout, blocks_per_processor);
  constexpr int kFewestRounds = 16;
  layout.turns = p.rows >= int64_t{held} * layout.slots * kFewestRounds ? turns : 1;
  return held * layout.turns;
}

constexpr int kMostBlocks = 4;  // of a processor

// Every row starts on 16 bytes, and the way to a team's next row fits 32 bits.
inline bool can_walk(const NormProblem& p, const Rows& rows) {
  const TeamLayout layout = team_layout(p);
  const int64_t step = int64_t{row_blocks(p, layout, kMostBlocks)} * layout.slots;
  const int64_t most = (int64_t{1} << 32) / static_cast<int64_t>(element_size(p.dtype)) / step;
  return aligned(rows, p.dtype) && rows.row_stride < most;
}

// Whether teams take a norm: the others go to norm_any.
inline bool fits_teams(const NormProblem& p) {
  const size_t bytes = p.width() * element_size(p.dtype);
  return bytes % 16 == 0 && bytes <= kThreads * 32 && can_walk(p, p.x) && can_walk(p, p.u) &&
         reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && reinterpret_cast<uintptr_t>(p.bias) % 16 == 0;
}

constexpr const char* kNoFloat64 = "float64 is not supported on CUDA: convert to float32, or run on the CPU";

// For rows that do not start on 16 bytes or are too wide for a team.
Status norm_any_fwd(const NormFwdParams& params, cudaStream_t stream);
Status norm_any_bwd(const NormBwdParams& params, float* sums, cudaStream_t stream);
int norm_any_sums(const NormProblem& p);  // [2][columns] each

// weight[c], bias[c] = the sums of `count` partial ones, [2][columns] each, in a fixed order.
Status column_sums(const NormBwdParams& params, const float* sums, int count, cudaStream_t stream);

// f(element): a value of the element type.
template <class F>
Status with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(__half{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// f(constant)
template <class F>
Status with_flag(bool flag, F&& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}
template <class F>
Status with_team(const NormProblem& p, const TeamLayout& layout, F&& f) {
  const bool warp = layout.lanes == 32 && p.width() * element_size(p.dtype) == 32 * kPieces * 16;
  return with_flag(
      warp, [&](auto yes) { return f(std::integral_constant < Team, yes.value ? Team::kWarp : Team::kAny > {}); });
}
template <class F>
Status with_gate(Gate gate, F&& f) {
  switch (gate) {
    case Gate::kNone:
      return f(std::integral_constant<Gate, Gate::kNone>{});
    case Gate::kPlain:
      return f(std::integral_constant<Gate, Gate::kPlain>{});
    case Gate::kSilu:
      return f(std::integral_constant<Gate, Gate::kSilu>{});
    default:
      return f(std::integral_constant<Gate, Gate::kAny>{});
  }
}

}  // namespace hstu_ops::cuda
