// The arguments of attention_fwd, which its backwards and layer_core repeat, and what they are to the kernels.
#pragma once

#include <optional>
#include <utility>

#include "core/launch.h"
#include "torch/expect.h"

namespace hstu_ops {

// The members stand in the order of the schema in library.cpp.
struct AttentionArguments {
  static constexpr uint64_t kCount = 24, kOptions = 21, kPlain = 7;  // kOptions: those after v

  explicit AttentionArguments(Arguments& arguments) noexcept : next(arguments) {}
  // q, k and v are given; what follows v comes off the stack.
  AttentionArguments(Arguments& arguments, Tensor q, Tensor k, Tensor v) noexcept
      : next(arguments), q(std::move(q)), k(std::move(k)), v(std::move(v)) {}

  // Those of a call without options, in the order of PLAIN_ARGUMENTS in library.cpp.
  static AttentionArguments plain(Arguments& arguments) noexcept { return {arguments, Plain{}}; }

  Arguments& next;
  Tensor q = next.tensor();
  Tensor k = next.tensor();
  Tensor v = next.tensor();
  Tensor seq_offsets = next.tensor();
  std::optional<Tensor> seq_offsets_q = next.optional_tensor();
  int64_t max_seq_len = next.integer();
  std::optional<double> alpha = next.optional_number();
  std::optional<double> scale = next.optional_number();
  std::optional<Tensor> scale_values = next.optional_tensor();
  bool causal = next.boolean();
  std::optional<Tensor> num_targets = next.optional_tensor();
  int64_t target_group_size = next.integer();
  int64_t contextual_seq_len = next.integer();
  std::optional<Tensor> contextual_seq_lens = next.optional_tensor();
  int64_t max_attn_len = next.integer();
  int64_t min_full_attn_seq_len = next.integer();
  int64_t global_prefix_len = next.integer();
  std::optional<Tensor> bias = next.optional_tensor();
  std::optional<Tensor> position_weight = next.optional_tensor();
  std::optional<Tensor> time_weight = next.optional_tensor();
  std::optional<Tensor> time_boundaries = next.optional_tensor();
  std::optional<Tensor> timestamps = next.optional_tensor();
  std::optional<Tensor> query_timestamps = next.optional_tensor();
  bool allow_tf32 = next.boolean();

  int64_t batch() const { return seq_offsets.size(0) - 1; }
  int64_t total_q() const { return q.size(0); }
  int64_t total_kv() const { return k.size(0); }
  int64_t heads() const { return q.size(1); }
  Device device() const { return q.device(); }
  int32_t table_dtype() const { return accumulation_dtype(q.dtype()); }

 private:
  struct Plain {};
  AttentionArguments(Arguments& arguments, Plain) noexcept
      : next(arguments),
        seq_offsets_q(),
        alpha(),
        scale(),
        scale_values(),
        causal(true),
        target_group_size(1),
        contextual_seq_len(0),
        contextual_seq_lens(),
        max_attn_len(0),
        min_full_attn_seq_len(0),
        global_prefix_len(0),
        bias(),
        position_weight(),
        time_weight(),
        time_boundaries(),
        timestamps(),
        query_timestamps() {}
};

// Checks the arguments.
AttentionProblem problem_of(const AttentionArguments& a);

// A [rows, heads, dim] tensor of q's type, checked; and one that we made.
View view(const Tensor& tensor, const char* argument, const Shape& shape, const char* spelling, const Tensor& q);
inline View output_view(const Tensor& tensor) { return {tensor.data(), tensor.stride(0), tensor.stride(1)}; }

// Gradients of the attention's bias: of its shape where they are wanted, else empty.
struct BiasGradients {
  BiasGradients(const AttentionArguments& a, bool wanted);
  void ask(AttentionBwdParams& params) const;

  bool wanted;
  bool has_dense, has_position, has_time;
  bool distances_fit;  // see AttentionBwdParams
  Tensor dense, position, time;
};

}  // namespace hstu_ops
