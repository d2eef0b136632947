// The norm of rows of any width and alignment, forward and backward: a team of threads takes a row and reads it,
// element by element, once for each sum and once for the result; all but the first time from a cache. Used by
// norm_fwd.cu and norm_bwd.cu for what does not fit a team's registers.
#include "core/silu.h"
#include "cuda/pointwise/sigmoid.h"
#include "cuda/pointwise/team_launch.h"

namespace hstu_ops::cuda {
namespace {

constexpr int kMaxTeams = 1024;                   // that sum over rows
constexpr int64_t kSumFloats = int64_t{1} << 22;  // of their workspace, about

template <class T>
struct AnyRow {
  const NormProblem& p;
  const Dropper dropper;
  const int64_t row;
  const int lanes;

  __device__ AnyRow(const NormProblem& p, int64_t row, int lanes)
      : p(p), dropper(p.dropout, static_cast<float>(p.dropout.scale)), row(row), lanes(lanes) {}

  __device__ static T* element(const Rows& rows, int64_t row, int64_t column) {
    return static_cast<T*>(rows.data) + row * rows.row_stride + column;
  }
  __device__ float x(int c) const { return static_cast<float>(*element(p.x, row, c)); }
  __device__ float u(int c) const { return static_cast<float>(*element(p.u, row, c)); }
  __device__ float gate(int c) const {
    if (!p.u) return 1.f;
    const float v = u(c);
    return p.silu_u ? silu(v, sigmoid<T>(v)) : v;
  }
  __device__ float weight(int c) const { return p.weight ? static_cast<const float*>(p.weight)[c] : 1.f; }
  __device__ float bias(int c) const { return p.bias ? static_cast<const float*>(p.bias)[c] : 0.f; }
  __device__ bool copies() const { return p.u && p.concat; }
  __device__ float dropped(int c, Section section, float v) const {
    return p.u ? dropper.apply(row, c, section, v) : v;
  }
  __device__ int64_t column(int c, Section section) const {
    return c + (copies() ? static_cast<int64_t>(section) * p.columns : 0);
  }

  // f(column) for this thread's columns of a group.
  template <class F>
  __device__ void each(int group, F&& f) const {
    const int first = group * p.width();
    for (int c = first + static_cast<int>(threadIdx.x) % lanes; c < first + p.width(); c += lanes) f(c);
  }

