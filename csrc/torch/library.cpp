// The torch library "hstu_ops": schemas, registrations and build_info. Runs when the library is loaded.
#include <string>

#include "core/launch.h"
#include "torch/ops.h"
#include "torch/stable.h"

namespace hstu_ops {
namespace {

// The arguments of attention_fwd, which attention_bwd repeats; attention.cpp reads them in this order.
#define ATTENTION_ARGUMENTS                                                                                      \
  "Tensor q, Tensor k, Tensor v, Tensor seq_offsets, Tensor? seq_offsets_q, SymInt max_seq_len, float? alpha, "  \
  "float? scale, Tensor? scale_values, bool causal, Tensor? num_targets, int target_group_size, "                \
  "int contextual_seq_len, Tensor? contextual_seq_lens, int max_attn_len, int min_full_attn_seq_len, "           \
  "int global_prefix_len, Tensor? bias, Tensor? position_weight, Tensor? time_weight, Tensor? time_boundaries, " \
  "Tensor? timestamps, Tensor? query_timestamps, bool allow_tf32"

constexpr const char* kAttentionFwd = "attention_fwd(" ATTENTION_ARGUMENTS ") -> Tensor";
constexpr const char* kAttentionBwd =
    "attention_bwd(Tensor grad_out, " ATTENTION_ARGUMENTS
    ", bool need_bias_grad, bool deterministic) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, "
    "Tensor grad_position_weight, Tensor grad_time_weight)";

// One "key=value" a line.
std::string build_info() {
  std::string info = "version=" HSTU_VERSION "\ncompiler=" HSTU_COMPILER "\ntorch_abi=";
  info += abi::kVersionText;
  info += "\ncpu_isas=" HSTU_CPU_ISAS "\ncpu_isa=";
  info += cpu::isa();
  return info + "\ncuda=" HSTU_CUDA_VERSION "\ncuda_archs=" HSTU_CUDA_ARCHS "\n";
}

void build_info_op(abi::Value* stack, uint64_t, uint64_t) { give_back(stack, build_info()); }

[[maybe_unused]] const bool registered = [] {
  Library::definitions().def(kAttentionFwd).def(kAttentionBwd).def("build_info() -> str");
  Library::kernels("CompositeExplicitAutograd").impl("build_info", build_info_op);
  // CUDA too where no CUDA kernels were built: the kernel then says so, which torch's own message would not.
  for (const char* key : {"CPU", "CUDA"}) {
    Library::kernels(key).impl("attention_fwd", attention_fwd_op).impl("attention_bwd", attention_bwd_op);
  }
  return true;
}();

}  // namespace
}  // namespace hstu_ops
