// Attention on processors: checks the contents of the offsets, cuts the problem into tasks, longest first, and runs
// them on all threads. The arithmetic is in attention_isa.cpp.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/content.h"
#include "core/jagged.h"
#include "cpu/parallel.h"
#include "cpu/work.h"

namespace hstu_ops {
namespace cpu {
namespace {

constexpr int kFwdRows = 512;      // query rows of a task: enough to pay for transposing the keys
constexpr int kFwdTasks = 64;      // below this tasks get fewer rows
constexpr int kMaxParts = 8;       // of a sequence's columns in the backward
constexpr int kBwdTasks = 16;      // below this the longest sequences are split
constexpr int kLanesWanted = 128;  // lanes that collect table gradients; bounds memory, not correctness

const Kernels* find_kernels() {
  const char* wanted = std::getenv("HSTU_OPS_ISA");
  const auto usable = [&](const Kernels& k) { return !wanted || !std::strcmp(wanted, k.name); };
#ifdef HSTU_X86
  __builtin_cpu_init();
  if (usable(avx512::kernels) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma"))
    return &avx512::kernels;
  if (usable(avx2::kernels) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return &avx2::kernels;
#endif
  return usable(generic::kernels) ? &generic::kernels : nullptr;
}

const Kernels* kernels() {
  static const Kernels* const found = find_kernels();
  return found;
}

size_t element_size(const AttentionProblem& p) { return p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

size_t rounded(size_t bytes) { return (bytes + kMaxVectorBytes - 1) / kMaxVectorBytes * kMaxVectorBytes; }

// Scores computed for rows [row_begin, row_end) of the mask x columns [col_begin, col_end), in tiles' granularity.
double cost_of(const Mask& mask, int row_begin, int row_end, int col_begin, int col_end) {
  double cost = 1;  // an empty sequence's tasks must be there too
  for (int m = row_begin; m < row_end; m += kBlockRows) {
    const int end = std::min(m + kBlockRows, row_end);
    const RowSpans spans = mask.rows(m, end);
    for (const Interval& part : {spans.prefix, spans.window, spans.group})
      cost += double(end - m) * std::max(std::min(part.hi, col_end) - std::max(part.lo, col_begin), 0);
  }
  return cost;
}

struct Unit {  // one task for each head
  int sequence, begin, end, part;
  double cost;
};

void longest_first(std::vector<Unit>& units) {
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
}

Task task_of(const Unit& unit, int head) { return {unit.sequence, head, unit.begin, unit.end, unit.part}; }

double total_cost(const std::vector<Unit>& units, const AttentionProblem& p) {
  double cost = 0;
  for (const Unit& unit : units) cost += unit.cost;
  return cost * p.heads * (p.dim_qk + p.dim_v);
}

int fwd_rows(const AttentionProblem& p) {
  int rows = kFwdRows;
  while (rows > kBlockRows && p.jagged.total_q * p.heads < int64_t{rows} * kFwdTasks) rows /= 2;
  return rows;
}

std::vector<Unit> fwd_units(const AttentionProblem& p) {
  std::vector<Unit> units;
  const int rows = fwd_rows(p);
  for (int b = 0; b < p.jagged.batch; ++b) {
    const Sequence s = load_sequence(p.jagged, p.mask, b);
    for (int r = 0; r < s.num_q; r += rows) {
      const int end = std::min(r + rows, s.num_q);
      units.push_back({b, r, end, 0, cost_of(s.mask, s.first_row + r, s.first_row + end, 0, s.mask.len)});
    }
  }
  longest_first(units);
  return units;
}

Limits limits_of(const AttentionProblem& p, bool backward) {
  Limits limits{1, 1};
  for (int b = 0; b < p.jagged.batch; ++b) {
    const Sequence s = load_sequence(p.jagged, p.mask, b);
    limits.rows = std::max(limits.rows, backward ? s.num_q : std::min(s.num_q, fwd_rows(p)));
    limits.cols = std::max(limits.cols, s.mask.len);
  }
  return limits;
}

template <template <class> class Scratch>
size_t scratch_size(const AttentionProblem& p, const Limits& limits) {
  Arena arena{nullptr};
  if (p.dtype == DType::kFloat64) {
    Scratch<double>().layout(arena, p, limits);
  } else {
    Scratch<float>().layout(arena, p, limits);
  }
  return arena.used;
}

// Tasks of the backward and the lanes that run them.
struct BwdPlan {
  Limits limits;
  int part_cols = 0;  // columns of a part; 0: sequences are not split
  int max_parts = 1;
  struct Lane {
    std::vector<Task> tasks;
    double cost = 0;
    int head = 0;
  };
  std::vector<Lane> lanes;
  double work = 0;                                                       // multiplications
  size_t scratch = 0, position_size = 0, time_size = 0, split_size = 0;  // bytes; the tables' of one lane

  int parts(int cols) const { return part_cols ? std::max(ceil_div(cols, part_cols), 1) : 1; }
  size_t workspace(int threads) const {
    return scratch * threads + lanes.size() * (position_size + time_size) + split_size;
  }
};

void split_columns(const AttentionProblem& p, BwdPlan& plan) {
  double total = 0, largest = 0;
  for (int b = 0; b < p.jagged.batch; ++b) {
    const Sequence s = load_sequence(p.jagged, p.mask, b);
    const double cost = cost_of(s.mask, s.first_row, s.mask.len, 0, s.mask.len);
    total += cost * p.heads;
    largest = std::max(largest, cost);
  }
  const int parts = std::min<double>(kMaxParts, std::ceil(kBwdTasks * largest / std::max(total, 1.0)));
  if (parts <= 1) return;
  plan.part_cols = ceil_div(ceil_div(plan.limits.cols, parts), kBlockCols) * kBlockCols;
  plan.max_parts = plan.parts(plan.limits.cols);
}

std::vector<Unit> bwd_units(const AttentionProblem& p, const BwdPlan& plan) {
  std::vector<Unit> units;
  for (int b = 0; b < p.jagged.batch; ++b) {
    const Sequence s = load_sequence(p.jagged, p.mask, b);
    for (int part = 0; part < plan.parts(s.mask.len) && s.mask.len > 0; ++part) {
      const int begin = part * plan.part_cols,
                end = plan.part_cols ? std::min(begin + plan.part_cols, s.mask.len) : s.mask.len;
      units.push_back({b, begin, end, part, cost_of(s.mask, s.first_row, s.mask.len, begin, end)});
    }
  }
  longest_first(units);
  return units;
}

// Which tasks may not run at the same time follows from what they share: a table's gradient needs a copy a lane, so
// there are few lanes, one head's each; a dense bias shared by sequences or heads has one gradient, so tasks that add
// to the same entries (same head, same part of the columns) share a lane; else every task is a lane of its own.
void fill_lanes(const AttentionBwdParams& params, BwdPlan& plan) {
  const AttentionProblem& p = params.problem;
  const std::vector<Unit> units = bwd_units(p, plan);
  plan.work = 2.5 * total_cost(units, p);
  const bool tables = params.grad_position_weight || params.grad_time_weight;
  const bool shared_bias = params.grad_bias && (!p.dense.batch_stride || !p.dense.head_stride);
  const int per_head = std::max<int>(std::min<int64_t>(ceil_div(kLanesWanted, p.heads), units.size()), 1);
  if (tables) {
    plan.lanes.resize(size_t(per_head) * p.heads);
  } else if (shared_bias) {
    plan.lanes.resize(size_t(p.dense.batch_stride ? p.jagged.batch : 1) * (p.dense.head_stride ? p.heads : 1) *
                      plan.max_parts);
  } else {
    plan.lanes.resize(units.size() * p.heads);
  }
  std::vector<double> load(per_head);
  size_t next = 0;
  for (const Unit& unit : units) {
    const size_t lightest = std::min_element(load.begin(), load.end()) - load.begin();
    load[lightest] += unit.cost;
    for (int head = 0; head < p.heads; ++head) {
      size_t lane = next++;
      if (tables) {
        lane = lightest * p.heads + head;
      } else if (shared_bias) {
        lane = ((p.dense.batch_stride ? unit.sequence : 0) * size_t(p.dense.head_stride ? p.heads : 1) +
                (p.dense.head_stride ? head : 0)) *
                   plan.max_parts +
               unit.part;
      }
      plan.lanes[lane].head = head;
      plan.lanes[lane].cost += unit.cost;
      plan.lanes[lane].tasks.push_back(task_of(unit, head));
    }
  }
  std::stable_sort(plan.lanes.begin(), plan.lanes.end(),
                   [](const BwdPlan::Lane& a, const BwdPlan::Lane& b) { return a.cost > b.cost; });
}

BwdPlan make_plan(const AttentionBwdParams& params) {
  const AttentionProblem& p = params.problem;
  const size_t size = element_size(p);
  BwdPlan plan;
  plan.limits = limits_of(p, true);
  split_columns(p, plan);
  fill_lanes(params, plan);
  plan.scratch = scratch_size<BwdScratch>(p, plan.limits);
  if (params.grad_position_weight) plan.position_size = rounded((2 * size_t(p.relative.positions) - 1) * size);
  if (params.grad_time_weight) plan.time_size = (size_t(p.relative.num_boundaries) + 1) * kMaxVectorBytes;
  if (plan.part_cols) {
    const size_t dqk = p.dtype == DType::kFloat64 ? padded<double>(p.dim_qk) : padded<float>(p.dim_qk);
    plan.split_size = rounded(size * plan.max_parts * p.heads * p.jagged.total_q * dqk);
  }
  return plan;
}

// table[head row][x] = sum over the lanes of that row, in the lanes' order, of their `copies` numbers each.
template <class C>
void sum_lanes(const BwdPlan& plan, const char* tables, size_t stride, int64_t row_size, int copies, int64_t rows,
               int64_t index, void* table) {
  const int64_t row = index / row_size, x = index % row_size;
  double total = 0;  // of thousands of numbers: in float it would lose what the lanes have kept
  for (size_t lane = 0; lane < plan.lanes.size(); ++lane) {
    if (rows > 1 && plan.lanes[lane].head != row) continue;
    const C* entry = reinterpret_cast<const C*>(tables + lane * stride) + x * copies;
    for (int c = 0; c < copies; ++c) total += entry[c];
  }
  static_cast<C*>(table)[index] = static_cast<C>(total);
}

Status sum_table(const Executor& executor, const AttentionProblem& p, const BwdPlan& plan, const char* tables,
                 size_t stride, int64_t row_size, int copies, bool per_head, void* table) {
  const int64_t rows = per_head ? p.heads : 1;
  constexpr int64_t kChunk = 512;
  return run_all(executor, (rows * row_size + kChunk - 1) / kChunk, double(rows * row_size) * plan.lanes.size(),
                 [&](int64_t chunk, int64_t) {
                   const auto sum = p.dtype == DType::kFloat64 ? sum_lanes<double> : sum_lanes<float>;
                   for (int64_t x = chunk * kChunk; x < std::min((chunk + 1) * kChunk, rows * row_size); ++x)
                     sum(plan, tables, stride, row_size, copies, rows, x, table);
                 });
}

Status clear_dense_grad(const Executor& executor, const AttentionBwdParams& params) {
  const DenseBiasParams& dense = params.problem.dense;
  const int64_t matrices =
      int64_t{dense.batch_stride ? params.problem.jagged.batch : 1} * (dense.head_stride ? params.problem.heads : 1);
  const size_t row = size_t(dense.size) * element_size(params.problem);
  return run_all(executor, matrices * dense.size, double(matrices) * dense.size * dense.size,
                 [&](int64_t x, int64_t) { std::memset(static_cast<char*>(params.grad_bias) + x * row, 0, row); });
}

}  // namespace

const char* isa() { return kernels() ? kernels()->name : "none"; }

size_t attention_fwd_workspace(const AttentionFwdParams& params, int threads) {
  return scratch_size<FwdScratch>(params.problem, limits_of(params.problem, false)) * threads;
}

size_t attention_bwd_workspace(const AttentionBwdParams& params, int threads) {
  return make_plan(params).workspace(threads);
}

Status attention_fwd(const AttentionFwdParams& params, void* workspace, const Executor& executor) {
  const AttentionProblem& p = params.problem;
  if (!kernels()) return {kNoKernels};
  if (Status status = check_content(p.jagged); !status.ok()) return status;
  const Limits limits = limits_of(p, false);
  const size_t scratch = scratch_size<FwdScratch>(p, limits);
  const std::vector<Unit> units = fwd_units(p);
  const auto run = p.dtype == DType::kFloat64 ? kernels()->fwd_f64 : kernels()->fwd_f32;
  return run_all(executor, int64_t(units.size()) * p.heads, total_cost(units, p), [&](int64_t item, int64_t worker) {
    run(params, task_of(units[item / p.heads], item % p.heads), limits,
        static_cast<char*>(workspace) + scratch * worker);
  });
}

Status attention_bwd(const AttentionBwdParams& params, void* workspace, const Executor& executor) {
  const AttentionProblem& p = params.problem;
  const bool f64 = p.dtype == DType::kFloat64;
  if (!kernels()) return {kNoKernels};
  if (Status status = check_content(p.jagged); !status.ok()) return status;
  const BwdPlan plan = make_plan(params);
  char* const scratch = static_cast<char*>(workspace);
  char* const position_tables = scratch + plan.scratch * executor.threads;
  char* const time_tables = position_tables + plan.position_size * plan.lanes.size();
  char* const split = plan.split_size ? time_tables + plan.time_size * plan.lanes.size() : nullptr;

  if (params.grad_bias)
    if (Status status = clear_dense_grad(executor, params); !status.ok()) return status;
  const auto run = f64 ? kernels()->bwd_f64 : kernels()->bwd_f32;
  Status status = run_all(executor, plan.lanes.size(), plan.work, [&](int64_t lane, int64_t worker) {
    SharedGrads shared{plan.position_size ? position_tables + plan.position_size * lane : nullptr,
                       plan.time_size ? time_tables + plan.time_size * lane : nullptr, split};
    std::memset(position_tables + plan.position_size * lane, 0, plan.position_size);
    std::memset(time_tables + plan.time_size * lane, 0, plan.time_size);
    for (const Task& task : plan.lanes[lane].tasks)
      run(params, task, plan.limits, shared, scratch + plan.scratch * worker);
  });
  if (status.ok() && split) {
    const auto merge = f64 ? kernels()->merge_f64 : kernels()->merge_f32;
    status = run_all(executor, p.jagged.batch, plan.work, [&](int64_t b, int64_t worker) {
      merge(params, b, plan.parts(load_sequence(p.jagged, p.mask, b).mask.len), split, scratch + plan.scratch * worker);
    });
  }
  if (status.ok() && plan.position_size)
    status = sum_table(executor, p, plan, position_tables, plan.position_size, 2 * int64_t{p.relative.positions} - 1, 1,
                       p.relative.position_head_stride, params.grad_position_weight);
  if (status.ok() && plan.time_size)
    status = sum_table(executor, p, plan, time_tables, plan.time_size, int64_t{p.relative.num_boundaries} + 1,
                       kMaxVectorBytes / element_size(p), p.relative.time_head_stride, params.grad_time_weight);
  return status;
}

}  // namespace cpu
}  // namespace hstu_ops
