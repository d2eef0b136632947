// layer_core_fwd and layer_core_bwd as torch ops: SiLU on the projection, attention, norm and gate. u gets SiLU where
// the gate reads it; v, q and k get theirs in one pass into `activated`, which holds those of them that have it, side
// by side. The backward pass writes all gradients into one tensor and applies SiLU's to v, q and k there.
#include "torch/attention_arguments.h"
#include "torch/ops.h"
#include "torch/pointwise_arguments.h"

namespace hstu_ops {
namespace {

enum Part { kU, kV, kQ, kK, kParts };

struct CoreArguments {
  static constexpr uint64_t kCount = AttentionArguments::kOptions + 7 + GateArguments::kCount;

  explicit CoreArguments(Arguments& arguments) noexcept : next(arguments) {}

  Arguments& next;
  AttentionArguments attention{next, Tensor(nullptr), Tensor(nullptr), Tensor(nullptr)};
  int64_t num_heads = next.integer();
  int64_t dim_qk = next.integer();
  int64_t dim_v = next.integer();
  bool silu[kParts] = {next.boolean(), next.boolean(), next.boolean(), next.boolean()};
  GateArguments gate{next};

  int64_t dim(int part) const { return part == kU || part == kV ? dim_v : dim_qk; }
  int64_t columns(int part) const { return num_heads * dim(part); }
  int64_t first_column(int part) const {
    int64_t first = 0;
    for (int i = 0; i < part; ++i) first += columns(i);
    return first;
  }
  // In `activated`, which u is never part of.
  int64_t first_activated(int part) const {
    int64_t first = 0;
    for (int i = kV; i < part; ++i) first += silu[i] ? columns(i) : 0;
    return first;
  }
  int64_t activated_columns() const { return first_activated(kParts); }
  int64_t out_columns() const { return columns(kU) * (gate.concat ? 3 : 1); }

  void check(const Tensor& uvqk) const {
    expect_matrix(uvqk, "uvqk");
    for (const auto& [value, name] :
         {std::pair<int64_t, const char*>{num_heads, "num_heads"}, {dim_qk, "dim_qk"}, {dim_v, "dim_v"}})
      expect(value >= 1 && value < (1 << 20), name, "1 to 2^20", std::to_string(value));
    expect_shape(uvqk, "uvqk", {uvqk.size(0), first_column(kParts)}, "[T, 2 num_heads (dim_v + dim_qk)]");
  }
};

Tensor heads_of(const Tensor& matrix, int64_t first, int64_t heads, int64_t dim) {
  return matrix.view({matrix.size(0), heads, dim}, {matrix.stride(0), dim, 1}, first);
}

// v, q or k, as the attention reads it.
Tensor operand(const CoreArguments& c, int part, const Tensor& uvqk, const Tensor& activated) {
  const bool silu = c.silu[part];
  return heads_of(silu ? activated : uvqk, silu ? c.first_activated(part) : c.first_column(part), c.num_heads,
                  c.dim(part));
}

void give_operands(CoreArguments& c, const Tensor& uvqk, const Tensor& activated) {
  c.attention.v = operand(c, kV, uvqk, activated);
  c.attention.q = operand(c, kQ, uvqk, activated);
  c.attention.k = operand(c, kK, uvqk, activated);
}

// Those of v, q and k that have SiLU; add(part, i) says where results go.
template <class F>
SiluParams activated_parts(const CoreArguments& c, const Tensor& uvqk, F&& add) {
  SiluParams params;
  params.dtype = expect_float(uvqk, "uvqk");
  params.rows = uvqk.size(0);
  for (int i = kV; i < kParts; ++i) {
    if (!c.silu[i]) continue;
    SiluPart part;
    part.x = rows_from(uvqk, c.first_column(i));
    part.columns = c.columns(i);
    part.activate = true;
    add(part, i);
    add_part(params, part);
  }
  return params;
}

Tensor activate(const CoreArguments& c, const Tensor& uvqk) {
  Tensor activated = Tensor::empty({uvqk.size(0), c.activated_columns()}, uvqk.dtype(), uvqk.device());
  const SiluParams params =
      activated_parts(c, uvqk, [&](SiluPart& part, int i) { part.y = rows_from(activated, c.first_activated(i)); });
  if (params.count > 0) launch_silu_fwd(params, uvqk.device());
  return activated;
}

Tensor attend(const AttentionProblem& problem, const Tensor& uvqk, int64_t columns) {
  Tensor a = Tensor::empty({uvqk.size(0), columns}, uvqk.dtype(), uvqk.device());
  AttentionFwdParams params;
  params.problem = problem;
  params.out = {a.data(), columns, problem.dim_v};
  launch_attention(params, uvqk.device());
  return a;
}

NormProblem gate_problem(const CoreArguments& c, const Tensor& uvqk, const Tensor& a) {
  const GateArguments& g = c.gate;
  NormProblem p = norm_problem(a, "a", g.weight, g.bias, g.groups, g.eps);
  p.u = rows_from(uvqk, c.first_column(kU));
  p.silu_u = c.silu[kU];
  p.concat = g.concat;
  p.dropout = g.dropout_params(uvqk.device());
  return p;
}

void attend_bwd(const CoreArguments& c, const AttentionProblem& problem, const Tensor& grad_a, const Tensor& grad_uvqk,
                const BiasGradients& bias, bool deterministic) {
  AttentionBwdParams params;
  params.problem = problem;
  params.deterministic = deterministic;
  params.grad_out = {grad_a.data(), grad_a.stride(0), c.dim_v};
  const auto slice = [&](int part) {
    const Rows rows = rows_from(grad_uvqk, c.first_column(part));
    return View{rows.data, rows.row_stride, c.dim(part)};
  };
  params.grad_q = slice(kQ);
  params.grad_k = slice(kK);
  params.grad_v = slice(kV);
  bias.ask(params);
  launch_attention(params, grad_a.device());
}

// In place.
void silu_bwd(const CoreArguments& c, const Tensor& uvqk, const Tensor& grad_uvqk) {
  const SiluParams params = activated_parts(
      c, uvqk, [&](SiluPart& part, int i) { part.grad_out = part.grad_x = rows_from(grad_uvqk, c.first_column(i)); });
  if (params.count > 0) launch_silu_bwd(params, uvqk.device());
}

}  // namespace

void layer_core_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, 1 + CoreArguments::kCount + 2);
  Arguments arguments(stack);
  const Tensor uvqk = arguments.tensor();
  CoreArguments c(arguments);
  c.check(uvqk);
  Tensor activated = activate(c, uvqk);
  give_operands(c, uvqk, activated);
  Tensor a = attend(problem_of(c.attention), uvqk, c.columns(kU));
  NormFwdParams params;
  params.problem = gate_problem(c, uvqk, a);
  Tensor y = Tensor::empty({uvqk.size(0), c.out_columns()}, uvqk.dtype(), uvqk.device());
  params.out = rows_from(y);
  launch_norm(params, uvqk.device());
  give_back(stack, {&y, &activated, &a});
}

