#include "cuda/sm90/fwd.cuh"

namespace hstu_ops::cuda::sm90 {
template Status attention_fwd_biased<__nv_bfloat16, 128>(const AttentionFwdParams&, void*, int, cudaStream_t);
}  // namespace hstu_ops::cuda::sm90
