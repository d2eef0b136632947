// The layer kernels on processors: cuts rows into tasks that do not depend on the number of threads, so neither does
// any bit of the result, and runs them on all threads. The arithmetic is in norm.h and pointwise_isa.cpp.
#include "cpu/pointwise.h"

#include <cstring>

#include "cpu/parallel.h"

namespace hstu_ops {
namespace cpu {
namespace {

constexpr int64_t kTaskElements = 1 << 15;  // of a task: what pays for taking it
constexpr int64_t kMaxSums = 64;            // tasks of a backward that sums: bounds its workspace
constexpr double kElementWork = 16;         // multiplications an element is worth

const PointwiseKernels* kernels() {
  static const PointwiseKernels* const found = []() -> const PointwiseKernels* {
#ifdef HSTU_X86
    for (const PointwiseKernels* k : {&avx512::pointwise_kernels, &avx2::pointwise_kernels}) {
      if (!std::strcmp(isa(), k->name)) return k;
    }
#endif
    return std::strcmp(isa(), generic::pointwise_kernels.name) ? nullptr : &generic::pointwise_kernels;
  }();
  return found;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t task_rows(int64_t columns) { return std::max<int64_t>(kTaskElements / std::max<int64_t>(columns, 1), 1); }

// run(begin, end, task, worker) over all rows, `rows_each` at a time.
template <class Run>
Status run_rows(const Executor& executor, int64_t rows, int64_t columns, int64_t rows_each, const Run& run) {
  return run_all(executor, divide_up(rows, rows_each), kElementWork * rows * columns,
                 [&](int64_t task, int64_t worker) {
                   run(task * rows_each, std::min((task + 1) * rows_each, rows), task, worker);
                 });
}

bool is_double(const NormProblem& p) { return p.dtype == DType::kFloat64; }

size_t scratch_size(const NormProblem& p) {
  Arena arena{nullptr};
  if (is_double(p)) {
    NormScratch<double>().layout(arena, p.columns);
  } else {
    NormScratch<float>().layout(arena, p.columns);
  }
  return arena.used;
}

int64_t bwd_rows(const NormBwdParams& params) {
  const NormProblem& p = params.problem;
  return params.grad_weight ? std::max(task_rows(p.columns), divide_up(p.rows, kMaxSums)) : task_rows(p.columns);
}

// Of one task. In double: thousands of rows in turn would leave little of a float.
size_t sums_size(const NormProblem& p) { return 2 * sizeof(double) * p.columns; }

size_t all_sums_size(const NormBwdParams& params) {
  return params.grad_weight ? sums_size(params.problem) * divide_up(params.problem.rows, bwd_rows(params)) : 0;
}

void add_sums(const NormBwdParams& params, const double* sums, int64_t tasks) {
  const int64_t columns = params.problem.columns;
  for (void* to : {params.grad_weight, params.grad_bias}) {
    for (int64_t c = 0; c < columns; ++c) {
      double total = 0;
      for (int64_t task = 0; task < tasks; ++task) total += sums[2 * task * columns + c];
      if (is_double(params.problem)) {
        static_cast<double*>(to)[c] = total;
      } else {
        static_cast<float*>(to)[c] = static_cast<float>(total);
      }
    }
    sums += columns;
  }
}

int64_t all_columns(const SiluParams& params) {
  int64_t columns = 0;
  for (int i = 0; i < params.count; ++i) columns += params.parts[i].columns;
  return columns;
}

Status silu(const SiluParams& params, const Executor& executor,
            void (*run)(const SiluParams&, int64_t begin, int64_t end)) {
  const int64_t columns = all_columns(params);
  return run_rows(executor, params.rows, columns, task_rows(columns),
                  [&](int64_t begin, int64_t end, int64_t, int64_t) { run(params, begin, end); });
}

}  // namespace

size_t norm_fwd_workspace(const NormFwdParams& params, int threads) { return scratch_size(params.problem) * threads; }

size_t norm_bwd_workspace(const NormBwdParams& params, int threads) {
  return scratch_size(params.problem) * threads + all_sums_size(params);
}

size_t silu_workspace(const SiluParams&, int) { return 0; }

Status norm_fwd(const NormFwdParams& params, void* workspace, const Executor& executor) {
  if (!kernels()) return {kNoKernels};
  const NormProblem& p = params.problem;
  const size_t scratch = scratch_size(p);
  const auto run = is_double(p) ? kernels()->norm_fwd_f64 : kernels()->norm_fwd_f32;
  return run_rows(executor, p.rows, p.columns, task_rows(p.columns),
                  [&](int64_t begin, int64_t end, int64_t, int64_t worker) {
                    run(params, begin, end, static_cast<char*>(workspace) + scratch * worker);
                  });
}

Status norm_bwd(const NormBwdParams& params, void* workspace, const Executor& executor) {
  if (!kernels()) return {kNoKernels};
  const NormProblem& p = params.problem;
  const size_t scratch = scratch_size(p);
  double* const sums = reinterpret_cast<double*>(static_cast<char*>(workspace) + scratch * executor.threads);
  const auto run = is_double(p) ? kernels()->norm_bwd_f64 : kernels()->norm_bwd_f32;
  const Status status = run_rows(executor, p.rows, p.columns, bwd_rows(params),
                                 [&](int64_t begin, int64_t end, int64_t task, int64_t worker) {
                                   run(params, begin, end, params.grad_weight ? sums + 2 * p.columns * task : nullptr,
                                       static_cast<char*>(workspace) + scratch * worker);
                                 });
  if (status.ok() && params.grad_weight) add_sums(params, sums, divide_up(p.rows, bwd_rows(params)));
  return status;
}

Status silu_fwd(const SiluParams& params, void*, const Executor& executor) {
  return kernels() ? silu(params, executor, kernels()->silu_fwd) : Status{kNoKernels};
}

Status silu_bwd(const SiluParams& params, void*, const Executor& executor) {
  return kernels() ? silu(params, executor, kernels()->silu_bwd) : Status{kNoKernels};
}

}  // namespace cpu
}  // namespace hstu_ops
