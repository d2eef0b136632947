// The mask against the table of rules in words, over every option for short sequences; what is derived from row()
// against keep() of single elements. The longer exhaustive check runs from Python (python_tests/).
#include <cstdlib>

#include "core/mask.h"
#include "tests/check.h"

namespace hstu_ops {
namespace {

constexpr int kLength = 7;

// One element, from the rules alone.
bool expected_keep(const Mask& mask, int i, int j) {
  const MaskOptions& o = mask.options;
  const int h = mask.history;
  if (i < mask.contextual) return j < h;
  if (j >= h) return i >= h && j <= i && (i - h) / o.target_group_size == (j - h) / o.target_group_size;
  if (i < h && o.causal && j > i) return false;
  if (i < h && i == j) return true;
  if (o.max_attn_len == 0 || j < o.global_prefix_len) return true;
  if (o.min_full_attn_seq_len > 0 && (i >= h || i >= h - o.min_full_attn_seq_len)) return true;
  return std::abs(mask.position(i) - mask.position(j)) <= o.max_attn_len;
}

void check_elements(const Mask& mask) {
  int64_t pairs = 0;
  for (int i = 0; i < mask.len; ++i) {
    for (int j = 0; j < mask.len; ++j) {
      CHECK(mask.keep(i, j) == expected_keep(mask, i, j));
      pairs += mask.keep(i, j);
    }
    const RowSpans r = mask.row(i);
    CHECK(r.prefix.size() == 0 || r.window.size() == 0 || r.prefix.hi <= r.window.lo);
    CHECK(r.window.size() == 0 || r.group.size() == 0 || r.window.hi <= r.group.lo);
  }
  CHECK(mask.kept_pairs() == pairs);
}

void check_tiles(const Mask& mask, int rows, int columns) {
  for (int m0 = 0; m0 < mask.len; m0 += rows) {
    for (int n0 = 0; n0 < mask.len; n0 += columns) {
      const int m1 = m0 + rows, n1 = n0 + columns;
      bool any = false, all = m1 <= mask.len && n1 <= mask.len;
      for (int i = m0; i < min_int(m1, mask.len); ++i) {
        for (int j = n0; j < min_int(n1, mask.len); ++j) {
          any = any || mask.keep(i, j);
          all = all && mask.keep(i, j);
        }
      }
      CHECK(!any || mask.touches(m0, m1, n0, n1));
      CHECK(!mask.covers(m0, m1, n0, n1) || all);
    }
  }
}

template <class F>
void for_each_mask(F f) {
  for (int len = 0; len <= kLength; ++len) {
    for (int targets = 0; targets <= len; ++targets) {
      for (int contextual = 0; contextual <= 3; ++contextual) {
        for (int bits = 0; bits < 2 * 3 * 4 * 3 * 3; ++bits) {
          MaskOptions o;
          int rest = bits;
          o.causal = rest % 2 == 0, rest /= 2;
          o.target_group_size = 1 + rest % 3, rest /= 3;
          o.max_attn_len = rest % 4, rest /= 4;
          o.min_full_attn_seq_len = rest % 3, rest /= 3;
          o.global_prefix_len = rest * 2;
          f(Mask::make(len, targets, contextual, o));
        }
      }
    }
  }
}

TEST(mask_elements_match_the_rules) { for_each_mask(check_elements); }

TEST(mask_tiles_are_skipped_and_covered_soundly) {
  for_each_mask([](const Mask& mask) {
    check_tiles(mask, 2, 3);
    check_tiles(mask, 3, 2);
  });
}

TEST(mask_clamps_wrong_content) {
  const Mask mask = Mask::make(4, 9, -3, {});
  CHECK(mask.history == 0);
  CHECK(mask.contextual == 0);
  CHECK(mask.row(-1).size() == 0);
  CHECK(mask.row(4).size() == 0);
}

}  // namespace
}  // namespace hstu_ops
