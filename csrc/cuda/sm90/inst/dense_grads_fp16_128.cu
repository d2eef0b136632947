#include "cuda/sm90/dense_grads.cuh"

namespace hstu_ops::cuda::sm90 {
template Status attention_dense_grads<__half, 128>(const AttentionBwdParams&, void*, int, cudaStream_t);
}  // namespace hstu_ops::cuda::sm90
