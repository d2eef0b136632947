#include "cuda/sm80/fwd.cuh"

namespace hstu_ops::cuda::sm80 {
template Status attention_fwd<Tf32, 128>(const AttentionFwdParams&, cudaStream_t);
}  // namespace hstu_ops::cuda::sm80
