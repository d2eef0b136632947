// The relative and dense bias of a strip of scores, and their gradients, found a row of a tile at a time: the same
// table entries as core/bias.h gives for each element. Position weights are copied once a task to an array by distance,
// so that a row reads a contiguous run of it; time is in time_bias.h.
#pragma once

#include "cpu/time_bias.h"

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

template <class C>
class Bias {
 public:
  // Rows [row_begin, row_end) of the mask against any column.
  Bias(const AttentionProblem& problem, const Sequence& sequence, int b, int head, int row_begin, int row_end,
       const BiasScratch<C>& scratch, C* grad_time = nullptr)
      : relative_(problem.relative),
        dense_(problem.dense),
        mask_(sequence.mask),
        scratch_(scratch),
        time_(problem.relative, sequence, head, scratch.col_time, grad_time) {
    if (relative_.position_weight) {
      position_weight_ = static_cast<const C*>(relative_.position_weight) + head * relative_.position_head_stride;
      first_distance_ = -mask_.position(row_end - 1);
      num_distances_ = mask_.position(mask_.len - 1) - mask_.position(row_begin) - first_distance_ + 1;
      for (int x = 0; x < num_distances_; ++x)
        scratch_.position[x] = position_weight_[position_index(0, x + first_distance_, relative_.positions)];
      for (int x = num_distances_; x < num_distances_ + kBlockCols; ++x) scratch_.position[x] = 0;
    }
    if (dense_.data)
      dense_data_ = static_cast<const C*>(dense_.data) + b * dense_.batch_stride + head * dense_.head_stride;
  }

  bool any() const { return position_weight_ || time_.any() || dense_data_; }

  void clear_position_grad() {
    for (int x = 0; x < num_distances_ + kBlockCols; ++x) scratch_.grad_position[x] = 0;
  }

  // Adds what clear_position_grad() .. add_row_grad() collected to a table of 2 * positions - 1.
  void flush_position_grad(C* table) const {
    for (int x = 0; x < num_distances_; ++x)
      table[position_index(0, x + first_distance_, relative_.positions)] += scratch_.grad_position[x];
  }

  // The tile's columns are [begin, end).
  void set_columns(int begin, int end) {
    begin_ = begin;
    end_ = end;
    if (position_weight_) {
      consecutive_ = begin >= mask_.shift() && end <= mask_.history + 1;
      for (int j = 0; j < kBlockCols && !consecutive_; ++j)
        scratch_.col_position[j] = mask_.position(min_int(begin + j, end - 1));
    }
    if (time_.any()) time_.set_columns(begin, end);
  }

  // s[j] += bias(i, begin + j) for columns [lo, hi) of the tile, both multiples of the vector length.
  HSTU_INLINE void add_row(int i, int lo, int hi, C* s) {
    if (position_weight_) add_position(i, lo, hi, s);
    if (time_.any()) time_.add_row(i, lo, hi, s);
    if (dense_data_) add_dense(i, lo, hi, s);
  }

  // Adds ds of the row that add_row() was last called for to the gradients; ds is 0 in columns the row does not keep.
  HSTU_INLINE void add_row_grad(int i, int lo, int hi, const C* ds, bool position, C* grad_bias) {
    if (position) add_position_grad(i, lo, hi, ds);
    if (time_.wants_grad()) time_.add_row_grad(lo, hi, ds);
    if (grad_bias) add_dense_grad(i, lo, hi, ds, grad_bias);
  }

 private:
  static constexpr int L = kLanes<C>;

  C* by_distance(C* array, int i) const { return array - first_distance_ - mask_.position(i); }

  void add_position(int i, int lo, int hi, C* s) const {
    const C* weights = by_distance(scratch_.position, i);
    if (consecutive_) {
      weights += begin_ - mask_.shift();
      for (int j = lo; j < hi; j += L) store(s + j, load(s + j) + load(weights + j));
    } else {
      for (int j = lo; j < hi; ++j) s[j] += weights[scratch_.col_position[j]];
    }
  }

  void add_position_grad(int i, int lo, int hi, const C* ds) const {
    C* grad = by_distance(scratch_.grad_position, i);
    if (consecutive_) {
      grad += begin_ - mask_.shift();
      for (int j = lo; j < hi; j += L) store(grad + j, load(grad + j) + load(ds + j));
    } else {
      for (int j = lo; j < hi; ++j) grad[scratch_.col_position[j]] += ds[j];
    }
  }

  // Columns of the tile, from lo on, that the dense bias has.
  int dense_end(int i, int hi) const { return i < dense_.size ? min_int(hi, dense_.size - begin_) : 0; }

  void add_dense(int i, int lo, int hi, C* s) const {
    const C* row = dense_data_ + i * dense_.row_stride + begin_;
    const int end = min_int(dense_end(i, hi), end_ - begin_);
    int j = lo;
    for (; j + L <= end; j += L) store(s + j, load(s + j) + load(row + j));
    for (; j < end; ++j) s[j] += row[j];
  }

  void add_dense_grad(int i, int lo, int hi, const C* ds, C* grad_bias) const {
    C* row = grad_bias + int64_t{i} * dense_.size + begin_;
    const int end = min_int(dense_end(i, hi), end_ - begin_);
    int j = lo;
    for (; j + L <= end; j += L) store(row + j, load(row + j) + load(ds + j));
    for (; j < end; ++j) row[j] += ds[j];
  }

  const RelativeBiasParams& relative_;
  const DenseBiasParams& dense_;
  const Mask& mask_;
  BiasScratch<C> scratch_;

  const C* position_weight_ = nullptr;
  int first_distance_ = 0, num_distances_ = 0;
  TimeBias<C> time_;
  const C* dense_data_ = nullptr;

  int begin_ = 0, end_ = 0;
  bool consecutive_ = false;  // positions of the tile's columns rise by one
};

}  // namespace
}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
