// Stands in for csrc/cuda in a build without CUDA kernels: every launch says what to do.
#ifndef HSTU_WITH_CUDA

#include "core/pointwise.h"

namespace hstu_ops::cuda {
namespace {

Status not_built() {
  return {"this build holds no CUDA kernels; reinstall with HSTU_CUDA=1 where nvcc is (CUDA_HOME names its toolkit)"};
}

}  // namespace

size_t attention_fwd_workspace(const AttentionFwdParams&) { return 0; }
size_t attention_bwd_workspace(const AttentionBwdParams&) { return 0; }
Status attention_fwd(const AttentionFwdParams&, void*, void*) { return not_built(); }
Status attention_bwd(const AttentionBwdParams&, void*, void*) { return not_built(); }
size_t norm_fwd_workspace(const NormFwdParams&) { return 0; }
size_t norm_bwd_workspace(const NormBwdParams&) { return 0; }
size_t silu_workspace(const SiluParams&) { return 0; }
Status norm_fwd(const NormFwdParams&, void*, void*) { return not_built(); }
Status norm_bwd(const NormBwdParams&, void*, void*) { return not_built(); }
Status silu_fwd(const SiluParams&, void*, void*) { return not_built(); }
Status silu_bwd(const SiluParams&, void*, void*) { return not_built(); }
const char* archs() { return ""; }

}  // namespace hstu_ops::cuda

#endif
