// The layer kernels of one instruction set: compiled once for each, in a namespace of its own (HSTU_ISA). Used by
// pointwise.cpp.
#include "cpu/norm.h"

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

template <class C>
void norm_fwd(const NormFwdParams& params, int64_t begin, int64_t end, void* scratch) {
  const NormRows<C> rows(params.problem, scratch);
  for (int64_t row = begin; row < end; ++row) rows.forward(params.out, row);
}

template <class C>
void norm_bwd(const NormBwdParams& params, int64_t begin, int64_t end, double* sums, void* scratch) {
  const NormRows<C> rows(params.problem, scratch);
  if (sums) {
    for (int64_t c = 0; c < 2 * int64_t{params.problem.columns}; ++c) sums[c] = 0;
  }
  for (int64_t row = begin; row < end; ++row) rows.backward(params, row, sums);
}

// to[0, n) = f(a[i], b[i]) of vectors; a and to may be the same.
template <class Type, class C, class F>
void map(const typename Type::Storage* a, const typename Type::Storage* b, typename Type::Storage* to, int64_t n,
         const F& f) {
  constexpr int L = kLanes<C>;
  int64_t i = 0;
  for (; i + L <= n; i += L) Type::store_vector(to + i, f(Type::load_vector(a + i), Type::load_vector(b + i)));
  if (i == n) return;
  typename Type::Storage tail_a[L] = {}, tail_b[L] = {};
  for (int j = 0; i + j < n; ++j) tail_a[j] = a[i + j], tail_b[j] = b[i + j];
  Type::store_vector(tail_a, f(Type::load_vector(tail_a), Type::load_vector(tail_b)));
  for (int j = 0; i + j < n; ++j) to[i + j] = tail_a[j];
}

template <class Type>
typename Type::Storage* row_of(const Rows& rows, int64_t row) {
  return static_cast<typename Type::Storage*>(rows.data) + row * rows.row_stride;
}

template <class Type, class C>
void silu_fwd_rows(const SiluParams& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int i = 0; i < params.count; ++i) {
      const SiluPart& part = params.parts[i];
      const auto* x = row_of<Type>(part.x, row);
      if (part.activate) {
        map<Type, C>(x, x, row_of<Type>(part.y, row), part.columns,
                     [](Vec<C> v, Vec<C>) { return silu(v, sigmoid<C>(v)); });
      } else {
        std::memcpy(row_of<Type>(part.y, row), x, part.columns * sizeof(typename Type::Storage));
      }
    }
  }
}

template <class Type, class C>
void silu_bwd_rows(const SiluParams& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int i = 0; i < params.count; ++i) {
      const SiluPart& part = params.parts[i];
      auto* to = row_of<Type>(part.grad_x, row);
      const size_t bytes = part.columns * sizeof(typename Type::Storage);
      if (!part.grad_out) {
        std::memset(to, 0, bytes);
      } else if (part.activate) {
        map<Type, C>(row_of<Type>(part.grad_out, row), row_of<Type>(part.x, row), to, part.columns,
                     [](Vec<C> g, Vec<C> v) { return g * silu_grad(v, sigmoid<C>(v)); });
      } else if (row_of<Type>(part.grad_out, row) != to) {
        std::memcpy(to, row_of<Type>(part.grad_out, row), bytes);
      }
    }
  }
}

void silu_fwd(const SiluParams& params, int64_t begin, int64_t end) {
  if (params.dtype == DType::kFloat64) return silu_fwd_rows<Float64, double>(params, begin, end);
  if (params.dtype == DType::kFloat32) return silu_fwd_rows<Float32, float>(params, begin, end);
  if (params.dtype == DType::kBFloat16) return silu_fwd_rows<BFloat16, float>(params, begin, end);
  silu_fwd_rows<Float16, float>(params, begin, end);
}

void silu_bwd(const SiluParams& params, int64_t begin, int64_t end) {
  if (params.dtype == DType::kFloat64) return silu_bwd_rows<Float64, double>(params, begin, end);
  if (params.dtype == DType::kFloat32) return silu_bwd_rows<Float32, float>(params, begin, end);
  if (params.dtype == DType::kBFloat16) return silu_bwd_rows<BFloat16, float>(params, begin, end);
  silu_bwd_rows<Float16, float>(params, begin, end);
}

constexpr const char* name_of_isa() {
#define HSTU_STRING_(x) #x
#define HSTU_STRING(x) HSTU_STRING_(x)
  return HSTU_STRING(HSTU_ISA);
}

}  // namespace

const PointwiseKernels pointwise_kernels = {name_of_isa(),    norm_fwd<float>, norm_fwd<double>, norm_bwd<float>,
                                            norm_bwd<double>, silu_fwd,        silu_bwd};

}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
