// The one dispatch point: element type and head dimension of a problem to the kernels of this build.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

#include "core/launch.h"
#include "cuda/device.h"
#include "cuda/errors.h"
#include "cuda/sm90/bwd_scratch.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/fwd_scratch.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/tf32.h"
#include "cuda/tile/time_buckets.h"
#include "cuda/tile/workspace.h"

namespace hstu_ops::cuda {

namespace sm80 {
template <class T, int kDim>
Status attention_fwd(const AttentionFwdParams& params, cudaStream_t stream);
template <class T, int kDim>
Status attention_bwd(const AttentionBwdParams& params, void* memory, cudaStream_t stream);
}  // namespace sm80

#ifdef HSTU_WITH_SM90
namespace sm90 {
template <class T, int kDim>
Status attention_fwd(const AttentionFwdParams& params, void* workspace, int processors, cudaStream_t stream);
template <class T, int kDim>
Status attention_fwd_biased(const AttentionFwdParams& params, void* workspace, int processors, cudaStream_t stream);
template <class T, int kDim>
Status attention_bwd(const AttentionBwdParams& params, void* memory, int processors, cudaStream_t stream);
template <class T, int kDim>
Status attention_bwd_relative(const AttentionBwdParams& params, void* memory, int processors, cudaStream_t stream);
template <class T, int kDim>
Status attention_bwd_dense(const AttentionBwdParams& params, void* memory, int processors, cudaStream_t stream);
}  // namespace sm90
#endif

namespace {

using HeadDims = std::integer_sequence<int, 32, 64, 128, 256>;

// Calls f with the first of kValues that is at least `value`, as a constant.
template <int... kValues, class F>
Status dispatch(const char* what, int value, std::integer_sequence<int, kValues...>, F&& f) {
  Status status{std::string(what) + " " + std::to_string(value) + " is not in this build"};
  const bool hit = ((value <= kValues && (status = f(std::integral_constant<int, kValues>{}), true)) || ...);
  (void)hit;
  return status;
}

// One compiled dimension serves both.
int head_dim(const AttentionProblem& a) { return a.dim_qk > a.dim_v ? a.dim_qk : a.dim_v; }

// Compiled dimensions of TF32; beyond them fp32 stays fp32.
constexpr int kFewestTf32Dims = 64, kMostTf32Dims = 128;

int padded_dim(const AttentionProblem& a) {
  int padded = a.allow_tf32 ? kFewestTf32Dims : 32;
  while (padded < head_dim(a)) padded *= 2;
  return padded;
}

// f(element, head dimension): a value of the element type and a constant.
template <class F>
Status dispatch(const AttentionProblem& a, F&& f) {
  return dispatch("head dimension", head_dim(a), HeadDims{}, [&](auto d) -> Status {
    switch (a.dtype) {
      case DType::kFloat16:
        return f(__half{}, d);
      case DType::kBFloat16:
        return f(__nv_bfloat16{}, d);
      case DType::kFloat32:
        if constexpr (d <= kMostTf32Dims)
          if (a.allow_tf32) return f(Tf32{}, std::integral_constant<int, std::max(int{d}, kFewestTf32Dims)>{});
        return f(float{}, d);
      default:
        return {"float64 is not supported on CUDA: convert to float32, or run on the CPU"};
    }
  });
}

bool has_bias(const AttentionProblem& a) { return a.dense.data || a.relative; }

bool empty(const AttentionProblem& a) { return a.heads == 0 || a.jagged.batch == 0; }

// A device without code in this build: say which, and what there is.
Status explained(Status status) {
  if (status.message.find("cudaErrorNoKernelImageForDevice") == std::string::npos &&
      status.message.find("cudaErrorInvalidDeviceFunction") == std::string::npos)
    return status;
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
    status.message += "; the device has compute capability " + std::to_string(major) + "." + std::to_string(minor);
  status.message += std::string("; this build holds code for ") + archs();
  return status;
}

// Nothing to sum: gradients of the bias are zeros.
Status clear_bias_grads(const AttentionBwdParams& params, cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  const auto heads = [&](int64_t head_stride) {
    return static_cast<size_t>(head_stride ? a.heads : 1) * sizeof(float);
  };
  if (params.grad_position_weight)
    HSTU_TRY(cudaMemsetAsync(params.grad_position_weight, 0,
                             heads(a.relative.position_head_stride) * (2 * a.relative.positions - 1), stream));
  if (params.grad_time_weight)
    HSTU_TRY(cudaMemsetAsync(params.grad_time_weight, 0,
                             heads(a.relative.time_head_stride) * (a.relative.num_boundaries + 1), stream));
  if (params.grad_bias)
    HSTU_TRY(cudaMemsetAsync(
        params.grad_bias, 0,
        heads(a.dense.head_stride) * (a.dense.batch_stride ? a.jagged.batch : 1) * a.dense.size * a.dense.size,
        stream));
  return {};
}

// The smallest block of queries of any backward kernel.
constexpr int kFewestQueries = 16;

// HSTU_OPS_BACKEND asks for one family of kernels; without it a problem goes to the fastest that takes it.
enum class Backend { kFastest, kSm80, kSm90 };

Status read_backend(Backend& backend) {
  const char* name = std::getenv("HSTU_OPS_BACKEND");
  const std::string value = name ? name : "";
  if (value.empty() || value == "sm80" || value == "sm90") {
    backend = value.empty() ? Backend::kFastest : value == "sm80" ? Backend::kSm80 : Backend::kSm90;
    return {};
  }
  return {"HSTU_OPS_BACKEND: expected sm80 or sm90, got " + value};
}

// Why the Hopper kernels do not take a problem; empty if they do, with the device's number of processors.
std::string sm90_refusal(const AttentionProblem& a, int& processors) {
#ifdef HSTU_WITH_SM90
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return "the device does not answer";
  if (major != 9 || minor != 0) return "it needs a device of compute capability 9.0";
  if (a.dtype != DType::kFloat16 && a.dtype != DType::kBFloat16) return "it takes float16 and bfloat16";
  const bool maps = sm90::has_tensor_map(a.q, a.dim_qk, a.jagged.total_q) &&
                    sm90::has_tensor_map(a.k, a.dim_qk, a.jagged.total_kv) &&
                    sm90::has_tensor_map(a.v, a.dim_v, a.jagged.total_kv);
  return maps ? "" : "it takes q, k and v whose rows start on 16 bytes, up to 256 dimensions, at least one row";
#else
  (void)a, (void)processors;
  return "this build does not have it";
#endif
}

std::string sm90_refusal(const AttentionBwdParams& params, int& processors) {
  const AttentionProblem& a = params.problem;
  std::string refusal = sm90_refusal(a, processors);
  constexpr int64_t kMostTableRows = 1 << 24;  // steps along a diagonal have 19 bits
  if (refusal.empty() && (params.grad_position_weight || params.grad_time_weight) && a.jagged.total_q > kMostTableRows)
    refusal = "with gradients of bias tables, it takes up to 2^24 rows of queries";
  if (refusal.empty() && !sm90::has_tensor_map(params.grad_out, a.dim_v, a.jagged.total_q))
    refusal = "it takes a gradient of the output whose rows start on 16 bytes";
  return refusal;
}

// Where the Hopper kernel has no cells for the gradient of a table of many buckets, it looks up each element slowly.
bool portable_is_faster(const AttentionBwdParams& params) {
  constexpr int kMostBoundaries = 4096;
  const RelativeBiasParams& r = params.problem.relative;
  return params.grad_time_weight && has_many_boundaries(r) &&
         (r.time_head_stride != 0 || r.num_boundaries > kMostBoundaries);
}

#ifdef HSTU_WITH_SM90
// f(element, head dimension) as dispatch() above, with what the Hopper kernels are built for.
template <class F>
Status dispatch_sm90(const AttentionProblem& a, F&& f) {
  return dispatch("head dimension", head_dim(a), std::integer_sequence<int, 64, 128, 256>{},
                  [&](auto d) { return a.dtype == DType::kFloat16 ? f(__half{}, d) : f(__nv_bfloat16{}, d); });
}
#endif

}  // namespace

// An allocation takes longer than the kernels of a small problem.
size_t attention_fwd_workspace(const AttentionFwdParams& params) {
  const AttentionProblem& a = params.problem;
  const sm90::FwdScratch scratch(a, padded_dim(a), nullptr);
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, 0);
  constexpr int kRows = sm90::FwdConfig<256>::kRows;  // the smallest block of queries
  const bool has_tickets = most_items(a.jagged.total_q, a.jagged.batch, kRows, a.heads) > processors;
  return has_tickets || scratch.cell_bytes > 0 ? scratch.bytes : 0;
}

