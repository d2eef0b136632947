// Checks of the attention's arguments.
#include "torch/attention_arguments.h"

#include <cmath>

#include "torch/expect.h"

namespace hstu_ops {
namespace {

// An option; lengths of 2^30 and more mean the same as 2^30, which is beyond every row.
int length_option(int64_t value, const char* argument, int64_t least) {
  expect(value >= least, argument, [=] { return "at least " + text(least); }, value);
  return static_cast<int>(std::min<int64_t>(value, 1 << 30));
}

// A contiguous one-dimensional tensor.
void expect_vector(const Tensor& tensor, const char* argument, int64_t size, const char* spelling, Device device) {
  expect_shape(tensor, argument, {size}, spelling);
  expect_device(tensor, argument, device);
  expect_rows(tensor, argument);
}

IntArray int_array(const std::optional<Tensor>& tensor, const char* argument, int64_t size, const char* spelling,
                   Device device) {
  if (!tensor) return {};
  expect_dtype(*tensor, argument, {abi::aoti_torch_dtype_int64(), abi::aoti_torch_dtype_int32()});
  expect_vector(*tensor, argument, size, spelling, device);
  return {tensor->data(), tensor->dtype() == abi::aoti_torch_dtype_int64()};
}

const int64_t* int64_vector(const std::optional<Tensor>& tensor, const char* argument, int64_t size,
                            const char* spelling, Device device) {
  if (!tensor) return nullptr;
  expect_dtype(*tensor, argument, {abi::aoti_torch_dtype_int64()});
  expect_vector(*tensor, argument, size, spelling, device);
  return static_cast<const int64_t*>(tensor->data());
}

JaggedParams jagged_params(const AttentionArguments& a) {
  expect(a.seq_offsets.dim() == 1 && a.seq_offsets.size(0) >= 1, "seq_offsets", "shape [B + 1]", a.seq_offsets.shape());
  const Device device = a.device();
  const int64_t batch = a.batch();
  JaggedParams p;
  p.batch = int_size(batch, "seq_offsets");
  p.total_q = a.total_q();
  p.total_kv = a.total_kv();
  expect_dtype(a.seq_offsets, "seq_offsets", {abi::aoti_torch_dtype_int64(), abi::aoti_torch_dtype_int32()});
  expect_vector(a.seq_offsets, "seq_offsets", batch + 1, "[B + 1]", device);
  p.offsets = {a.seq_offsets.data(), a.seq_offsets.dtype() == abi::aoti_torch_dtype_int64()};
  p.offsets_q = int_array(a.seq_offsets_q, "seq_offsets_q", batch + 1, "[B + 1]", device);
  expect(
      a.seq_offsets_q || p.total_q == p.total_kv, "q",
      [&] { return "as many rows as k (" + text(p.total_kv) + ") without seq_offsets_q"; }, p.total_q);
  p.num_targets = int_array(a.num_targets, "num_targets", batch, "[B]", device);
  p.contextual_seq_lens = int_array(a.contextual_seq_lens, "contextual_seq_lens", batch, "[B]", device);
  p.contextual_seq_len = length_option(a.contextual_seq_len, "contextual_seq_len", 0);
  expect(!a.contextual_seq_lens || p.contextual_seq_len == 0, "contextual_seq_len", "0 beside contextual_seq_lens",
         p.contextual_seq_len);
  return p;
}

MaskOptions mask_options(const AttentionArguments& a) {
  MaskOptions options;
  options.causal = a.causal;
  options.target_group_size = length_option(a.target_group_size, "target_group_size", 1);
  options.max_attn_len = length_option(a.max_attn_len, "max_attn_len", 0);
  options.min_full_attn_seq_len = length_option(a.min_full_attn_seq_len, "min_full_attn_seq_len", 0);
  options.global_prefix_len = length_option(a.global_prefix_len, "global_prefix_len", 0);
  return options;
}

ScaleParams scale_params(const AttentionArguments& a) {
  ScaleParams scale;
  scale.value = a.scale ? *a.scale : 1.0 / static_cast<double>(std::max<int64_t>(a.max_seq_len, 1));
  if (!a.scale_values) return scale;
  expect(!a.scale, "scale_values", "None beside scale", "both");
  const Tensor& values = *a.scale_values;
  expect_dtype(values, "scale_values", {a.table_dtype()});
  const bool per_sequence = values.dim() == 1 && values.size(0) == a.batch();
  expect_vector(values, "scale_values", per_sequence ? a.batch() : a.total_q(), "[B] or [total_q]", a.device());
  scale.values = values.data();
  scale.per_row = !per_sequence;
  return scale;
}

struct Table {
  const void* data = nullptr;
  int64_t head_stride = 0;
  int64_t size = 0;
};

// A bias table, [size] or [H, size].
Table table(const std::optional<Tensor>& tensor, const char* argument, const AttentionArguments& a) {
  if (!tensor) return {};
  expect_dtype(*tensor, argument, {a.table_dtype()});
  expect_device(*tensor, argument, a.device());
  const int64_t dim = tensor->dim();
  expect(
      dim == 1 || (dim == 2 && tensor->size(0) == a.heads()), argument,
      [&] { return "shape [n] or [H, n] with H = " + text(a.heads()); }, tensor->shape());
  expect_rows(*tensor, argument);
  expect_unexpanded(*tensor, argument, dim - 1);
  return {tensor->data(), dim == 2 ? tensor->stride(0) : 0, tensor->size(dim - 1)};
}

RelativeBiasParams relative_bias(const AttentionArguments& a) {
  RelativeBiasParams p;
  const Table position = table(a.position_weight, "position_weight", a);
  expect(!a.position_weight || position.size % 2 == 1, "position_weight", "an odd number of entries, 2 P - 1",
         position.size);
  p.position_weight = position.data;
  p.position_head_stride = position.head_stride;
  p.positions = int_size((position.size + 1) / 2, "position_weight");

  const Table time = table(a.time_weight, "time_weight", a);
  const bool with_time = a.time_weight.has_value();
  const auto needs_time = [&](const std::optional<Tensor>& tensor, const char* argument, bool required) {
    const bool good = with_time ? tensor.has_value() || !required : !tensor.has_value();
    expect(good, argument, with_time ? "a tensor beside time_weight" : "None without time_weight",
           with_time ? "None" : "a tensor");
  };
  needs_time(a.time_boundaries, "time_boundaries", true);
  needs_time(a.timestamps, "timestamps", true);
  needs_time(a.query_timestamps, "query_timestamps", false);
  if (!with_time) return p;
  expect(time.size >= 1, "time_weight", "at least one entry", "none");
  p.time_weight = time.data;
  p.time_head_stride = time.head_stride;
  p.num_boundaries = int_size(time.size - 1, "time_weight");
  p.time_boundaries = int64_vector(a.time_boundaries, "time_boundaries", time.size - 1,
                                   "[one less than time_weight has entries]", a.device());
  p.timestamps = int64_vector(a.timestamps, "timestamps", a.total_kv(), "[total_kv]", a.device());
  p.query_timestamps = int64_vector(a.query_timestamps, "query_timestamps", a.total_q(), "[total_q]", a.device());
  return p;
}

DenseBiasParams dense_bias(const AttentionArguments& a) {
  if (!a.bias) return {};
  const Tensor& bias = *a.bias;
  expect_dtype(bias, "bias", {a.table_dtype()});
  expect_device(bias, "bias", a.device());
  const Shape shape = bias.shape();
  const bool good = shape.dim() == 4 && (shape[0] == 1 || shape[0] == a.batch()) &&
                    (shape[1] == 1 || shape[1] == a.heads()) && shape[2] == shape[3] && shape[2] >= a.max_seq_len;
  const auto expected = [&] {
    return "shape [B or 1, H or 1, N, N] with B = " + text(a.batch()) + ", H = " + text(a.heads()) +
           " and N at least max_seq_len = " + text(a.max_seq_len);
  };
  expect(good, "bias", expected, shape);
  expect_rows(bias, "bias");
  expect_unexpanded(bias, "bias", 2);
  DenseBiasParams p;
  p.data = bias.data();
  p.batch_stride = shape[0] == 1 ? 0 : bias.stride(0);
  p.head_stride = shape[1] == 1 ? 0 : bias.stride(1);
  p.row_stride = bias.stride(2);
  p.size = int_size(shape[3], "bias");
  return p;
}

// The gradient of a bias table: of its shape if it is wanted, else empty.
Tensor bias_gradient(const std::optional<Tensor>& bias, bool wanted, const AttentionArguments& a) {
  return Tensor::empty(bias && wanted ? bias->shape() : Shape{0}, a.table_dtype(), a.device());
}

}  // namespace

View view(const Tensor& tensor, const char* argument, const Shape& shape, const char* spelling, const Tensor& q) {
  expect_shape(tensor, argument, shape, spelling);
  expect_dtype(tensor, argument, {q.dtype()});
  expect_device(tensor, argument, q.device());
  expect_rows(tensor, argument);
  return {tensor.data(), tensor.stride(0), tensor.stride(1)};
}

AttentionProblem problem_of(const AttentionArguments& a) {
  AttentionProblem p;
  const Shape q = a.q.shape(), k = a.k.shape(), v = a.v.shape();
  expect(q.dim() == 3 && q[1] >= 1 && q[2] >= 1, "q", "shape [total_q, H, Dqk]", q);
  expect(k.dim() == 3, "k", "shape [total_kv, H, Dqk]", k);
  expect(v.dim() == 3 && v[2] >= 1, "v", "shape [total_kv, H, Dv]", v);
  expect(a.max_seq_len >= 0, "max_seq_len", "at least 0", a.max_seq_len);
  p.dtype = expect_float(a.q, "q");
  p.heads = int_size(q[1], "q");
  p.dim_qk = int_size(q[2], "q");
  p.dim_v = int_size(v[2], "v");
  p.q = view(a.q, "q", q, "[total_q, H, Dqk]", a.q);
  p.k = view(a.k, "k", {k[0], q[1], q[2]}, "[total_kv, H, Dqk]", a.q);
  p.v = view(a.v, "v", {k[0], q[1], v[2]}, "[total_kv, H, Dv]", a.q);
  p.jagged = jagged_params(a);
  p.mask = mask_options(a);
  p.alpha = a.alpha ? *a.alpha : 1.0 / std::sqrt(static_cast<double>(p.dim_qk));
  p.scale = scale_params(a);
  expect(!a.bias || (!a.position_weight && !a.time_weight), "bias", "None beside position_weight or time_weight",
         "both");
  p.relative = relative_bias(a);
  p.dense = dense_bias(a);
  p.allow_tf32 = a.allow_tf32;
  return p;
}

BiasGradients::BiasGradients(const AttentionArguments& a, bool wanted)
    : wanted(wanted),
      has_dense(a.bias.has_value()),
      has_position(a.position_weight.has_value()),
      has_time(a.time_weight.has_value()),
      distances_fit(has_position && a.position_weight->size(a.position_weight->dim() - 1) / 2 + 1 >= a.max_seq_len),
      dense(bias_gradient(a.bias, wanted, a)),
      position(bias_gradient(a.position_weight, wanted, a)),
      time(bias_gradient(a.time_weight, wanted, a)) {}

void BiasGradients::ask(AttentionBwdParams& params) const {
  if (wanted && has_dense) params.grad_bias = dense.data();
  if (wanted && has_position) params.grad_position_weight = position.data();
  if (wanted && has_time) params.grad_time_weight = time.data();
  params.distances_fit = distances_fit;
}

}  // namespace hstu_ops
