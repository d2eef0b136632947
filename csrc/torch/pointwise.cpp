// layer_norm, silu_split and norm_gate as torch ops, forward and backward.
#include "torch/ops.h"
#include "torch/pointwise_arguments.h"

namespace hstu_ops {
namespace {

const void* affine(const std::optional<Tensor>& tensor, const char* argument, int64_t columns, const Tensor& x,
                   const char* like) {
  if (!tensor) return nullptr;
  expect_shape(*tensor, argument, {columns}, "[D]");
  expect_dtype(*tensor, argument, {accumulation_dtype(x.dtype())});
  expect_device(*tensor, argument, x.device(), like);
  expect_rows(*tensor, argument);
  return tensor->data();
}

bool continues(const Rows& last, const Rows& next, size_t bytes) {
  if (!last || !next) return !last && !next;
  return static_cast<char*>(last.data) + bytes == next.data && last.row_stride == next.row_stride;
}

// The members stand in the order of SILU_OPTIONS in library.cpp.
struct SiluArguments {
  static constexpr uint64_t kCount = 8;

  explicit SiluArguments(Arguments& next) noexcept {
    for (int64_t& size : sizes) size = next.integer();
    for (bool& one : silu) one = next.boolean();
  }

  int64_t sizes[4];
  bool silu[4];

  SiluParams params(const Tensor& uvqk) const {
    expect_matrix(uvqk, "uvqk");
    SiluParams p;
    p.dtype = expect_float(uvqk, "uvqk");
    p.rows = uvqk.size(0);
    int64_t sum = 0;
    for (const int64_t size : sizes) {
      expect(size >= 0, "sizes", "at least 0", std::to_string(size));
      sum += size;
    }
    expect(sum == uvqk.size(1), "sizes", "a sum of " + std::to_string(uvqk.size(1)), std::to_string(sum));
    return p;
  }
};

// The arguments of norm_gate_fwd, which norm_gate_bwd repeats.
struct NormGateArguments {
  static constexpr uint64_t kCount = 3 + GateArguments::kCount;

  explicit NormGateArguments(Arguments& arguments) noexcept : next(arguments) {}

  Arguments& next;
  Tensor a = next.tensor();
  Tensor u = next.tensor();
  bool silu_u = next.boolean();
  GateArguments gate{next};

  int64_t out_columns() const { return a.size(1) * (gate.concat ? 3 : 1); }
  NormProblem problem() const {
    NormProblem p = norm_problem(a, "a", gate.weight, gate.bias, gate.groups, gate.eps);
    expect_matrix(u, "u", a.size(0), a.size(1), a, "a");
    p.u = rows_from(u);
    p.silu_u = silu_u;
    p.concat = gate.concat;
    p.dropout = gate.dropout_params(a.device());
    return p;
  }
};

}  // namespace

DropoutParams GateArguments::dropout_params(Device device) const {
  expect(dropout >= 0 && dropout < 1, "dropout", "at least 0 and less than 1", std::to_string(dropout));
  DropoutParams p;
  p.threshold = static_cast<uint32_t>(std::nearbyint(dropout * 0x1p15));
  p.scale = 1 / (1 - dropout);
  p.seed = seed;
  if (seed_values) {
    expect_shape(*seed_values, "seed", {1}, "[1]");
    expect_dtype(*seed_values, "seed", {abi::aoti_torch_dtype_int64()});
    expect_device(*seed_values, "seed", device, "a");
    p.seed_values = static_cast<const int64_t*>(seed_values->data());
  }
  return p;
}

NormProblem norm_problem(const Tensor& x, const char* argument, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& bias, int64_t groups, double eps) {
  expect_matrix(x, argument);
  NormProblem p;
  p.dtype = expect_float(x, argument);
  p.rows = x.size(0);
  p.columns = int_size(x.size(1), argument);
  expect(groups >= 1 && p.columns % groups == 0, "groups", "a divisor of " + std::to_string(p.columns),
         std::to_string(groups));
  p.groups = static_cast<int>(groups);
  p.eps = eps;
  p.weight = affine(weight, "weight", p.columns, x, argument);
  p.bias = affine(bias, "bias", p.columns, x, argument);
  p.x = rows_from(x);
  return p;
}

void launch_norm(const NormFwdParams& params, Device device) {
  launch(params, device, {cpu::norm_fwd_workspace, cpu::norm_fwd, cuda::norm_fwd_workspace, cuda::norm_fwd});
}
void launch_norm(const NormBwdParams& params, Device device) {
  launch(params, device, {cpu::norm_bwd_workspace, cpu::norm_bwd, cuda::norm_bwd_workspace, cuda::norm_bwd});
}
void launch_silu_fwd(const SiluParams& params, Device device) {
  launch(params, device, {cpu::silu_workspace, cpu::silu_fwd, cuda::silu_workspace, cuda::silu_fwd});
}
void launch_silu_bwd(const SiluParams& params, Device device) {
  launch(params, device, {cpu::silu_workspace, cpu::silu_bwd, cuda::silu_workspace, cuda::silu_bwd});
}

void add_part(SiluParams& params, const SiluPart& part) {
  if (part.columns == 0) return;
  if (params.count > 0) {
    SiluPart& last = params.parts[params.count - 1];
    const size_t bytes = static_cast<size_t>(last.columns) * element_size(params.dtype);
    if (last.activate == part.activate && continues(last.x, part.x, bytes) && continues(last.y, part.y, bytes) &&
        continues(last.grad_out, part.grad_out, bytes) && continues(last.grad_x, part.grad_x, bytes)) {
      last.columns += part.columns;
      return;
    }
  }
  params.parts[params.count++] = part;
}

void layer_norm_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, 4);
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const std::optional<Tensor> weight = arguments.optional_tensor(), bias = arguments.optional_tensor();
  NormFwdParams params;
  params.problem = norm_problem(x, "x", weight, bias, 1, arguments.number());
  Tensor out = Tensor::empty(x.shape(), x.dtype(), x.device());
  params.out = rows_from(out);
  launch_norm(params, x.device());
  give_back(stack, {&out});
}

