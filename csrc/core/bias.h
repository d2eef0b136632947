// Relative attention bias of one element: which entry of the position table and which of the time table it reads.
//
//   bias_ij = position_weight[position_index(i, j)] + time_weight[time_bucket(tq_i - tk_j)]
//
// Backends may find the same entries faster for a whole tile; these are what they must agree with bit for bit.
#pragma once

#include <cstdint>

#include "core/mask.h"

namespace hstu_ops {

// Entry of a table of 2 * positions - 1 weights.
HSTU_HD int position_index(int row_position, int col_position, int positions) {
  return clamp_int(col_position - row_position + positions - 1, 0, 2 * positions - 2);
}

// Wraps on overflow, as integer tensors do.
HSTU_HD int64_t time_gap(int64_t query_time, int64_t key_time) {
  return static_cast<int64_t>(static_cast<uint64_t>(query_time) - static_cast<uint64_t>(key_time));
}

// How many of the sorted boundaries are <= gap: an entry of a table of count + 1 weights.
HSTU_HD int time_bucket(int64_t gap, const int64_t* boundaries, int count) {
  int lo = 0, hi = count;
  while (lo < hi) {
    const int mid = lo + (hi - lo) / 2;
    if (boundaries[mid] <= gap) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

}  // namespace hstu_ops
