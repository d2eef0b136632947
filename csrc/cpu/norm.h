// The norm of a row, forward and backward, with or without a gate. One row at a time goes through scratch memory that
// stays in the first-level cache.
#pragma once

#include "core/silu.h"
#include "cpu/convert.h"
#include "cpu/pointwise.h"

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

template <class C>
HSTU_INLINE C lanes_sum(Vec<C> v) {
  C total = 0;
  for (int i = 0; i < kLanes<C>; ++i) total += v[i];
  return total;
}

// sum of f(x[i], y[i]), f taking vectors and numbers alike.
template <class C, class F>
HSTU_INLINE C sum_of(const C* x, const C* y, int n, const F& f) {
  constexpr int L = kLanes<C>;
  Vec<C> a{}, b{};
  int i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    a += f(load(x + i), load(y + i));
    b += f(load(x + i + L), load(y + i + L));
  }
  C total = lanes_sum<C>(a + b);
  for (; i < n; ++i) total += f(x[i], y[i]);
  return total;
}

template <class C>
HSTU_INLINE C square_root(C x) {
  if constexpr (sizeof(C) == sizeof(float)) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

template <class C>
class NormRows {
 public:
  NormRows(const NormProblem& problem, void* memory) : p_(problem), padded_(padded<C>(problem.columns)) {
    Arena arena{static_cast<char*>(memory)};
    s_.layout(arena, problem.columns);
  }

  void forward(const Rows& out, int64_t row) const {
    load_inputs(row);
    normalise_row();
    if (!p_.u) return put(out, row, 0, s_.z);
    for (int c = 0; c < p_.columns; ++c) s_.product[c] = s_.z[c] * s_.gate[c];
    if (p_.concat) {
      for (const Section section : {Section::kGate, Section::kInput}) {
        const C* from = section == Section::kGate ? s_.gate : s_.x;
        for (int c = 0; c < p_.columns; ++c) s_.grad_z[c] = from[c];
        drop(row, section, s_.grad_z);
        put(out, row, static_cast<int>(section), s_.grad_z);
      }
    }
    drop(row, Section::kProduct, s_.product);
    put(out, row, p_.concat ? 2 : 0, s_.product);
  }

  // Adds to the sums, if there are any.
  void backward(const NormBwdParams& params, int64_t row, double* sums) const {
    load_inputs(row);
    load_grads(params.grad_out, row);
    C rstd[1];
    const int width = p_.width();
    for (int g = 0; g < p_.groups; ++g) {
      const int at = g * width;
      normalise(at, width, rstd);
      gate_grads(at, width);
      if (sums) add_sums(at, width, sums);
      input_grads(at, width, rstd[0]);
    }
    put(params.grad_x, row, 0, s_.grad_z);
    if (!p_.u) return;
    if (p_.silu_u) {
      for (int c = 0; c < padded_; c += kLanes<C>) {
        const Vec<C> u = load(s_.u + c);
        store(s_.grad_u + c, load(s_.grad_u + c) * silu_grad(u, sigmoid<C>(u)));
      }
    }
    put(params.grad_u, row, 0, s_.grad_u);
  }

 private:
  void load_inputs(int64_t row) const {
    get(p_.x, row, 0, s_.x);
    if (!p_.u) return;
    get(p_.u, row, 0, s_.u);
    for (int c = 0; c < padded_; c += kLanes<C>) {
      const Vec<C> u = load(s_.u + c);
      store(s_.gate + c, p_.silu_u ? silu(u, sigmoid<C>(u)) : u);
    }
  }

  void load_grads(const Rows& grad_out, int64_t row) const {
    if (p_.u && p_.concat) {
      get(grad_out, row, 0, s_.grad_direct_u);
      get(grad_out, row, 1, s_.grad_direct_x);
      drop(row, Section::kGate, s_.grad_direct_u);
      drop(row, Section::kInput, s_.grad_direct_x);
    }
    get(grad_out, row, p_.u && p_.concat ? 2 : 0, s_.product);
    if (p_.u) drop(row, Section::kProduct, s_.product);
  }

  void normalise_row() const {
    C rstd[1];
    const int width = p_.width();
    for (int g = 0; g < p_.groups; ++g) normalise(g * width, width, rstd);
  }

  void normalise(int at, int width, C* rstd) const {
    const C* x = s_.x + at;
    const C mean = sum_of(x, x, width, [](auto a, auto) { return a; }) / width;
    const C square = sum_of(x, x, width, [mean](auto a, auto) { return (a - mean) * (a - mean); });
    *rstd = 1 / square_root<C>(square / width + static_cast<C>(p_.eps));
    const C factor = *rstd;
    const C *weight = static_cast<const C*>(p_.weight), *bias = static_cast<const C*>(p_.bias);
    C* __restrict normed = s_.normed + at, * __restrict z = s_.z + at;
    for (int c = 0; c < width; ++c) normed[c] = z[c] = (x[c] - mean) * factor;
    if (weight) {
      for (int c = 0; c < width; ++c) z[c] *= weight[at + c];
    }
    if (bias) {
      for (int c = 0; c < width; ++c) z[c] += bias[at + c];
    }
  }

  // grad_u and grad_z, of silu(u) and of the norm's result.
  void gate_grads(int at, int width) const {
    const C *grad = s_.product + at, *z = s_.z + at, *gate = s_.gate + at, *direct = s_.grad_direct_u + at;
    C* __restrict grad_u = s_.grad_u + at, * __restrict grad_z = s_.grad_z + at;
    if (!p_.u) {
      for (int c = 0; c < width; ++c) grad_z[c] = grad[c];
      return;
    }
    for (int c = 0; c < width; ++c) grad_u[c] = grad[c] * z[c];
    for (int c = 0; c < width; ++c) grad_z[c] = grad[c] * gate[c];
    if (p_.concat) {
      for (int c = 0; c < width; ++c) grad_u[c] += direct[c];
    }
  }

  void add_sums(int at, int width, double* sums) const {
    double* __restrict weight = sums + at, * __restrict bias = sums + p_.columns + at;
    const C *grad_z = s_.grad_z + at, *normed = s_.normed + at;
    for (int c = 0; c < width; ++c) weight[c] += grad_z[c] * normed[c];
    for (int c = 0; c < width; ++c) bias[c] += grad_z[c];
  }

  // grad_z becomes the gradient of x.
  void input_grads(int at, int width, C rstd) const {
    const C* weight = static_cast<const C*>(p_.weight);
    const C *normed = s_.normed + at, *direct = s_.grad_direct_x + at;
    C* __restrict grad = s_.grad_z + at;
    if (weight) {
      for (int c = 0; c < width; ++c) grad[c] *= weight[at + c];
    }
    const C mean = sum_of(grad, normed, width, [](auto a, auto) { return a; }) / width;
    const C slope = sum_of(grad, normed, width, [](auto a, auto b) { return a * b; }) / width;
    for (int c = 0; c < width; ++c) grad[c] = rstd * (grad[c] - mean - normed[c] * slope);
    if (p_.u && p_.concat) {
      for (int c = 0; c < width; ++c) grad[c] += direct[c];
    }
  }

  void drop(int64_t row, Section section, C* values) const {
    if (!p_.dropout) return;
    const DropoutParams& d = p_.dropout;
    const RandomWords state = dropout_state(static_cast<uint64_t>(d.seed_values ? *d.seed_values : d.seed));
    const C scale = static_cast<C>(d.scale);
    for (int c = 0; c < padded_; c += 8) {
      const RandomWords words = random_words(state, static_cast<uint64_t>(row), static_cast<uint32_t>(c / 8), section);
      for (int i = 0; i < 8; ++i) values[c + i] = words.number(i) >= d.threshold ? values[c + i] * scale : C(0);
    }
  }

  View section_of(const Rows& rows, int section) const {
    const size_t size = p_.dtype == DType::kFloat64 ? 8 : p_.dtype == DType::kFloat32 ? 4 : 2;
    return {static_cast<char*>(rows.data) + size * section * p_.columns, rows.row_stride, 0};
  }
  void get(const Rows& rows, int64_t row, int section, C* to) const {
    load_row(p_.dtype, section_of(rows, section), row, 0, p_.columns, C(1), to, padded_);
  }
  void put(const Rows& rows, int64_t row, int section, const C* from) const {
    store_row(p_.dtype, section_of(rows, section), row, 0, p_.columns, C(1), from);
  }

  const NormProblem& p_;
  const int padded_;
  NormScratch<C> s_;
};

}  // namespace
}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
