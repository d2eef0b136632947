// Backward of one task: some columns (keys) of one sequence and head against all its query rows.
//
//   copy Q and G = scale * dO to the accumulation type
//   for each block of columns
//     for each block of rows that keeps anything of it
//       for each strip of rows: S = Q K^T, dP = G V^T; P, dS from them; dQ += dS K
//       dV += P^T G, dK += dS^T Q
//
// One pass makes all five products; dQ is complete only after the last column, so it is summed in scratch memory of the
// length of the sequence. Used by attention_isa.cpp.
#pragma once

#include "cpu/convert.h"
#include "cpu/score.h"

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

template <class C>
class Backward {
 public:
  Backward(const AttentionBwdParams& params, const Task& task, const SharedGrads& shared, const BwdScratch<C>& scratch)
      : params_(params),
        p_(params.problem),
        task_(task),
        shared_(shared),
        scratch_(scratch),
        seq_(load_sequence(p_.jagged, p_.mask, task.sequence)),
        bias_(p_, seq_, task.sequence, task.head, seq_.first_row, seq_.mask.len, scratch.bias,
              static_cast<C*>(shared.time_weight)) {
    if (params.grad_bias) {
      const DenseBiasParams& dense = p_.dense;
      const int64_t matrix = int64_t{dense.size} * dense.size;
      const int64_t heads = dense.head_stride ? p_.heads : 1;
      grad_bias_ = static_cast<C*>(params.grad_bias) +
                   ((dense.batch_stride ? task.sequence : 0) * heads + (dense.head_stride ? task.head : 0)) * matrix;
    }
  }

  void run() {
    load_queries();
    if (shared_.position_weight) bias_.clear_position_grad();
    for (int begin = task_.begin; begin < task_.end; begin += kBlockCols) {
      const int end = min_int(begin + kBlockCols, task_.end);
      load_keys(begin, end);
      bias_.set_columns(begin, end);
      for (int r = 0; r < seq_.num_q; r += kTileRows) {
        const int r1 = min_int(r + kTileRows, seq_.num_q);
        if (seq_.mask.touches(row(r), row(r1), begin, end)) tile(r, r1, begin, end);
      }
      store_keys(begin, end);
    }
    if (!shared_.split_grad_q) store_queries();
    if (shared_.position_weight) bias_.flush_position_grad(static_cast<C*>(shared_.position_weight));
  }

 private:
  static constexpr int kTileRows = kBlockRows / kStripRows * kStripRows;

  int row(int r) const { return seq_.first_row + r; }  // of the mask
  int dqk() const { return padded<C>(p_.dim_qk); }
  int dv() const { return padded<C>(p_.dim_v); }
  C* q(int r) const { return scratch_.q + int64_t{r} * dqk(); }
  C* grad_out(int r) const { return scratch_.grad_out + int64_t{r} * dv(); }
  C* grad_q(int r) const {
    if (!shared_.split_grad_q) return scratch_.grad_q + int64_t{r} * dqk();
    return static_cast<C*>(shared_.split_grad_q) +
           ((int64_t{task_.part} * p_.heads + task_.head) * p_.jagged.total_q + seq_.begin_q + r) * dqk();
  }

  void load_queries() {
    for (int r = 0; r < seq_.num_q; ++r) {
      const int64_t at = seq_.begin_q + r;
      load_row(p_.dtype, p_.q, at, task_.head, p_.dim_qk, static_cast<C>(p_.alpha), q(r), dqk());
      load_row(p_.dtype, params_.grad_out, at, task_.head, p_.dim_v, row_scale<C>(p_.scale, task_.sequence, at),
               grad_out(r), dv());
    }
    for (int64_t x = 0; x < int64_t{seq_.num_q} * dqk(); ++x) grad_q(0)[x] = 0;
  }

