#include "cuda/sm90/bwd.cuh"

namespace hstu_ops::cuda::sm90 {
template Status attention_bwd_dense<__nv_bfloat16, 128>(const AttentionBwdParams&, void*, int, cudaStream_t);
}  // namespace hstu_ops::cuda::sm90
