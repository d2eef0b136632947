// The tiles of a sequence in bands of neighbouring diagonals, for kernels that walk along them. Host and device.
#pragma once

#include "core/jagged.h"

namespace hstu_ops::cuda {

// Diagonal m - n of tile m of the queries and tile n of the keys. An item is kWidth tiles of keys, as a schedule cuts
// them. Item `block` has the band that is `block` bands above the lowest diagonal of a causal mask, and one as far
// below where rows look ahead; the last item has all that are left. Each tile that keeps anything is in one band of one
// item.
template <int kTile, int kWidth>
class DiagonalBands {
 public:
  HSTU_HD DiagonalBands(const Sequence& s, int block) {
    const int queries = ceil_div(s.num_q, kTile), keys = ceil_div(s.mask.len, kTile);
    base_ = -ceil_div(max_int(s.first_row, 0), kTile);
    up_ = queries > 0 ? ceil_div(queries - base_, kWidth) : 0;
    down_ = queries > 0 && s.mask.looks_ahead() ? ceil_div(keys - 1 + base_, kWidth) : 0;
    block_ = block, last_ = block == ceil_div(s.mask.len, kWidth * kTile) - 1;
  }
  // The lowest diagonal of the item's band number `i`, from 0 on; false: it has no more.
  HSTU_HD bool find(int i, int& diagonal) const {
    const int ups = last_ ? max_int(up_ - block_, 0) : block_ < up_, downs = last_ ? down_ - block_ : block_ < down_;
    if (i < ups) diagonal = base_ + (block_ + i) * kWidth;
    if (i >= ups) diagonal = base_ - (block_ + i - ups + 1) * kWidth;
    return i < ups + max_int(downs, 0);
  }

 private:
  int base_, up_, down_, block_;
  bool last_;
};

}  // namespace hstu_ops::cuda
