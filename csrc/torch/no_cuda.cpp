// Stands in for csrc/cuda in a build without CUDA kernels: every launch says what to do.
#ifndef HSTU_WITH_CUDA

#include "core/launch.h"

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
const char* archs() { return ""; }

}  // namespace hstu_ops::cuda

#endif
