// The HSTU attention mask: one definition for every backend and direction.
//
// A row keeps at most three column intervals: global prefix, window, own target group. row() is the definition;
// everything else (keep one element, skip a tile, a tile needs no mask, pairs of a problem) is derived from it, so a
// new mask is a new row().
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace hstu_ops {

struct Interval {  // [lo, hi), empty when lo >= hi
  int lo = 0, hi = 0;

  HSTU_HD bool has(int j) const { return lo <= j && j < hi; }
  HSTU_HD bool meets(int a, int b) const { return max_int(lo, a) < min_int(hi, b); }
  HSTU_HD bool contains(int a, int b) const { return lo <= a && b <= hi; }
  HSTU_HD int size() const { return max_int(hi - lo, 0); }
};

// Ordered and disjoint: prefix.hi <= window.lo, window.hi <= group.lo (where not empty).
struct RowSpans {
  Interval prefix, window, group;

  HSTU_HD bool has(int j) const { return prefix.has(j) || window.has(j) || group.has(j); }
  HSTU_HD bool meets(int a, int b) const { return prefix.meets(a, b) || window.meets(a, b) || group.meets(a, b); }
  HSTU_HD bool covers(int a, int b) const { return window.contains(a, b) || prefix.contains(a, b); }
  HSTU_HD int size() const { return prefix.size() + window.size() + group.size(); }
};

// The options that hold for a whole batch; see MaskOptions' fields in the docstring of hstu_ops.hstu_attention.
struct MaskOptions {
  bool causal = true;
  int target_group_size = 1;
  int max_attn_len = 0;           // 0: no window
  int min_full_attn_seq_len = 0;  // 0: the window holds for every row
  int global_prefix_len = 0;      // leading columns that stay visible outside the window

  // May a row keep leading columns, but none right behind them?
  bool leaves_gaps() const { return max_attn_len > 0 && global_prefix_len > 0; }
};

struct Mask {  // of one sequence; rows and columns run over [0, len)
  int len = 0;
  int history = 0;     // len - number of targets
  int contextual = 0;  // leading rows that see the whole history, <= history
  MaskOptions options;

  HSTU_HD static Mask make(int len, int num_targets, int contextual_seq_len, const MaskOptions& options) {
    Mask m;
    m.len = len;
    m.history = len - clamp_int(num_targets, 0, len);
    m.contextual = clamp_int(contextual_seq_len, 0, m.history);
    m.options = options;
    return m;
  }

  // Logical position: targets share one, contextual rows share one.
  HSTU_HD int shift() const { return max_int(contextual - 1, 0); }
  HSTU_HD int position(int i) const { return max_int(min_int(i, history) - shift(), 0); }

  // May a row keep columns behind its own?
  HSTU_HD bool looks_ahead() const { return !options.causal || contextual > 0; }

  // The definition.
  HSTU_HD RowSpans row(int i) const {
    RowSpans r;
    if (i < 0 || i >= len) return r;
    if (i < contextual) {
      r.window = {0, history};
      return r;
    }
    const bool target = i >= history;
    const int at = min_int(i, history);
    const int ahead = target || !options.causal ? history : i + 1;  // what the row may see without a window
    r.window = {0, ahead};
    if (i < full_from()) {
      const int reach = options.max_attn_len;
      if (at - shift() > reach) r.window.lo = at - reach;
      if (ahead - at > reach) r.window.hi = at + reach + 1;
      const int prefix = min_int(options.global_prefix_len, ahead);
      if (prefix > r.window.lo) r.window.hi = max_int(r.window.hi, prefix);
      r.prefix.hi = min_int(prefix, r.window.lo);
    }
    if (target) r.group = {i - (i - history) % options.target_group_size, i + 1};
    return r;
  }

  HSTU_HD bool keep(int i, int j) const { return row(i).has(j); }

  // Smallest spans that hold row(i) for all i in [m0, m1). The two end rows suffice: over any run of rows
  // min(lo) and max(hi) of the window lie at an end, and where the prefix does not, the window holds it.
  HSTU_HD RowSpans rows(int m0, int m1) const {
    m0 = max_int(m0, 0);
    m1 = min_int(m1, len);
    if (m0 >= m1) return {};
    const RowSpans a = row(m0), b = row(m1 - 1);
    RowSpans r;
    r.prefix = {0, max_int(a.prefix.hi, b.prefix.hi)};
    r.window = {min_int(a.window.lo, b.window.lo), max_int(a.window.hi, b.window.hi)};
    if (m1 > history) r.group = {row(max_int(m0, history)).group.lo, m1};
    return r;
  }

  // Visit the tile rows [m0, m1) x columns [n0, n1) iff this is true.
  HSTU_HD bool touches(int m0, int m1, int n0, int n1) const { return rows(m0, m1).meets(n0, n1); }

  // Columns that all rows [m0, m1) keep. May leave some out where the rows straddle two kinds, and leaves out targets.
  HSTU_HD RowSpans common(int m0, int m1) const {
    if (m0 < 0 || m1 > len || m0 >= m1 || kind(m0) != kind(m1 - 1)) return {};
    const RowSpans a = row(m0), b = row(m1 - 1);
    RowSpans r;
    r.prefix.hi = min_int(min_int(a.prefix.hi, b.prefix.hi), history);
    r.window = {max_int(a.window.lo, b.window.lo), min_int(min_int(a.window.hi, b.window.hi), history)};
    return r;
  }

  // Is every element kept, so that no per-element mask is needed? May say no where the tile straddles
  // two kinds of row or two intervals: that costs time, not correctness.
  HSTU_HD bool covers(int m0, int m1, int n0, int n1) const { return common(m0, m1).covers(n0, n1); }

  // Pairs kept by rows [m0, len): what the operations of a problem are counted from.
  HSTU_HD int64_t kept_pairs(int m0 = 0) const {
    int64_t pairs = 0;
    for (int i = max_int(m0, 0); i < len; ++i) pairs += row(i).size();
    return pairs;
  }

 private:
  // First row that ignores the window.
  HSTU_HD int full_from() const {
    if (options.max_attn_len == 0) return 0;
    return options.min_full_attn_seq_len == 0 ? len : max_int(history - options.min_full_attn_seq_len, 0);
  }
  HSTU_HD int kind(int i) const { return i < contextual ? 0 : i >= history ? 3 : i >= full_from() ? 2 : 1; }
};

}  // namespace hstu_ops
