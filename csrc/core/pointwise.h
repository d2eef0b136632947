// What the layer kernels around the attention take, and who launches them: the norm of rows, with or without a gate,
// and SiLU on ranges of columns. Conventions are those of params.h and launch.h.
#pragma once

#include "core/dropout.h"
#include "core/launch.h"

namespace hstu_ops {

// [rows, columns] of the problem's dtype; columns are contiguous.
struct Rows {
  void* data = nullptr;
  int64_t row_stride = 0;

  HSTU_HD explicit operator bool() const { return data != nullptr; }
};

// norm(x) = (x - mean) / sqrt(variance + eps) * weight + bias, mean and variance over each group of a row. With a gate
// the result is dropout(norm(x) * u), or with concat dropout of [u, x, norm(x) * u]; u itself, or silu(u).
struct NormProblem {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int columns = 0, groups = 1;  // a group is columns / groups neighbours
  double eps = 0;
  const void* weight = nullptr;  // accumulation type, [columns]; absent: 1
  const void* bias = nullptr;    // accumulation type, [columns]; absent: 0
  Rows x;
  Rows u;  // the gate; absent: none, and the members below do not count
  bool silu_u = false;
  bool concat = false;
  DropoutParams dropout;

  HSTU_HD int width() const { return columns / groups; }
};

struct NormFwdParams {
  NormProblem problem;
  Rows out;  // [rows, columns], three times as wide with concat
};

struct NormBwdParams {
  NormProblem problem;
  Rows grad_out;
  Rows grad_x, grad_u;
  // Accumulation type, [columns]; both or none. Summed in an order that follows from the problem and the device.
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
};

// A range of columns: y = silu(x), or y = x.
struct SiluPart {
  Rows x;
  Rows y;         // forward: written
  Rows grad_out;  // backward: gradient of y; absent: zeros
  Rows grad_x;    // backward: written; may be grad_out
  int64_t columns = 0;
  bool activate = false;
};

struct SiluParams {
  static constexpr int kMaxParts = 4;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int count = 0;
  SiluPart parts[kMaxParts];
};

namespace cpu {
size_t norm_fwd_workspace(const NormFwdParams& params, int threads);
size_t norm_bwd_workspace(const NormBwdParams& params, int threads);
size_t silu_workspace(const SiluParams& params, int threads);
Status norm_fwd(const NormFwdParams& params, void* workspace, const Executor& executor);
Status norm_bwd(const NormBwdParams& params, void* workspace, const Executor& executor);
Status silu_fwd(const SiluParams& params, void* workspace, const Executor& executor);
Status silu_bwd(const SiluParams& params, void* workspace, const Executor& executor);
}  // namespace cpu

namespace cuda {
size_t norm_fwd_workspace(const NormFwdParams& params);
size_t norm_bwd_workspace(const NormBwdParams& params);
size_t silu_workspace(const SiluParams& params);
Status norm_fwd(const NormFwdParams& params, void* workspace, void* stream);
Status norm_bwd(const NormBwdParams& params, void* workspace, void* stream);
Status silu_fwd(const SiluParams& params, void* workspace, void* stream);
Status silu_bwd(const SiluParams& params, void* workspace, void* stream);
}  // namespace cuda

}  // namespace hstu_ops
