// The relative and dense bias of a strip of scores, and their gradients, found a row of a tile at a time: the same
// table entries as core/bias.h gives for each element.
//
// Position: weights are copied once a task to an array by distance, so that a row reads a contiguous run of it.
// Time: the bucket range of a row follows from the oldest and the newest key of the tile. Far from the diagonal that is
// one bucket; a few are told apart by comparing timestamps; many (or differences too wide for that) are looked up one
// by one.
#pragma once

#include "core/bias.h"
#include "core/jagged.h"
#include "cpu/gemm.h"
#include "cpu/work.h"

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

template <class C>
class Bias {
 public:
  // Rows [row_begin, row_end) of the mask against any column; begin_q is the jagged row of mask row 0.
  Bias(const AttentionProblem& problem, const Sequence& sequence, int b, int head, int row_begin, int row_end,
       const BiasScratch<C>& scratch, C* grad_time = nullptr)
      : relative_(problem.relative),
        dense_(problem.dense),
        mask_(sequence.mask),
        scratch_(scratch),
        grad_time_(grad_time) {
    if (relative_.position_weight) {
      position_weight_ = static_cast<const C*>(relative_.position_weight) + head * relative_.position_head_stride;
      first_distance_ = -mask_.position(row_end - 1);
      num_distances_ = mask_.position(mask_.len - 1) - mask_.position(row_begin) - first_distance_ + 1;
      for (int x = 0; x < num_distances_; ++x)
        scratch_.position[x] = position_weight_[position_index(0, x + first_distance_, relative_.positions)];
      for (int x = num_distances_; x < num_distances_ + kBlockCols; ++x) scratch_.position[x] = 0;
    }
    if (relative_.time_weight) {
      time_weight_ = static_cast<const C*>(relative_.time_weight) + head * relative_.time_head_stride;
      keys_ = relative_.timestamps + sequence.begin_kv;
      queries_ =
          relative_.query_timestamps ? relative_.query_timestamps + sequence.begin_q - sequence.first_row : keys_;
    }
    if (dense_.data)
      dense_data_ = static_cast<const C*>(dense_.data) + b * dense_.batch_stride + head * dense_.head_stride;
  }

