// The attention as torch ops: arguments are taken off the stack, checked, turned
// into the params of core/params.h and handed to the CPU or CUDA launcher.
#include "core/launch.h"
#include "torch/attention_arguments.h"
#include "torch/launch.h"
#include "torch/ops.h"

namespace hstu_ops {

namespace {

void attend(abi::Value* stack, const AttentionArguments& a) {
  AttentionFwdParams params;
  params.problem = problem_of(a);
  Tensor out = Tensor::empty({a.total_q(), a.heads(), a.v.size(2)}, a.q.dtype(), a.device());
  params.out = output_view(out);
  launch_attention(params, a.device());
  give_back(stack, {&out});
}

// Gradients of q, k and v, and of the bias if `with_bias`.
void attend_bwd(abi::Value* stack, const Tensor& grad_out, const AttentionArguments& a, bool with_bias) {
  AttentionBwdParams params;
  params.deterministic = a.next.boolean();
  params.problem = problem_of(a);
  params.grad_out = view(grad_out, "grad_out", {a.total_q(), a.heads(), a.v.size(2)}, "[total_q, H, Dv]", a.q);
  Tensor grad_q = Tensor::empty(a.q.shape(), a.q.dtype(), a.device());
  Tensor grad_k = Tensor::empty(a.k.shape(), a.q.dtype(), a.device());
  Tensor grad_v = Tensor::empty(a.v.shape(), a.q.dtype(), a.device());
  params.grad_q = output_view(grad_q);
  params.grad_k = output_view(grad_k);
  params.grad_v = output_view(grad_v);
  std::optional<BiasGradients> bias;
  if (with_bias) bias.emplace(a, true).ask(params);
  launch_attention(params, a.device());
  give_back(stack, {&grad_q, &grad_k, &grad_v});
  if (bias) give_back(stack + 3, {&bias->dense, &bias->position, &bias->time});
}

void attend_bwd(abi::Value* stack, uint64_t num_inputs, bool with_bias) {
  expect_arguments(num_inputs, 1 + AttentionArguments::kCount + 1);
  Arguments arguments(stack);
  const Tensor grad_out = arguments.tensor();
  attend_bwd(stack, grad_out, AttentionArguments(arguments), with_bias);
}

}  // namespace

void attention_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, AttentionArguments::kCount);
  Arguments arguments(stack);
  attend(stack, AttentionArguments(arguments));
}

void attention_plain_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, AttentionArguments::kPlain);
  Arguments arguments(stack);
  attend(stack, AttentionArguments::plain(arguments));
}

void attention_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) { attend_bwd(stack, num_inputs, false); }

void attention_plain_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, 1 + AttentionArguments::kPlain + 1);
  Arguments arguments(stack);
  const Tensor grad_out = arguments.tensor();
  attend_bwd(stack, grad_out, AttentionArguments::plain(arguments), false);
}

void attention_bias_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) { attend_bwd(stack, num_inputs, true); }

}  // namespace hstu_ops
