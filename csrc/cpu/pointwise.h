// What one instruction set offers for the layer kernels, and the memory they are given. Used by pointwise.cpp and
// pointwise_isa.cpp.
#pragma once

#include "core/pointwise.h"
#include "cpu/work.h"

namespace hstu_ops {
namespace cpu {

// Rows of one thread, accumulation type, each [padded columns].
template <class C>
struct NormScratch {
  C *x, *u, *gate;                   // gate: u or silu(u)
  C *normed, *z;                     // without and with weight and bias
  C* product;                        // the result, or its gradient
  C *grad_direct_u, *grad_direct_x;  // from the copies of u and x in the result
  C *grad_z, *grad_u;

  HSTU_HD void layout(Arena& arena, int columns) {
    for (C** row : {&x, &u, &gate, &normed, &z, &product, &grad_direct_u, &grad_direct_x, &grad_z, &grad_u})
      *row = arena.take<C>(padded<C>(columns));
  }
};

// Each takes rows [begin, end) of the problem.
struct PointwiseKernels {
  const char* name;
  void (*norm_fwd_f32)(const NormFwdParams&, int64_t begin, int64_t end, void* scratch);
  void (*norm_fwd_f64)(const NormFwdParams&, int64_t begin, int64_t end, void* scratch);
  // sums: [2][columns], set to the gradients of weight and bias over these rows; may be null.
  void (*norm_bwd_f32)(const NormBwdParams&, int64_t begin, int64_t end, double* sums, void* scratch);
  void (*norm_bwd_f64)(const NormBwdParams&, int64_t begin, int64_t end, double* sums, void* scratch);
  void (*silu_fwd)(const SiluParams&, int64_t begin, int64_t end);
  void (*silu_bwd)(const SiluParams&, int64_t begin, int64_t end);
};

namespace generic {
extern const PointwiseKernels pointwise_kernels;
}
#ifdef HSTU_X86
namespace avx2 {
extern const PointwiseKernels pointwise_kernels;
}
namespace avx512 {
extern const PointwiseKernels pointwise_kernels;
}
#endif

}  // namespace cpu
}  // namespace hstu_ops