  bool any() const { return position_weight_ || time_weight_ || dense_data_; }

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
      for (int j = 0; j < kBlockCols; ++j) scratch_.col_position[j] = mask_.position(min_int(begin + j, end - 1));
    }
    if (time_weight_) set_times();
  }

  // s[j] += bias(i, begin + j) for columns [lo, hi) of the tile, both multiples of the vector length.
  HSTU_INLINE void add_row(int i, int lo, int hi, C* s) {
    if (position_weight_) add_position(i, lo, hi, s);
    if (time_weight_) add_time(i, lo, hi, s);
    if (dense_data_) add_dense(i, lo, hi, s);
  }

  // Adds ds of the row that add_row() was last called for to the gradients; ds is 0 in columns the row does not keep.
  HSTU_INLINE void add_row_grad(int i, int lo, int hi, const C* ds, bool position, C* grad_bias) {
    if (position) add_position_grad(i, lo, hi, ds);
    if (grad_time_) add_time_grad(lo, hi, ds);
    if (grad_bias) add_dense_grad(i, lo, hi, ds, grad_bias);
  }

 private:
  static constexpr int L = kLanes<C>;
  static constexpr int kMostCompares = 24;
  using Int = typename Simd<C>::Int;

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

  void set_times() {
    oldest_ = newest_ = keys_[begin_];
    for (int j = begin_; j < end_; ++j) {
      if (keys_[j] < oldest_) oldest_ = keys_[j];
      if (keys_[j] > newest_) newest_ = keys_[j];
    }
    const uint64_t width = static_cast<uint64_t>(newest_) - static_cast<uint64_t>(oldest_);
    comparable_ = width <= INT32_MAX;
    for (int j = 0; j < kBlockCols; ++j) scratch_.col_time[j] = keys_[min_int(begin_ + j, end_ - 1)];
    if (comparable_)
      for (int j = 0; j < kBlockCols; ++j) since_oldest_[j] = static_cast<Int>(scratch_.col_time[j] - oldest_);
  }

  // How many boundaries are <= gap, walking from a nearby answer.
  int bucket_near(int bucket, int64_t gap) const {
    while (bucket < relative_.num_boundaries && relative_.time_boundaries[bucket] <= gap) ++bucket;
    while (bucket > 0 && relative_.time_boundaries[bucket - 1] > gap) --bucket;
    return bucket;
  }

  // Buckets [lo_bucket_, hi_bucket_] of row i in this tile, and how to tell them apart.
  void find_buckets(int i) {
    const int64_t time = queries_[i];
    int64_t least, most;
    const bool wraps = __builtin_sub_overflow(time, newest_, &least) || __builtin_sub_overflow(time, oldest_, &most);
    query_time_ = time;
    if (wraps) {
      one_by_one_ = true;
      return;
    }
    lo_bucket_ = bucket_near(lo_bucket_, least);
    hi_bucket_ = bucket_near(max_int(hi_bucket_, lo_bucket_), most);
    const int compares = hi_bucket_ - lo_bucket_;
    one_by_one_ = compares > 0 && (!comparable_ || compares > kMostCompares);
    if (one_by_one_) return;
    // A key is in bucket lo_bucket_ + b or a later one iff it is at most threshold_[b] younger than the tile's oldest.
    for (int b = 1; b <= compares; ++b)
      threshold_[b] = static_cast<Int>(most - relative_.time_boundaries[lo_bucket_ + b - 1]);
  }

  IntVec<C> in_bucket_or_later(int b, int j) const {
    return load_int<C>(since_oldest_ + j) <= broadcast_int<C>(threshold_[b]);
  }

  void add_time(int i, int lo, int hi, C* s) {
    find_buckets(i);
    if (one_by_one_) {
      int bucket = lo_bucket_;
      for (int j = lo; j < hi; ++j) {
        bucket = bucket_near(bucket, time_gap(query_time_, scratch_.col_time[j]));
        s[j] += time_weight_[bucket];
      }
      return;
    }
    const int compares = hi_bucket_ - lo_bucket_;
    const C* weight = time_weight_ + lo_bucket_;
    for (int j = lo; j < hi; j += L) {
      Vec<C> w = broadcast(weight[0]);
      for (int b = 1; b <= compares; ++b) w = select<C>(in_bucket_or_later(b, j), broadcast(weight[b]), w);
      store(s + j, load(s + j) + w);
    }
  }

  // The table's gradient is collected in one vector a bucket, summed across lanes only when a lane of tasks ends.
  void add_time_grad(int lo, int hi, const C* ds) const {
    if (one_by_one_) {
      int bucket = lo_bucket_;
      for (int j = lo; j < hi; ++j) {
        bucket = bucket_near(bucket, time_gap(query_time_, scratch_.col_time[j]));
        grad_time_[int64_t{bucket} * kTimeLanes + j % kTimeLanes] += ds[j];
      }
      return;
    }
    const int compares = hi_bucket_ - lo_bucket_;
    for (int b = 0; b <= compares; ++b) {
      Vec<C> total = {};
      for (int j = lo; j < hi; j += L) {
        Vec<C> x = load(ds + j);
        if (b > 0) x = select<C>(in_bucket_or_later(b, j), x, Vec<C>{});
        if (b < compares) x = select<C>(in_bucket_or_later(b + 1, j), Vec<C>{}, x);
        total += x;
      }
      C* grad = grad_time_ + int64_t{lo_bucket_ + b} * kTimeLanes;
      store(grad, load(grad) + total);
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

  static constexpr int kTimeLanes = kMaxVectorBytes / sizeof(C);

  const RelativeBiasParams& relative_;
  const DenseBiasParams& dense_;
  const Mask& mask_;
  BiasScratch<C> scratch_;
  C* grad_time_;

  const C* position_weight_ = nullptr;
  int first_distance_ = 0, num_distances_ = 0;
  const C* time_weight_ = nullptr;
  const int64_t* keys_ = nullptr;
  const int64_t* queries_ = nullptr;
  const C* dense_data_ = nullptr;

  int begin_ = 0, end_ = 0;
  bool consecutive_ = false;  // positions of the tile's columns rise by one
  int64_t oldest_ = 0, newest_ = 0;
  bool comparable_ = false;  // timestamps of the tile's keys differ by less than 2^31
  Int since_oldest_[kBlockCols] = {};

  int64_t query_time_ = 0;
  int lo_bucket_ = 0, hi_bucket_ = 0;
  bool one_by_one_ = false;
  Int threshold_[kMostCompares + 1] = {};
};

}  // namespace
}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
