// The time term of the relative bias, a row of a tile at a time.
//
// The bucket range of a vector of keys follows from its oldest and its newest. Far from the diagonal that is one
// bucket; some are told apart by comparing timestamps; many (or differences too wide for that) are looked up one by
// one.
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
class TimeBias {
 public:
  // `times` has room for the keys of a tile; `grad` is [buckets][kTimeLanes], added to, or null.
  TimeBias(const RelativeBiasParams& params, const Sequence& sequence, int head, int64_t* times, C* grad)
      : boundaries_(params.time_boundaries), num_boundaries_(params.num_boundaries), times_(times), grad_(grad) {
    if (!params.time_weight) return;
    weight_ = static_cast<const C*>(params.time_weight) + head * params.time_head_stride;
    keys_ = params.timestamps + sequence.begin_kv;
    queries_ = params.query_timestamps ? params.query_timestamps + sequence.begin_q - sequence.first_row : keys_;
  }

  bool any() const { return weight_; }
  bool wants_grad() const { return grad_; }

  // The tile's columns are [begin, end).
  void set_columns(int begin, int end) {
    for (int j = 0; j < kBlockCols; ++j) times_[j] = keys_[min_int(begin + j, end - 1)];
    tile_.oldest = tile_.newest = times_[0];
    for (int j = 0; j < kBlockCols; j += L) {
      KeyGroup& group = groups_[j / L];
      group.oldest = group.newest = times_[j];
      for (int x = j + 1; x < j + L; ++x) {
        if (times_[x] < group.oldest) group.oldest = times_[x];
        if (times_[x] > group.newest) group.newest = times_[x];
      }
      if (group.oldest < tile_.oldest) tile_.oldest = group.oldest;
      if (group.newest > tile_.newest) tile_.newest = group.newest;
      group.comparable = static_cast<uint64_t>(group.newest) - static_cast<uint64_t>(group.oldest) <= INT32_MAX;
      if (!group.comparable) continue;
      for (int x = j; x < j + L; ++x) since_oldest_[x] = static_cast<Int>(times_[x] - group.oldest);
    }
  }

  // s[j] += time_weight[bucket of (i, j)] for columns [lo, hi) of the tile, both multiples of the vector length.
  void add_row(int i, int lo, int hi, C* s) {
    find_buckets(tile_, queries_[i]);
    if (tile_.one_bucket()) {
      for (int j = lo; j < hi; j += L) store(s + j, load(s + j) + weight_[tile_.lo]);
      return;
    }
    for (int j = lo; j < hi; j += L) {
      KeyGroup& group = groups_[j / L];
      find_buckets(group, queries_[i]);
      if (group.one_by_one) {
        int bucket = group.lo;
        for (int x = j; x < j + L; ++x) {
          bucket = bucket_[x] = bucket_near(bucket, time_gap(queries_[i], times_[x]));
          s[x] += weight_[bucket];
        }
        continue;
      }
      Vec<C> w = broadcast(weight_[group.lo]);
      for (int b = group.lo + 1; b <= group.hi; ++b)
        w = select<C>(in_bucket_or_later(group, b, j), broadcast(weight_[b]), w);
      store(s + j, load(s + j) + w);
    }
  }

  // Adds ds of the row that add_row() was last called for to one vector a bucket, summed across lanes when all is done.
  void add_row_grad(int lo, int hi, const C* ds) const {
    if (tile_.one_bucket()) {
      C* grad = grad_ + int64_t{tile_.lo} * kTimeLanes;
      Vec<C> total = load(grad);
      for (int j = lo; j < hi; j += L) total += load(ds + j);
      store(grad, total);
      return;
    }
    for (int j = lo; j < hi; j += L) {
      const KeyGroup& group = groups_[j / L];
      if (group.one_by_one) {
        for (int x = j; x < j + L; ++x) grad_[int64_t{bucket_[x]} * kTimeLanes + x % kTimeLanes] += ds[x];
        continue;
      }
      Vec<C> rest = load(ds + j);  // of bucket b and later ones
      for (int b = group.lo; b <= group.hi; ++b) {
        const Vec<C> later = b < group.hi ? select<C>(in_bucket_or_later(group, b + 1, j), rest, Vec<C>{}) : Vec<C>{};
        C* grad = grad_ + int64_t{b} * kTimeLanes;
        store(grad, load(grad) + (rest - later));  // exact: each lane of `later` is 0 or that of `rest`
        rest = later;
      }
    }
  }

 private:
  static constexpr int L = kLanes<C>;
  static constexpr int kTimeLanes = kMaxVectorBytes / sizeof(C);
  static constexpr int kMostCompares = 32;
  using Int = typename Simd<C>::Int;

  struct KeyGroup {  // one vector of the tile's keys, or all of them
    int64_t oldest, newest;
    bool comparable;  // they differ by less than 2^31
    // For the last row:
    int64_t most;  // time since the oldest
    int lo, hi;    // buckets of the newest and the oldest
    bool one_by_one;

    bool one_bucket() const { return lo == hi && !one_by_one; }
  };

  // How many boundaries are <= gap, walking from a nearby answer.
  int bucket_near(int bucket, int64_t gap) const {
    while (bucket < num_boundaries_ && boundaries_[bucket] <= gap) ++bucket;
    while (bucket > 0 && boundaries_[bucket - 1] > gap) --bucket;
    return bucket;
  }

  // Buckets [group.lo, group.hi] of the group's keys for a query, and whether comparing tells them apart.
  void find_buckets(KeyGroup& group, int64_t time) const {
    int64_t least;
    if (__builtin_sub_overflow(time, group.newest, &least) || __builtin_sub_overflow(time, group.oldest, &group.most)) {
      group.one_by_one = true;
      return;
    }
    group.lo = bucket_near(group.lo, least);
    group.hi = bucket_near(max_int(group.hi, group.lo), group.most);
    group.one_by_one = group.hi > group.lo && (!group.comparable || group.hi - group.lo > kMostCompares);
  }

  // Lanes of the group's keys in bucket `bucket` (one of (group.lo, group.hi]) or a later one: old enough.
  HSTU_INLINE IntVec<C> in_bucket_or_later(const KeyGroup& group, int bucket, int j) const {
    const int64_t youngest = group.most - boundaries_[bucket - 1];
    return load_int<C>(since_oldest_ + j) <= broadcast_int<C>(static_cast<Int>(youngest));
  }

  const int64_t* boundaries_;
  int num_boundaries_;
  int64_t* times_;  // of the tile's keys
  C* grad_;
  const C* weight_ = nullptr;
  const int64_t* keys_ = nullptr;
  const int64_t* queries_ = nullptr;

  KeyGroup tile_ = {};
  KeyGroup groups_[kBlockCols / L] = {};
  Int since_oldest_[kBlockCols] = {};  // of each column, if its group is comparable
  int bucket_[kBlockCols] = {};        // of each column for the last row, if its group was looked up one by one
};

}  // namespace
}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