  // Called by all threads of a block alike: mean and 1 / deviation of a group.
  template <int kMost>
  __device__ float2 statistics(int group, bool exists, TeamSum<kMost>& team_sum) const {
    const float width = static_cast<float>(p.width());
    float total[1] = {0}, square[1] = {0};
    if (exists) each(group, [&](int c) { total[0] += x(c); });
    team_sum(total);
    const float mean = total[0] / width;
    if (exists) each(group, [&](int c) { square[0] += (x(c) - mean) * (x(c) - mean); });
    team_sum(square);
    return make_float2(mean, rsqrtf(square[0] / width + static_cast<float>(p.eps)));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    norm_any_fwd_kernel(const __grid_constant__ NormFwdParams params, int lanes) {
  __shared__ float shared[TeamSum<1>::kFloats];
  TeamSum<1> team_sum(shared, lanes);
  const NormProblem& p = params.problem;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / lanes) + static_cast<int>(threadIdx.x) / lanes;
  const bool exists = row < p.rows;
  const AnyRow<T> r(p, row, lanes);
  const auto put = [&](int c, Section section, float v) {
    *AnyRow<T>::element(params.out, row, r.column(c, section)) = static_cast<T>(r.dropped(c, section, v));
  };
  for (int group = 0; group < p.groups; ++group) {
    const float2 s = r.statistics(group, exists, team_sum);
    if (!exists) continue;
    r.each(group, [&](int c) {
      const float gate = r.gate(c);
      put(c, Section::kProduct, ((r.x(c) - s.x) * s.y * r.weight(c) + r.bias(c)) * gate);
      if (!r.copies()) return;
      put(c, Section::kGate, gate);
      put(c, Section::kInput, r.x(c));
    });
  }
}

// sums: [teams][2][columns]; each entry belongs to one thread.
template <class T>
__device__ void any_row_backward(const NormBwdParams& params, const AnyRow<T>& r, bool exists, float* sums,
                                 TeamSum<2>& team_sum) {
  const NormProblem& p = r.p;
  const auto grad = [&](int c, Section section) {
    const float g = static_cast<float>(*AnyRow<T>::element(params.grad_out, r.row, r.column(c, section)));
    return r.dropped(c, section, g);
  };
  for (int group = 0; group < p.groups; ++group) {
    const float2 s = r.statistics(group, exists, team_sum);
    float means[2] = {0, 0};
    if (exists)
      r.each(group, [&](int c) {
        const float d = grad(c, Section::kProduct) * r.gate(c), normed = (r.x(c) - s.x) * s.y;
        const float weighted = __fmul_rn(d, r.weight(c));
        means[0] += weighted;
        means[1] += weighted * normed;
        if (!sums) return;
        sums[c] += d * normed;
        sums[p.columns + c] += d;
      });
    team_sum(means);
    if (!exists) continue;
    const float inverse = 1.f / static_cast<float>(p.width());
    r.each(group, [&](int c) {
      const float g = grad(c, Section::kProduct), normed = (r.x(c) - s.x) * s.y;
      // Rounded as in the sum, so that what is 0 in a group of one column stays 0.
      const float weighted = __fmul_rn(g * r.gate(c), r.weight(c));
      float grad_x = s.y * (weighted - means[0] * inverse - normed * means[1] * inverse);
      if (r.copies()) grad_x += grad(c, Section::kInput);
      if (p.u) {
        float grad_u = g * (normed * r.weight(c) + r.bias(c));
        if (r.copies()) grad_u += grad(c, Section::kGate);
        if (p.silu_u) grad_u *= silu_grad(r.u(c), sigmoid<T>(r.u(c)));
        *AnyRow<T>::element(params.grad_u, r.row, c) = static_cast<T>(grad_u);
      }
      *AnyRow<T>::element(params.grad_x, r.row, c) = static_cast<T>(grad_x);
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    norm_any_bwd_kernel(const __grid_constant__ NormBwdParams params, int lanes, float* sums) {
  __shared__ float shared[TeamSum<2>::kFloats];
  TeamSum<2> team_sum(shared, lanes);
  const NormProblem& p = params.problem;
  const int teams = kThreads / lanes, team = static_cast<int>(threadIdx.x) / lanes;
  if (sums) {
    sums += (int64_t{blockIdx.x} * teams + team) * 2 * p.columns;
    const AnyRow<T> none(p, 0, lanes);
    for (int group = 0; group < p.groups; ++group) none.each(group, [&](int c) { sums[c] = sums[p.columns + c] = 0; });
  }
  const int64_t step = int64_t{gridDim.x} * teams;
  for (int64_t base = int64_t{blockIdx.x} * teams; base < p.rows; base += step)
    any_row_backward(params, AnyRow<T>(p, base + team, lanes), base + team < p.rows, sums, team_sum);
}

int any_lanes(const NormProblem& p) { return p.width() <= 1024 ? 32 : kThreads; }

int64_t any_blocks(const NormProblem& p) {
  const int teams = kThreads / any_lanes(p);
  return (p.rows + teams - 1) / teams;
}

}  // namespace

int norm_any_sums(const NormProblem& p) {
  const int teams = kThreads / any_lanes(p);
  int64_t most = kSumFloats / (2 * int64_t{p.columns});
  most = most < 64 ? 64 : most > kMaxTeams ? kMaxTeams : most;
  const int64_t blocks = any_blocks(p) < most / teams ? any_blocks(p) : most / teams;
  return static_cast<int>(blocks) * teams;
}

Status norm_any_fwd(const NormFwdParams& params, cudaStream_t stream) {
  const NormProblem& p = params.problem;
  return with_type(p.dtype, [&](auto element) -> Status {
    norm_any_fwd_kernel<decltype(element)>
        <<<static_cast<unsigned>(any_blocks(p)), kThreads, 0, stream>>>(params, any_lanes(p));
    HSTU_TRY(cudaGetLastError());
    return {};
  });
}

Status norm_any_bwd(const NormBwdParams& params, float* sums, cudaStream_t stream) {
  const NormProblem& p = params.problem;
  const int count = norm_any_sums(p);
  const int64_t blocks = sums ? count / (kThreads / any_lanes(p)) : any_blocks(p);
  const Status status = with_type(p.dtype, [&](auto element) -> Status {
    norm_any_bwd_kernel<decltype(element)>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params, any_lanes(p), sums);
    HSTU_TRY(cudaGetLastError());
    return {};
  });
  return status.ok() && sums ? column_sums(params, sums, count, stream) : status;
}

}  // namespace hstu_ops::cuda