size_t attention_bwd_workspace(const AttentionBwdParams& params) {
  const int dim = padded_dim(params.problem);
  const size_t portable = BwdWorkspace::plan(params, dim, kFewestQueries, nullptr).bytes;
  const size_t hopper = sm90::BwdScratch(params, dim > 64 ? dim : 64, nullptr).bytes;
  return portable > hopper ? portable : hopper;
}

Status attention_fwd(const AttentionFwdParams& params, void* workspace, void* stream) {
  Backend backend;
  if (Status status = read_backend(backend); !status.ok()) return status;
  if (empty(params.problem)) return {};
  int processors = 0;
  const std::string refusal = backend == Backend::kSm80 ? "" : sm90_refusal(params.problem, processors);
  if (backend == Backend::kSm90 && !refusal.empty()) return {"HSTU_OPS_BACKEND=sm90: " + refusal};
  const auto on = static_cast<cudaStream_t>(stream);
#ifdef HSTU_WITH_SM90
  if (backend != Backend::kSm80 && refusal.empty())
    return dispatch_sm90(params.problem, [&](auto element, auto dim) {
      using T = decltype(element);
      return has_bias(params.problem) ? sm90::attention_fwd_biased<T, dim>(params, workspace, processors, on)
                                      : sm90::attention_fwd<T, dim>(params, workspace, processors, on);
    });
#endif
  return explained(dispatch(params.problem, [&](auto element, auto dim) {
    return sm80::attention_fwd<decltype(element), decltype(dim)::value>(params, on);
  }));
}

