#include "cuda/sm80/bwd.cuh"

namespace hstu_ops::cuda::sm80 {
template Status attention_bwd<Tf32, 128>(const AttentionBwdParams&, void*, cudaStream_t);
}  // namespace hstu_ops::cuda::sm80
