// The one dispatch point: element type and head dimension of a problem to the kernels of this build.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "core/launch.h"
#include "cuda/tile/workspace.h"

namespace hstu_ops::cuda {

namespace sm80 {
template <class T, int kDim>
Status attention_fwd(const AttentionFwdParams& params, cudaStream_t stream);
template <class T, int kDim>
Status attention_bwd(const AttentionBwdParams& params, void* memory, cudaStream_t stream);
}  // namespace sm80

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

int padded_dim(const AttentionProblem& a) {
  int dim = a.dim_qk > a.dim_v ? a.dim_qk : a.dim_v, padded = 32;
  while (padded < dim) padded *= 2;
  return padded;
}

// f(element, head dimension): a value of the element type and a constant.
template <class F>
Status dispatch(const AttentionProblem& a, F&& f) {
  const int dim = a.dim_qk > a.dim_v ? a.dim_qk : a.dim_v;
  return dispatch("head dimension", dim, HeadDims{}, [&](auto d) -> Status {
    switch (a.dtype) {
      case DType::kFloat16:
        return f(__half{}, d);
      case DType::kBFloat16:
        return f(__nv_bfloat16{}, d);
      case DType::kFloat32:
        return f(float{}, d);
      default:
        return {"float64 is not supported on CUDA: convert to float32, or run on the CPU"};
    }
  });
}

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

// The smallest block of queries of any backward kernel.
constexpr int kFewestQueries = 16;

}  // namespace

size_t attention_fwd_workspace(const AttentionFwdParams&) { return 0; }

size_t attention_bwd_workspace(const AttentionBwdParams& params) {
  return BwdWorkspace::plan(params, padded_dim(params.problem), kFewestQueries, nullptr).bytes;
}

Status attention_fwd(const AttentionFwdParams& params, void*, void* stream) {
  if (empty(params.problem)) return {};
  return explained(dispatch(params.problem, [&](auto element, auto dim) {
    return sm80::attention_fwd<decltype(element), decltype(dim)::value>(params, static_cast<cudaStream_t>(stream));
  }));
}

Status attention_bwd(const AttentionBwdParams& params, void* workspace, void* stream) {
  if (empty(params.problem)) return {};
  return explained(dispatch(params.problem, [&](auto element, auto dim) {
    return sm80::attention_bwd<decltype(element), decltype(dim)::value>(params, workspace,
                                                                        static_cast<cudaStream_t>(stream));
  }));
}

const char* archs() { return HSTU_CUDA_ARCHS; }

}  // namespace hstu_ops::cuda
