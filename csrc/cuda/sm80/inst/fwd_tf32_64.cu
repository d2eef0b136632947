#include "cuda/sm80/fwd.cuh"

namespace hstu_ops::cuda::sm80 {
template Status attention_fwd<Tf32, 64>(const AttentionFwdParams&, cudaStream_t);
}  // namespace hstu_ops::cuda::sm80