Status attention_bwd(const AttentionBwdParams& params, void* workspace, void* stream) {
  Backend backend;
  if (Status status = read_backend(backend); !status.ok()) return status;
  const auto on = static_cast<cudaStream_t>(stream);
  if (empty(params.problem)) return clear_bias_grads(params, on);
  if (backend == Backend::kFastest && portable_is_faster(params)) backend = Backend::kSm80;
  int processors = 0;
  const std::string refusal = backend == Backend::kSm80 ? "" : sm90_refusal(params, processors);
  if (backend == Backend::kSm90 && !refusal.empty()) return {"HSTU_OPS_BACKEND=sm90: " + refusal};
#ifdef HSTU_WITH_SM90
  if (backend != Backend::kSm80 && refusal.empty())
    return dispatch_sm90(params.problem, [&](auto element, auto dim) {
      using T = decltype(element);
      if (params.problem.dense.data) return sm90::attention_bwd_dense<T, dim>(params, workspace, processors, on);
      if (has_bias(params.problem)) return sm90::attention_bwd_relative<T, dim>(params, workspace, processors, on);
      return sm90::attention_bwd<T, dim>(params, workspace, processors, on);
    });
#endif
  return explained(dispatch(params.problem, [&](auto element, auto dim) {
    return sm80::attention_bwd<decltype(element), decltype(dim)::value>(params, workspace, on);
  }));
}

const char* archs() { return HSTU_CUDA_ARCHS; }

}  // namespace hstu_ops::cuda