void layer_core_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, 4 + CoreArguments::kCount + 3);
  Arguments arguments(stack);
  const Tensor grad_out = arguments.tensor(), uvqk = arguments.tensor();
  std::optional<Tensor> activated = arguments.optional_tensor(), a = arguments.optional_tensor();
  CoreArguments c(arguments);
  const bool need_weight_grad = arguments.boolean(), need_bias_grad = arguments.boolean(),
             deterministic = arguments.boolean();
  c.check(uvqk);
  const int64_t total = uvqk.size(0);
  expect_matrix(grad_out, "grad_out", total, c.out_columns(), uvqk, "uvqk");
  if (activated) expect_matrix(*activated, "activated", total, c.activated_columns(), uvqk, "uvqk");
  if (a) expect_matrix(*a, "a", total, c.columns(kU), uvqk, "uvqk");

  if (!activated) activated.emplace(activate(c, uvqk));
  give_operands(c, uvqk, *activated);
  const AttentionProblem problem = problem_of(c.attention);
  if (!a) a.emplace(attend(problem, uvqk, c.columns(kU)));

  Tensor grad_uvqk = Tensor::empty(uvqk.shape(), uvqk.dtype(), uvqk.device());
  const Tensor grad_a = Tensor::empty(a->shape(), uvqk.dtype(), uvqk.device());
  NormBwdParams params;
  params.problem = gate_problem(c, uvqk, *a);
  NormGradients norm(params.problem, need_weight_grad, uvqk);
  BiasGradients bias(c.attention, need_bias_grad);
  params.grad_out = rows_from(grad_out);
  params.grad_x = rows_from(grad_a);
  params.grad_u = rows_from(grad_uvqk, c.first_column(kU));
  norm.ask(params);
  launch_norm(params, uvqk.device());
  attend_bwd(c, problem, grad_a, grad_uvqk, bias, deterministic);
  silu_bwd(c, uvqk, grad_uvqk);
  give_back(stack, {&grad_uvqk, &norm.weight, &norm.bias, &bias.dense, &bias.position, &bias.time});
}

}  // namespace hstu_ops
