// attention_fwd and attention_bwd as torch ops: arguments are taken off the stack, checked, turned into the params of
// core/params.h and handed to the CPU or CUDA launcher.
#include "core/launch.h"
#include "torch/attention_arguments.h"
#include "torch/launch.h"
#include "torch/ops.h"

namespace hstu_ops {

void attention_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, AttentionArguments::kCount);
  Arguments arguments(stack);
  const AttentionArguments a(arguments);
  AttentionFwdParams params;
  params.problem = problem_of(a);
  Tensor out = Tensor::empty({a.total_q(), a.heads(), a.v.size(2)}, a.q.dtype(), a.device());
  params.out = output_view(out);
  launch_attention(params, a.device());
  give_back(stack, {&out});
}

void attention_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, AttentionArguments::kCount + 3);
  Arguments arguments(stack);
  const Tensor grad_out = arguments.tensor();
  const AttentionArguments a(arguments);
  const bool need_bias_grad = arguments.boolean();
  AttentionBwdParams params;
  params.deterministic = arguments.boolean();
  params.problem = problem_of(a);
  params.grad_out = view(grad_out, "grad_out", {a.total_q(), a.heads(), a.v.size(2)}, "[total_q, H, Dv]", a.q);
  Tensor grad_q = Tensor::empty(a.q.shape(), a.q.dtype(), a.device());
  Tensor grad_k = Tensor::empty(a.k.shape(), a.q.dtype(), a.device());
  Tensor grad_v = Tensor::empty(a.v.shape(), a.q.dtype(), a.device());
  BiasGradients bias(a, need_bias_grad);
  params.grad_q = output_view(grad_q);
  params.grad_k = output_view(grad_k);
  params.grad_v = output_view(grad_v);
  bias.ask(params);
  launch_attention(params, a.device());
  give_back(stack, {&grad_q, &grad_k, &grad_v, &bias.dense, &bias.position, &bias.time});
}

}  // namespace hstu_ops