void layer_norm_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, 5);
  Arguments arguments(stack);
  const Tensor grad_out = arguments.tensor(), x = arguments.tensor();
  const std::optional<Tensor> weight = arguments.optional_tensor();
  const double eps = arguments.number();
  NormBwdParams params;
  params.problem = norm_problem(x, "x", weight, std::nullopt, 1, eps);
  expect_matrix(grad_out, "grad_out", x.size(0), x.size(1), x, "x");
  Tensor grad_x = Tensor::empty(x.shape(), x.dtype(), x.device());
  NormGradients grads(params.problem, arguments.boolean(), x);
  params.grad_out = rows_from(grad_out);
  params.grad_x = rows_from(grad_x);
  grads.ask(params);
  launch_norm(params, x.device());
  give_back(stack, {&grad_x, &grads.weight, &grads.bias});
}

void silu_split_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, 1 + SiluArguments::kCount);
  Arguments arguments(stack);
  const Tensor uvqk = arguments.tensor();
  const SiluArguments options(arguments);
  SiluParams params = options.params(uvqk);
  Tensor out = Tensor::empty(uvqk.shape(), uvqk.dtype(), uvqk.device());
  int64_t first = 0;
  for (int i = 0; i < 4; first += options.sizes[i++]) {
    SiluPart part;
    part.x = rows_from(uvqk, first);
    part.y = rows_from(out, first);
    part.columns = options.sizes[i];
    part.activate = options.silu[i];
    add_part(params, part);
  }
  launch_silu_fwd(params, uvqk.device());
  give_back(stack, {&out});
}

void silu_split_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, 5 + SiluArguments::kCount);
  Arguments arguments(stack);
  const std::optional<Tensor> grads[4] = {arguments.optional_tensor(), arguments.optional_tensor(),
                                          arguments.optional_tensor(), arguments.optional_tensor()};
  const Tensor uvqk = arguments.tensor();
  const SiluArguments options(arguments);
  SiluParams params = options.params(uvqk);
  Tensor grad_x = Tensor::empty(uvqk.shape(), uvqk.dtype(), uvqk.device());
  const char* const names[4] = {"grad_u", "grad_v", "grad_q", "grad_k"};
  int64_t first = 0;
  for (int i = 0; i < 4; first += options.sizes[i++]) {
    if (grads[i]) expect_matrix(*grads[i], names[i], uvqk.size(0), options.sizes[i], uvqk, "uvqk");
    SiluPart part;
    part.x = rows_from(uvqk, first);
    part.grad_x = rows_from(grad_x, first);
    if (grads[i]) part.grad_out = rows_from(*grads[i]);
    part.columns = options.sizes[i];
    part.activate = options.silu[i];
    add_part(params, part);
  }
  launch_silu_bwd(params, uvqk.device());
  give_back(stack, {&grad_x});
}

void norm_gate_fwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, NormGateArguments::kCount);
  Arguments arguments(stack);
  const NormGateArguments g(arguments);
  NormFwdParams params;
  params.problem = g.problem();
  Tensor out = Tensor::empty({g.a.size(0), g.out_columns()}, g.a.dtype(), g.a.device());
  params.out = rows_from(out);
  launch_norm(params, g.a.device());
  give_back(stack, {&out});
}

void norm_gate_bwd_op(abi::Value* stack, uint64_t num_inputs, uint64_t) {
  expect_arguments(num_inputs, NormGateArguments::kCount + 2);
  Arguments arguments(stack);
  const Tensor grad_out = arguments.tensor();
  const NormGateArguments g(arguments);
  const bool need_weight_grad = arguments.boolean();
  NormBwdParams params;
  params.problem = g.problem();
  expect_matrix(grad_out, "grad_out", g.a.size(0), g.out_columns(), g.a, "a");
  Tensor grad_a = Tensor::empty(g.a.shape(), g.a.dtype(), g.a.device());
  Tensor grad_u = Tensor::empty(g.a.shape(), g.a.dtype(), g.a.device());
  NormGradients grads(params.problem, need_weight_grad, g.a);
  params.grad_out = rows_from(grad_out);
  params.grad_x = rows_from(grad_a);
  params.grad_u = rows_from(grad_u);
  grads.ask(params);
  launch_norm(params, g.a.device());
  give_back(stack, {&grad_a, &grad_u, &grads.weight, &grads.bias});
}

}  // namespace hstu_ops
