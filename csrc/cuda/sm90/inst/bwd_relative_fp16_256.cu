#include "cuda/sm90/bwd.cuh"

namespace hstu_ops::cuda::sm90 {
template Status attention_bwd_relative<__half, 256>(const AttentionBwdParams&, void*, int, cudaStream_t);
}  // namespace hstu_ops::cuda::sm90