  void load_keys(int begin, int end) {
    const int cols = end - begin;
    for (int j = 0; j < cols; ++j)
      load_row(p_.dtype, p_.v, seq_.begin_kv + begin + j, task_.head, p_.dim_v, C(1), scratch_.k + j * dv(), dv());
    transpose(scratch_.k, dv(), cols, p_.dim_v, scratch_.v_t, kBlockCols);
    for (int j = 0; j < cols; ++j)
      load_row(p_.dtype, p_.k, seq_.begin_kv + begin + j, task_.head, p_.dim_qk, C(1), scratch_.k + j * dqk(), dqk());
    transpose(scratch_.k, dqk(), cols, p_.dim_qk, scratch_.k_t, kBlockCols);
    for (int x = 0; x < cols * dqk(); ++x) scratch_.grad_k[x] = 0;
    for (int x = 0; x < cols * dv(); ++x) scratch_.grad_v[x] = 0;
  }

  void tile(int r0, int r1, int begin, int end) {
    StripColumns strips[kTileRows / kStripRows];
    for (int r = r0; r < r1; r += kStripRows)
      strips[(r - r0) / kStripRows] = strip(r, min_int(r + kStripRows, r1), r - r0, begin, end);
    // Columns in groups, each with the rows from the first to the last strip that keeps any of the group.
    for (int j = 0; j < end - begin;) {
      const int first = next_strip(strips, r1 - r0, j);
      int size = kStripRows;
      while (j + size < end - begin && next_strip(strips, r1 - r0, j + size) == first &&
             last_strip(strips, r1 - r0, j + size) == last_strip(strips, r1 - r0, j))
        size += kStripRows;
      size = min_int(size, end - begin - j);
      const int m0 = first * kStripRows, m1 = min_int((last_strip(strips, r1 - r0, j) + 1) * kStripRows, r1 - r0);
      if (m0 < m1) add_key_grads(r0, m0, m1, j, size);
      j += size;
    }
  }

  // First and last strip that keeps any of columns [j, j + kStripRows) of the tile; first > last if none does.
  static int next_strip(const StripColumns* strips, int rows, int j) {
    const int count = ceil_div(rows, kStripRows);
    int x = 0;
    while (x < count && !(strips[x].lo < j + kStripRows && j < strips[x].hi)) ++x;
    return x;
  }
  static int last_strip(const StripColumns* strips, int rows, int j) {
    int x = ceil_div(rows, kStripRows) - 1;
    while (x >= 0 && !(strips[x].lo < j + kStripRows && j < strips[x].hi)) --x;
    return x;
  }

  // Leaves P and dS of the strip in rows [at, ...) of the tiles, zero outside the columns it keeps, and adds to dQ.
  StripColumns strip(int r0, int r1, int at, int begin, int end) {
    const StripColumns cols = strip_columns<C>(seq_.mask, row(r0), row(r1), begin, end);
    const Tile<C> p{scratch_.p + int64_t{at} * kBlockCols, kBlockCols},
        ds{scratch_.ds + int64_t{at} * kBlockCols, kBlockCols};
    if (!cols.empty()) {
      const int lo = cols.vector_lo, width = cols.vector_hi - lo;
      gemm<Operand::kAsIs, Output::kOverwrite, C>(r1 - r0, width, p_.dim_qk, {q(r0), dqk()},
                                                  {scratch_.k_t + lo, kBlockCols}, {p.at(0, lo), p.ld});
      gemm<Operand::kAsIs, Output::kOverwrite, C>(r1 - r0, width, p_.dim_v, {grad_out(r0), dv()},
                                                  {scratch_.v_t + lo, kBlockCols}, {ds.at(0, lo), ds.ld});
    }
    for (int r = r0; r < r1; ++r) {
      C *s_row = p.at(r - r0, 0), *ds_row = ds.at(r - r0, 0);
      zero(s_row, ds_row, 0, cols.empty() ? kBlockCols : cols.vector_lo);
      if (cols.empty()) continue;
      zero(s_row, ds_row, cols.vector_hi, kBlockCols);
      if (bias_.any()) bias_.add_row(row(r), cols.vector_lo, cols.vector_hi, s_row);
      activate_grad(seq_.mask, row(r), begin, cols, s_row, ds_row);
      if (bias_.any())
        bias_.add_row_grad(row(r), cols.vector_lo, cols.vector_hi, ds_row, shared_.position_weight, grad_bias_);
    }
    if (!cols.empty())
      gemm<Operand::kAsIs, Output::kAccumulate, C>(r1 - r0, dqk(), cols.hi - cols.lo, {ds.at(0, cols.lo), ds.ld},
                                                   {scratch_.k + cols.lo * dqk(), dqk()}, {grad_q(r0), dqk()});
    return cols;
  }

