// Which table entries an element reads.
#include "core/bias.h"

#include <cstdint>
#include <limits>

#include "tests/check.h"

namespace hstu_ops {
namespace {

TEST(time_bucket_counts_boundaries_up_to_the_gap) {
  const int64_t boundaries[] = {-5, 0, 0, 7, 1LL << 40};
  const int64_t gaps[] = {std::numeric_limits<int64_t>::min(), -6, -5, -1, 0, 6, 7, 8, 1LL << 40, (1LL << 40) + 1};
  for (int64_t gap : gaps) {
    int expected = 0;
    for (int64_t boundary : boundaries) expected += boundary <= gap;
    CHECK(time_bucket(gap, boundaries, 5) == expected);
  }
  CHECK(time_bucket(3, nullptr, 0) == 0);
}

TEST(time_gap_wraps_like_integer_tensors) {
  const int64_t lowest = std::numeric_limits<int64_t>::min(), highest = std::numeric_limits<int64_t>::max();
  CHECK(time_gap(7, 9) == -2);
  CHECK(time_gap(lowest, 1) == highest);
}

TEST(position_index_is_clamped_to_the_table) {
  CHECK(position_index(5, 5, 4) == 3);
  CHECK(position_index(5, 4, 4) == 2);
  CHECK(position_index(100, 0, 4) == 0);
  CHECK(position_index(0, 100, 4) == 6);
  CHECK(position_index(3, 9, 1) == 0);
}

}  // namespace
}  // namespace hstu_ops
