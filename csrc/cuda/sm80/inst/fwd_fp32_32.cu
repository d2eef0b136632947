#include "cuda/sm80/fwd.cuh"

namespace hstu_ops::cuda::sm80 {
template Status attention_fwd<float, 32>(const AttentionFwdParams&, cudaStream_t);
}  // namespace hstu_ops::cuda::sm80