  static void zero(C* a, C* b, int lo, int hi) {
    for (int j = lo; j < hi; j += kLanes<C>) {
      store(a + j, Vec<C>{});
      store(b + j, Vec<C>{});
    }
  }

  // dV, dK of columns [j, j + size) of the tile += their products with rows [m0, m1).
  void add_key_grads(int r0, int m0, int m1, int j, int size) {
    const Tile<const C> p{scratch_.p + int64_t{m0} * kBlockCols + j, kBlockCols},
        ds{scratch_.ds + int64_t{m0} * kBlockCols + j, kBlockCols};
    gemm<Operand::kTransposed, Output::kAccumulate, C>(size, dv(), m1 - m0, p, {grad_out(r0 + m0), dv()},
                                                       {scratch_.grad_v + j * dv(), dv()});
    gemm<Operand::kTransposed, Output::kAccumulate, C>(size, dqk(), m1 - m0, ds, {q(r0 + m0), dqk()},
                                                       {scratch_.grad_k + j * dqk(), dqk()});
  }

  void store_keys(int begin, int end) const {
    for (int j = begin; j < end; ++j) {
      const int64_t at = seq_.begin_kv + j;
      store_row(p_.dtype, params_.grad_k, at, task_.head, p_.dim_qk, C(1), scratch_.grad_k + (j - begin) * dqk());
      store_row(p_.dtype, params_.grad_v, at, task_.head, p_.dim_v, C(1), scratch_.grad_v + (j - begin) * dv());
    }
  }

  void store_queries() const {
    for (int r = 0; r < seq_.num_q; ++r)
      store_row(p_.dtype, params_.grad_q, seq_.begin_q + r, task_.head, p_.dim_qk, static_cast<C>(p_.alpha), grad_q(r));
  }

  const AttentionBwdParams& params_;
  const AttentionProblem& p_;
  const Task& task_;
  const SharedGrads& shared_;
  const BwdScratch<C>& scratch_;
  const Sequence seq_;
  Bias<C> bias_;
  C* grad_bias_ = nullptr;
};

// grad_q of one sequence from the parts its columns were split into; the sums of one row always run in the same order.
template <class C>
void merge_grad_q(const AttentionBwdParams& params, int sequence, int parts, const C* split, C* row) {
  const AttentionProblem& p = params.problem;
  const Sequence seq = load_sequence(p.jagged, p.mask, sequence);
  const int dqk = padded<C>(p.dim_qk);
  const int64_t part_size = int64_t{p.heads} * p.jagged.total_q * dqk;
  for (int64_t at = seq.begin_q; at < seq.begin_q + seq.num_q; ++at)
    for (int head = 0; head < p.heads; ++head) {
      const C* first = split + (head * p.jagged.total_q + at) * dqk;
      for (int d = 0; d < dqk; d += kLanes<C>) {
        Vec<C> total = load(first + d);
        for (int part = 1; part < parts; ++part) total += load(first + part * part_size + d);
        store(row + d, total);
      }
      store_row(p.dtype, params.grad_q, at, head, p.dim_qk, static_cast<C>(p.alpha), row);
    }
}

}  // namespace
}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
