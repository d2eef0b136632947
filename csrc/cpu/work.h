// How an attention problem is cut into tasks, shared by the scheduler (attention.cpp) and the kernels. None of it
// depends on the number of threads or the instruction set, so neither does any bit of the result.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/launch.h"

namespace hstu_ops {
namespace cpu {

constexpr int kBlockCols = 64;  // columns of a tile
constexpr int kBlockRows = 64;  // rows of a tile in the backward; the strips of every instruction set fit
constexpr int kMaxVectorBytes = 64;

// Forward: rows [begin, end) of the queries of one sequence and head. Backward: columns [begin, end) of its keys, whose
// share of grad_q goes to part `part` of the split buffer, if there is one.
struct Task {
  int sequence, head;
  int begin, end;
  int part;
};

// Where the backward collects gradients that several tasks share; accumulation type, null where not wanted. A lane is a
// list of tasks that run one after another, so its tables need no lock and the order of its sums is fixed.
struct SharedGrads {
  void* position_weight;  // of this lane: [2 * positions - 1], added to
  void* time_weight;      // of this lane: [num_boundaries + 1][kMaxVectorBytes / size], added to
  void* split_grad_q;     // of all tasks: [parts][heads][total_q][padded dim_qk]
};

// Hands out 64-byte aligned pieces of one block of memory; over a null block it only counts.
struct Arena {
  char* base;
  size_t used = 0;

  template <class C>
  HSTU_HD C* take(int64_t count) {
    C* p = reinterpret_cast<C*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(C) + kMaxVectorBytes - 1) / kMaxVectorBytes * kMaxVectorBytes;
    return p;
  }
};

template <class C>
HSTU_HD int padded(int dim) {
  constexpr int kUnit = kMaxVectorBytes / sizeof(C);
  return (dim + kUnit - 1) / kUnit * kUnit;
}

struct Limits {  // of one problem
  int rows;      // query rows of a task
  int cols;      // keys of the longest sequence
};

// Scratch memory of one thread.
template <class C>
struct BiasScratch {
  C* position;       // weights by distance
  C* grad_position;  // gradients by distance
  int* col_position;
  int64_t* col_time;

  HSTU_HD void layout(Arena& arena, const AttentionProblem& p, const Limits& limits) {
    const int64_t distances = p.relative.position_weight ? int64_t{limits.rows} + limits.cols + 2 * kBlockCols : 0;
    position = arena.take<C>(distances);
    grad_position = arena.take<C>(distances);
    col_position = arena.take<int>(kBlockCols);
    col_time = arena.take<int64_t>(kBlockCols);
  }
};

template <class C>
struct FwdScratch {
  C *q, *out;      // [rows][padded dim]
  C *k, *k_t, *v;  // one block of columns: [cols][padded dim], k_t [dim][cols]
  C* s;            // one strip of scores
  BiasScratch<C> bias;

  HSTU_HD void layout(Arena& arena, const AttentionProblem& p, const Limits& limits) {
    const int64_t dqk = padded<C>(p.dim_qk), dv = padded<C>(p.dim_v);
    q = arena.take<C>(limits.rows * dqk);
    out = arena.take<C>(limits.rows * dv);
    k = arena.take<C>(kBlockCols * dqk);
    k_t = arena.take<C>(kBlockCols * dqk);
    v = arena.take<C>(kBlockCols * dv);
    s = arena.take<C>(kBlockRows * kBlockCols);
    bias.layout(arena, p, limits);
  }
};

template <class C>
struct BwdScratch {
  C *q, *grad_out, *grad_q;  // [rows][padded dim]
  C *k, *k_t, *v_t;          // one block of columns
  C *grad_k, *grad_v;        // [cols][padded dim]
  C *p, *ds;                 // tiles
  BiasScratch<C> bias;

  HSTU_HD void layout(Arena& arena, const AttentionProblem& problem, const Limits& limits) {
    const int64_t dqk = padded<C>(problem.dim_qk), dv = padded<C>(problem.dim_v);
    q = arena.take<C>(limits.rows * dqk);
    grad_out = arena.take<C>(limits.rows * dv);
    grad_q = arena.take<C>(limits.rows * dqk);
    k = arena.take<C>(kBlockCols * (dqk > dv ? dqk : dv));
    k_t = arena.take<C>(kBlockCols * dqk);
    v_t = arena.take<C>(kBlockCols * dv);
    grad_k = arena.take<C>(kBlockCols * dqk);
    grad_v = arena.take<C>(kBlockCols * dv);
    p = arena.take<C>(kBlockRows * kBlockCols);
    ds = arena.take<C>(kBlockRows * kBlockCols);
    bias.layout(arena, problem, limits);
  }
};

// What one instruction set offers.
struct Kernels {
  const char* name;
  void (*fwd_f32)(const AttentionFwdParams&, const Task&, const Limits&, void* scratch);
  void (*fwd_f64)(const AttentionFwdParams&, const Task&, const Limits&, void* scratch);
  void (*bwd_f32)(const AttentionBwdParams&, const Task&, const Limits&, const SharedGrads&, void* scratch);
  void (*bwd_f64)(const AttentionBwdParams&, const Task&, const Limits&, const SharedGrads&, void* scratch);
  // grad_q of the query rows of one sequence = alpha * sum over its parts of the split buffer.
  void (*merge_f32)(const AttentionBwdParams&, int sequence, int parts, const void* split_grad_q, void* scratch);
  void (*merge_f64)(const AttentionBwdParams&, int sequence, int parts, const void* split_grad_q, void* scratch);
};

namespace generic {
extern const Kernels kernels;
}
#ifdef HSTU_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace cpu
}  // namespace hstu_ops
