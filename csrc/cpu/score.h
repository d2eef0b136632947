// From products to probabilities: bias, mask and SiLU of one row of a tile, and the way back. Used by forward and
// backward.
#pragma once

#include "core/silu.h"
#include "cpu/bias.h"

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

constexpr int kStripRows = kRowsInRegisters;  // rows that one product keeps in registers

// The part of a tile a strip of rows keeps anything of: columns [lo, hi) of the tile, and the same widened to whole
// vectors.
struct StripColumns {
  int lo, hi;
  int vector_lo, vector_hi;
  bool full;  // every element of the widened part is kept

  bool empty() const { return lo >= hi; }
};

template <class C>
StripColumns strip_columns(const Mask& mask, int row_begin, int row_end, int col_begin, int col_end) {
  const RowSpans spans = mask.rows(row_begin, row_end);
  int lo = col_end, hi = col_begin;
  const Interval parts[] = {spans.prefix, spans.window, spans.group};
  for (const Interval& part : parts) {
    if (!part.meets(col_begin, col_end)) continue;
    lo = min_int(lo, max_int(part.lo, col_begin));
    hi = max_int(hi, min_int(part.hi, col_end));
  }
  StripColumns c;
  c.lo = lo - col_begin;
  c.hi = hi - col_begin;
  c.vector_lo = c.lo / kLanes<C> * kLanes<C>;
  c.vector_hi = (c.hi + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
  c.full = !c.empty() && mask.covers(row_begin, row_end, col_begin + c.vector_lo, col_begin + c.vector_hi);
  return c;
}

// All ones in the lanes whose column the row keeps.
template <class C>
class KeptLanes {
 public:
  KeptLanes(const RowSpans& row, int col_begin) : row_(row), col_begin_(col_begin) {}

  HSTU_INLINE IntVec<C> operator()(int j) const {
    const IntVec<C> col = iota<C>() + static_cast<Int>(col_begin_ + j);
    IntVec<C> kept = inside(row_.window, col);
    if (row_.prefix.hi > 0) kept |= inside(row_.prefix, col);
    if (row_.group.hi > 0) kept |= inside(row_.group, col);
    return kept;
  }

 private:
  using Int = typename Simd<C>::Int;
  static HSTU_INLINE IntVec<C> inside(const Interval& part, IntVec<C> col) {
    return (col >= static_cast<Int>(part.lo)) & (col < static_cast<Int>(part.hi));
  }

  RowSpans row_;
  int col_begin_;
};

template <class C>
HSTU_INLINE Vec<C> keep_lanes(IntVec<C> kept, Vec<C> x) {  // NaN in a masked lane goes too
  return (Vec<C>)((IntVec<C>)x & kept);
}

// s -> p over columns [lo, hi) of row i.
template <class C>
HSTU_INLINE void activate(const Mask& mask, int i, int col_begin, const StripColumns& cols, C* s) {
  if (cols.full) {
    for (int j = cols.vector_lo; j < cols.vector_hi; j += kLanes<C>) {
      const Vec<C> x = load(s + j);
      store(s + j, silu(x, sigmoid<C>(x)));
    }
    return;
  }
  const KeptLanes<C> kept(mask.row(i), col_begin);
  for (int j = cols.vector_lo; j < cols.vector_hi; j += kLanes<C>) {
    const Vec<C> x = load(s + j);
    store(s + j, keep_lanes<C>(kept(j), silu(x, sigmoid<C>(x))));
  }
}

// s -> p and dp -> ds.
template <class C>
HSTU_INLINE void activate_grad(const Mask& mask, int i, int col_begin, const StripColumns& cols, C* s, C* dp) {
  const KeptLanes<C> kept(cols.full ? RowSpans{} : mask.row(i), col_begin);
  for (int j = cols.vector_lo; j < cols.vector_hi; j += kLanes<C>) {
    const Vec<C> x = load(s + j), sig = sigmoid<C>(x);
    Vec<C> p = silu(x, sig), ds = load(dp + j) * silu_grad(x, sig);
    if (!cols.full) {
      const IntVec<C> lanes = kept(j);
      p = keep_lanes<C>(lanes, p);
      ds = keep_lanes<C>(lanes, ds);
    }
    store(s + j, p);
    store(dp + j, ds);
  }
}

template <class C>
C row_scale(const ScaleParams& scale, int b, int64_t row) {
  if (!scale.values) return static_cast<C>(scale.value);
  return static_cast<const C*>(scale.values)[scale.per_row ? row : b];
}

}  // namespace
}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
