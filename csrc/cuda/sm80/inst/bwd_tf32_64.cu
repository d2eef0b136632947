#include "cuda/sm80/bwd.cuh"

namespace hstu_ops::cuda::sm80 {
template Status attention_bwd<Tf32, 64>(const AttentionBwdParams&, void*, cudaStream_t);
}  // namespace hstu_ops::cuda::sm80
