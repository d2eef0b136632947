#include "cuda/sm90/table_grads.cuh"

namespace hstu_ops::cuda::sm90 {
template Status attention_table_grads<__half, 256>(const AttentionBwdParams&, const BwdScratch&, int, cudaStream_t);
}  // namespace hstu_ops::cuda::sm90
