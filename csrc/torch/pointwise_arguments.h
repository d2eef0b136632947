// What the layer ops share: the norm's and the gate's options as they come off the stack, and columns of tensors as
// Rows.
#pragma once

#include <cmath>

#include "core/pointwise.h"
#include "torch/expect.h"
#include "torch/launch.h"

namespace hstu_ops {

inline size_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// The columns of a tensor [T, C] from `first` on; of one that we made, or that was checked.
inline Rows rows_from(const Tensor& tensor, int64_t first = 0) {
  const size_t size = element_size(expect_float(tensor, "tensor"));
  return {static_cast<char*>(tensor.data()) + size * static_cast<size_t>(first), tensor.stride(0)};
}

// A [T, C] tensor like `like`, which is named `like_name`.
inline void expect_matrix(const Tensor& tensor, const char* argument, int64_t rows, int64_t columns, const Tensor& like,
                          const char* like_name) {
  expect_shape(tensor, argument, {rows, columns}, "[T, columns]");
  expect_dtype(tensor, argument, {like.dtype()});
  expect_device(tensor, argument, like.device(), like_name);
  expect_rows(tensor, argument);
}

inline void expect_matrix(const Tensor& tensor, const char* argument) {
  expect(tensor.dim() == 2 && tensor.size(1) >= 1, argument, "shape [T, D]", tensor.shape());
  expect_rows(tensor, argument);
}

// The members stand in the order of GATE_OPTIONS in library.cpp.
struct GateArguments {
  static constexpr uint64_t kCount = 8;

  explicit GateArguments(Arguments& arguments) noexcept : next(arguments) {}

  Arguments& next;
  std::optional<Tensor> weight = next.optional_tensor();
  std::optional<Tensor> bias = next.optional_tensor();
  int64_t groups = next.integer();
  double eps = next.number();
  double dropout = next.number();
  std::optional<Tensor> seed_values = next.optional_tensor();
  int64_t seed = next.integer();
  bool concat = next.boolean();

  DropoutParams dropout_params(Device device) const;
};

// The norm of `x`, [T, D], checked; the gate is the caller's to add.
NormProblem norm_problem(const Tensor& x, const char* argument, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& bias, int64_t groups, double eps);

// Gradients of a norm's weight and bias: [D] where they are wanted, else empty.
struct NormGradients {
  NormGradients(const NormProblem& problem, bool wanted, const Tensor& like)
      : wanted(wanted), weight(make(problem, wanted, like)), bias(make(problem, wanted, like)) {}

  void ask(NormBwdParams& params) const {
    if (!wanted) return;
    params.grad_weight = weight.data();
    params.grad_bias = bias.data();
  }

  bool wanted;
  Tensor weight, bias;

 private:
  static Tensor make(const NormProblem& problem, bool wanted, const Tensor& like) {
    return Tensor::empty({wanted ? problem.columns : 0}, accumulation_dtype(like.dtype()), like.device());
  }
};

void launch_norm(const NormFwdParams& params, Device device);
void launch_norm(const NormBwdParams& params, Device device);
void launch_silu_fwd(const SiluParams& params, Device device);
void launch_silu_bwd(const SiluParams& params, Device device);

// Appends a part, or widens the last one where both are the same columns side by side.
void add_part(SiluParams& params, const SiluPart& part);

}  // namespace hstu_ops
