// Forward of one task: some query rows of one sequence and head against all its keys.
//
//   for each block of columns the rows keep anything of
//     copy K (transposed) and V to the accumulation type
//     for each strip of rows: S = Q K^T, P = keep * silu(S + bias), O += P V
//
// A strip of S never leaves the first-level cache. Strips skip the columns none of their rows keeps. Used by
// attention_isa.cpp.
#pragma once

#include "cpu/convert.h"
#include "cpu/score.h"

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

template <class C>
class Forward {
 public:
  Forward(const AttentionFwdParams& params, const Task& task, const FwdScratch<C>& scratch)
      : p_(params.problem),
        out_(params.out),
        task_(task),
        scratch_(scratch),
        seq_(load_sequence(p_.jagged, p_.mask, task.sequence)),
        bias_(p_, seq_, task.sequence, task.head, row(0), row(rows()), scratch.bias) {}

  void run() {
    load_queries();
    const RowSpans spans = seq_.mask.rows(row(0), row(rows()));
    for (int begin = 0; begin < seq_.mask.len; begin += kBlockCols) {
      const int end = min_int(begin + kBlockCols, seq_.mask.len);
      if (!spans.meets(begin, end)) continue;
      load_keys(begin, end);
      bias_.set_columns(begin, end);
      for (int r = 0; r < rows(); r += kStripRows) strip(r, min_int(r + kStripRows, rows()), begin, end);
    }
    store_output();
  }

 private:
  int rows() const { return task_.end - task_.begin; }
  int row(int r) const { return seq_.first_row + task_.begin + r; }  // of the mask
  int dqk() const { return padded<C>(p_.dim_qk); }
  int dv() const { return padded<C>(p_.dim_v); }

  void load_queries() {
    for (int r = 0; r < rows(); ++r)
      load_row(p_.dtype, p_.q, seq_.begin_q + task_.begin + r, task_.head, p_.dim_qk, static_cast<C>(p_.alpha),
               scratch_.q + int64_t{r} * dqk(), dqk());
    for (int64_t x = 0; x < int64_t{rows()} * dv(); ++x) scratch_.out[x] = 0;
  }

  // Rows past `end` stay as they are in k_t and v: finite or not, no strip reads them.
  void load_keys(int begin, int end) {
    for (int j = 0; j < end - begin; ++j) {
      load_row(p_.dtype, p_.k, seq_.begin_kv + begin + j, task_.head, p_.dim_qk, C(1), scratch_.k + j * dqk(), dqk());
      load_row(p_.dtype, p_.v, seq_.begin_kv + begin + j, task_.head, p_.dim_v, C(1), scratch_.v + j * dv(), dv());
    }
    transpose(scratch_.k, dqk(), end - begin, p_.dim_qk, scratch_.k_t, kBlockCols);
  }

  void strip(int r0, int r1, int begin, int end) {
    const StripColumns cols = strip_columns<C>(seq_.mask, row(r0), row(r1), begin, end);
    if (cols.empty()) return;
    const Tile<C> s{scratch_.s, kBlockCols};
    gemm<Operand::kAsIs, Output::kOverwrite, C>(
        r1 - r0, cols.vector_hi - cols.vector_lo, p_.dim_qk, {scratch_.q + int64_t{r0} * dqk(), dqk()},
        {scratch_.k_t + cols.vector_lo, kBlockCols}, {s.at(0, cols.vector_lo), s.ld});
    for (int r = r0; r < r1; ++r) {
      if (bias_.any()) bias_.add_row(row(r), cols.vector_lo, cols.vector_hi, s.at(r - r0, 0));
      activate(seq_.mask, row(r), begin, cols, s.at(r - r0, 0));
    }
    gemm<Operand::kAsIs, Output::kAccumulate, C>(r1 - r0, dv(), cols.hi - cols.lo, {s.at(0, cols.lo), s.ld},
                                                 {scratch_.v + cols.lo * dv(), dv()},
                                                 {scratch_.out + int64_t{r0} * dv(), dv()});
  }

  void store_output() const {
    for (int r = 0; r < rows(); ++r) {
      const int64_t at = seq_.begin_q + task_.begin + r;
      store_row(p_.dtype, out_, at, task_.head, p_.dim_v, row_scale<C>(p_.scale, task_.sequence, at),
                scratch_.out + int64_t{r} * dv());
    }
  }

  const AttentionProblem& p_;
  const View& out_;
  const Task& task_;
  const FwdScratch<C>& scratch_;
  const Sequence seq_;
  Bias<C> bias_;
};

}  // namespace
}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
