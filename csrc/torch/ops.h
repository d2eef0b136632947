// The boxed kernels that library.cpp registers.
#pragma once

#include "torch/stable_abi.h"

namespace hstu_ops {

void attention_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void attention_plain_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void attention_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void attention_plain_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void attention_bias_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void layer_norm_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void layer_norm_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void silu_split_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void silu_split_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void norm_gate_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void norm_gate_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void layer_core_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);
void layer_core_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t num_outputs);

}  // namespace hstu_ops
