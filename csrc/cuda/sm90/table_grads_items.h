// Work of the Hopper kernel for gradients of bias tables: bands of diagonals of tiles, and the steps along them.
// Derived from core/mask.h.
#pragma once

#include "cuda/sm90/table_grads_config.h"
#include "cuda/tile/diagonal_bands.h"
#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda::sm90 {

// Step number v of a band: tile v of the queries; group g takes the keys that came g steps before.
class TableStep {
 public:
  TableStep() = default;
  __device__ explicit TableStep(int number) : code_((number + kMostGroups) << 12) {}

  __device__ void set_kept(unsigned groups) { code_ |= groups; }
  __device__ void set_covered(unsigned groups) { code_ |= groups << kMostGroups; }
  __device__ void set_keys() { code_ |= 64; }
  __device__ void set_last() { code_ |= 128; }
  __device__ void set_visited() { code_ |= 256; }
  __device__ void set_before(int steps) { code_ |= min_int(steps, 3) << 9; }
  __device__ int number() const { return (code_ >> 12) - kMostGroups; }
  __device__ unsigned kept() const { return code_ & 7; }
  __device__ bool kept(int group) const { return code_ >> group & 1; }
  __device__ bool covered(int group) const { return code_ >> group & 8; }
  __device__ bool keys() const { return code_ & 64; }  // they are used here or in the next steps
  __device__ bool last() const { return code_ & 128; }
  __device__ bool visited() const { return code_ & 256; }
  __device__ void set_unnoted() { code_ |= 2048; }
  __device__ bool unnoted() const { return code_ & 2048; }  // the first of those that are noted together
  __device__ int before() const { return code_ >> 9 & 3; }  // steps of the job before this one, of which 3 are counted
  // The same in all lanes, as the compiler then knows.
  __device__ TableStep uniform() const { return of_lane(0); }
  __device__ TableStep of_lane(int lane) const {
    TableStep s;
    s.code_ = __shfl_sync(~0u, code_, lane);
    return s;
  }

 private:
  static constexpr int kMostGroups = 3;
  int code_ = 0;
};

// A band of diagonals of one sequence, and some heads: group g has the tiles (m, n) of m - n = diagonal + g.
struct TableJob {
  Job job;  // its head is the first of `heads`
  int heads;
  int diagonal;
  bool more;    // false: the block is done
  bool rising;  // neither times of queries nor those of keys fall
};

// A step on its way: rows and columns of the mask that its tiles of queries and keys begin with, and its job.
struct __align__(16) StepTile {
  TableStep step;
  int row, col, job;
};

struct StepPart {
  TableStep steps[32];
  bool last;  // of the job
};

// Of the steps of a band, kSteps at a time, a lane each: which groups keep something of their tile, and all of it.
template <class C>
class StepFinder {
 public:
  static constexpr int kSteps = 32 - (C::kGroups - 1);

  __device__ StepFinder(const Sequence& s, int diagonal) : s_(s), diagonal_(diagonal) {
    queries_ = ceil_div(s.num_q, kTableTile), keys_ = ceil_div(s.mask.len, kTableTile);
    begin_ = max_int(diagonal, 1 - C::kGroups);
    end_ = min_int(queries_, keys_ + diagonal + C::kGroups - 1);
  }
  __device__ int begin() const { return begin_; }
  __device__ int end() const { return end_; }

  // Step first + lane. A step is visited if any of its tiles is kept, or one of the next steps' that uses its keys or
  // those of a step between: a group's keys always are as many steps back as its number.
  __device__ TableStep find(int first) const {
    const int v = first + lane_id();
    TableStep step(v);
    unsigned kept = 0, covered = 0;
    if (v >= 0 && v < end_) {
      const int m = s_.first_row + v * kTableTile;
      const RowSpans some = s_.mask.rows(m, m + kTableTile), all = s_.mask.common(m, m + kTableTile);
#pragma unroll
      for (int g = 0; g < C::kGroups; ++g) {
        const int tile = v - diagonal_ - g, n = tile * kTableTile;
        if (tile < 0 || tile >= keys_) continue;
        kept |= some.meets(n, min_int(n + kTableTile, s_.mask.len)) << g;
        covered |= all.covers(n, n + kTableTile) << g;
      }
    }
    step.set_kept(kept), step.set_covered(covered);
    unsigned any = kept, keys = kept & 1;
#pragma unroll
    for (int g = 1; g < C::kGroups; ++g) {
      const unsigned later = __shfl_down_sync(~0u, kept, g);
      any |= later, keys |= later >> g & 1;
    }
    if (any && lane_id() < kSteps) step.set_visited();
    if (keys) step.set_keys();
    return step;
  }

 private:
  const Sequence& s_;
  int diagonal_, queries_, keys_, begin_, end_;
};

// Heads whose dS are added up, at most `most`: those of a problem in equal parts, as long as they share the tables and
// leave work for all processors.
inline int summed_heads(const AttentionProblem& a, int most, int processors) {
  if (!a.relative.same_for_all_heads()) return 1;
  int parts = ceil_div(a.heads, most);
  while (parts < a.heads && most_items(a.jagged.total_kv, a.jagged.batch, 2 * kTableTile, parts) < processors) ++parts;
  return ceil_div(a.heads, parts);
}

}  // namespace hstu_ops::cuda::sm90
