// The torch library "hstu_ops": schemas, registrations and build_info. Runs when the library is loaded.
#include <string>

#include "commit.h"  // made by cmake/commit.cmake
#include "core/launch.h"
#include "torch/ops.h"
#include "torch/stable.h"

namespace hstu_ops {
namespace {

// The arguments of attention_fwd after q, k and v, which its backwards and layer_core repeat; attention_arguments.h
// reads them in this order.
#define ATTENTION_OPTIONS                                                                                        \
  "Tensor seq_offsets, Tensor? seq_offsets_q, SymInt max_seq_len, float? alpha, "                                \
  "float? scale, Tensor? scale_values, bool causal, Tensor? num_targets, int target_group_size, "                \
  "int contextual_seq_len, Tensor? contextual_seq_lens, int max_attn_len, int min_full_attn_seq_len, "           \
  "int global_prefix_len, Tensor? bias, Tensor? position_weight, Tensor? time_weight, Tensor? time_boundaries, " \
  "Tensor? timestamps, Tensor? query_timestamps, bool allow_tf32"

#define ATTENTION_ARGUMENTS "Tensor q, Tensor k, Tensor v, " ATTENTION_OPTIONS

// Those of a call without options. Torch takes 0.1 to 0.3 us for each argument, given or not, and a kernel's launch 4.
#define PLAIN_ARGUMENTS \
  "Tensor q, Tensor k, Tensor v, Tensor seq_offsets, SymInt max_seq_len, Tensor? num_targets, bool allow_tf32"

// Of the norm and the gate; pointwise_arguments.h reads them in this order.
#define GATE_OPTIONS                                                                                               \
  "Tensor? weight, Tensor? norm_bias, SymInt groups, float eps, float dropout, Tensor? seed_values, SymInt seed, " \
  "bool concat"
#define SILU_OPTIONS \
  "SymInt size_u, SymInt size_v, SymInt size_q, SymInt size_k, bool silu_u, bool silu_v, bool silu_q, bool silu_k"
#define CORE_OPTIONS                                                                         \
  ATTENTION_OPTIONS                                                                          \
  ", SymInt num_heads, SymInt dim_qk, SymInt dim_v, bool silu_u, bool silu_v, bool silu_q, " \
  "bool silu_k, " GATE_OPTIONS

constexpr const char* kAttention[] = {
    "attention_fwd(" ATTENTION_ARGUMENTS ") -> Tensor",
    "attention_plain_fwd(" PLAIN_ARGUMENTS ") -> Tensor",
    "attention_bwd(Tensor grad_out, " ATTENTION_ARGUMENTS
    ", bool deterministic) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    "attention_plain_bwd(Tensor grad_out, " PLAIN_ARGUMENTS
    ", bool deterministic) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    "attention_bias_bwd(Tensor grad_out, " ATTENTION_ARGUMENTS
    ", bool deterministic) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, "
    "Tensor grad_position_weight, Tensor grad_time_weight)",
};

constexpr const char* kLayer[] = {
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    "layer_norm_bwd(Tensor grad_out, Tensor x, Tensor? weight, float eps, bool need_weight_grad) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    "silu_split_fwd(Tensor uvqk, " SILU_OPTIONS ") -> Tensor",
    "silu_split_bwd(Tensor? grad_u, Tensor? grad_v, Tensor? grad_q, Tensor? grad_k, Tensor uvqk, " SILU_OPTIONS
    ") -> Tensor",
    "norm_gate_fwd(Tensor a, Tensor u, bool silu_u, " GATE_OPTIONS ") -> Tensor",
    "norm_gate_bwd(Tensor grad_out, Tensor a, Tensor u, bool silu_u, " GATE_OPTIONS
    ", bool need_weight_grad) -> (Tensor grad_a, Tensor grad_u, Tensor grad_weight, Tensor grad_norm_bias)",
    // What to recompute is autograd's affair.
    "layer_core_fwd(Tensor uvqk, " CORE_OPTIONS
    ", bool recompute_silu, bool recompute_attention) -> (Tensor y, Tensor activated, Tensor a)",
    "layer_core_bwd(Tensor grad_out, Tensor uvqk, Tensor? activated, Tensor? a, " CORE_OPTIONS
    ", bool need_weight_grad, bool need_bias_grad, bool deterministic) -> (Tensor grad_uvqk, Tensor grad_weight, "
    "Tensor grad_norm_bias, Tensor grad_bias, Tensor grad_position_weight, Tensor grad_time_weight)",
};

// One "key=value" a line.
std::string build_info() {
  std::string info = "version=" HSTU_VERSION "\ncommit=" HSTU_COMMIT "\ncompiler=" HSTU_COMPILER "\ntorch_abi=";
  info += abi::kVersionText;
  info += "\ncpu_isas=" HSTU_CPU_ISAS "\ncpu_isa=";
  info += cpu::isa();
  return info + "\ncuda=" HSTU_CUDA_VERSION "\ncuda_archs=" HSTU_CUDA_ARCHS "\n";
}

void build_info_op(abi::Value* stack, uint64_t, uint64_t) { give_back(stack, build_info()); }

[[maybe_unused]] const bool registered = [] {
  Library definitions = Library::definitions();
  definitions.def("build_info() -> str");
  for (const char* schema : kAttention) definitions.def(schema);
  for (const char* schema : kLayer) definitions.def(schema);
  Library::kernels("CompositeExplicitAutograd").impl("build_info", build_info_op);
  // CUDA too where no CUDA kernels were built: the kernel then says so, which torch's own message would not.
  for (const char* key : {"CPU", "CUDA"}) {
    Library kernels = Library::kernels(key);
    kernels.impl("attention_fwd", attention_fwd_op).impl("attention_plain_fwd", attention_plain_fwd_op);
    kernels.impl("attention_bwd", attention_bwd_op).impl("attention_plain_bwd", attention_plain_bwd_op);
    kernels.impl("attention_bias_bwd", attention_bias_bwd_op);
    kernels.impl("layer_norm_fwd", layer_norm_fwd_op).impl("layer_norm_bwd", layer_norm_bwd_op);
    kernels.impl("silu_split_fwd", silu_split_fwd_op).impl("silu_split_bwd", silu_split_bwd_op);
    kernels.impl("norm_gate_fwd", norm_gate_fwd_op).impl("norm_gate_bwd", norm_gate_bwd_op);
    kernels.impl("layer_core_fwd", layer_core_fwd_op).impl("layer_core_bwd", layer_core_bwd_op);
  }
  return true;
}();

}  // namespace
}  // namespace hstu_ops
