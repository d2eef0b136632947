// Every tile that keeps anything is in one band of one item, whatever the mask and however few the queries.
#include "cuda/tile/diagonal_bands.h"

#include <vector>

#include "tests/check.h"

namespace hstu_ops::cuda {
namespace {

constexpr int kTile = 2, kWidth = 3;

void check_sequence(const Sequence& s) {
  const int queries = ceil_div(s.num_q, kTile), keys = ceil_div(s.mask.len, kTile);
  std::vector<int> visits(queries * keys);
  for (int block = 0; block < ceil_div(s.mask.len, kTile * kWidth); ++block) {
    const DiagonalBands<kTile, kWidth> bands(s, block);
    int diagonal = 0;
    for (int i = 0; bands.find(i, diagonal); ++i)
      for (int m = 0; m < queries; ++m)
        for (int n = m - diagonal - kWidth + 1; n <= m - diagonal; ++n)
          if (n >= 0 && n < keys) ++visits[m * keys + n];
  }
  for (int m = 0; m < queries; ++m)
    for (int n = 0; n < keys; ++n) {
      const int row = s.first_row + m * kTile, count = visits[m * keys + n];
      const bool kept = s.mask.rows(row, row + kTile).meets(n * kTile, min_int(n * kTile + kTile, s.mask.len));
      CHECK(count == 1 || (count == 0 && !kept));
    }
}

}  // namespace

TEST(diagonal_bands) {
  for (int len = 0; len <= 23; ++len)
    for (int targets = 0; targets <= min_int(len, 5); ++targets)
      for (int contextual = 0; contextual <= 7; contextual += 3)
        for (int window = 0; window <= 8; window += 4)
          for (int causal = 0; causal < 2; ++causal)
            for (int num_q = 0; num_q <= len; ++num_q) {
              MaskOptions options;
              options.causal = causal, options.max_attn_len = window, options.target_group_size = 1 + targets / 2;
              options.global_prefix_len = window / 4;
              Sequence s;
              s.num_q = num_q, s.first_row = len - num_q;
              s.mask = Mask::make(len, targets, contextual, options);
              check_sequence(s);
            }
}

}  // namespace hstu_ops::cuda
