// Work is walked completely: each block of rows of each head once, whatever the offsets and the groups.
#include <random>

#include "tests/check.h"
#include "tests/warp.h"

#include "cuda/tile/schedule.h"

namespace hstu_ops::cuda {
namespace {

constexpr int kRows = 4;

// What lane 0 finds, index by index until there is nothing; all lanes must find the same, and so must who begins late.
template <bool kAscending>
std::vector<WorkItem> walk(const Schedule& schedule) {
  std::vector<WorkItem> found;
  test::Warp([&] {
    WorkFinder<kRows, kAscending> finder(schedule);
    for (int64_t i = 0;; ++i) {
      const WorkItem item = finder.find(i);
      CHECK(__ballot_sync(~0u, item.block >= 0) == (item.block < 0 ? 0u : ~0u));
      if (item.block < 0) break;
      CHECK(__reduce_min_sync(~0u, item.sequence) == __reduce_max_sync(~0u, item.sequence));
      CHECK(__reduce_min_sync(~0u, item.block) == __reduce_max_sync(~0u, item.block));
      if (lane_id() == 0) found.push_back(item);
      if (i % 5 != 3) continue;
      const WorkItem same = find_work_inline<kRows, kAscending>(schedule, i);
      CHECK(same.sequence == item.sequence && same.head == item.head && same.block == item.block);
    }
    CHECK(finder.find(INT64_MAX).block < 0);
  }).run();
  return found;
}

template <bool kAscending>
void check(const Schedule& schedule) {
  std::vector<int> first(schedule.batch + 1);
  for (int b = 0; b < schedule.batch; ++b)
    first[b + 1] = first[b] + ceil_div(row_range(schedule.offsets, b, schedule.batch, schedule.total).size, kRows);
  std::vector<int> visits(static_cast<size_t>(first[schedule.batch]) * schedule.heads);
  int level = -1;  // of the item before, if it was of the last group
  for (const WorkItem& item : walk<kAscending>(schedule)) {
    const bool real = item.sequence >= 0 && item.sequence < schedule.batch && item.head >= 0 &&
                      item.head < schedule.heads && item.block < first[item.sequence + 1] - first[item.sequence];
    CHECK(real);
    if (!real) return;
    ++visits[(first[item.sequence] + item.block) * schedule.heads + item.head];
    const bool last = item.sequence >= schedule.last_group;
    CHECK(last || level < 0);
    if (last) {
      CHECK(level < 0 || (kAscending ? item.block >= level : item.block <= level));
      level = item.block;
    }
  }
  for (const int count : visits) CHECK(count == 1);
}

Schedule make(const std::vector<int32_t>& offsets, int heads, int group, int head_group) {
  Schedule s;
  s.offsets = {offsets.data(), false};
  s.batch = static_cast<int>(offsets.size()) - 1;
  s.total = offsets.back() > 0 ? offsets.back() : 0;
  s.heads = heads, s.group = group, s.head_group = head_group;
  return s;
}

}  // namespace

TEST(schedule_is_complete) {
  std::mt19937 random(0);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  for (const int batch : {1, 6, 129, 300})
    for (int round = 0; round < 5; ++round) {
      const int longest = batch > 6 ? 6 : 40, some = batch > 6 ? 4 : 1;  // one of so many sequences has rows
      std::vector<int32_t> offsets = {0};
      for (int b = 0; b < batch; ++b) offsets.push_back(offsets.back() + (below(some) ? 0 : below(longest + 1)));
      if (round == 4)  // nonsense
        for (int b = 1; b < batch; ++b) offsets[b] = below(some) ? offsets[b - 1] : below(batch) - batch / 4;
      const int heads = 1 + below(2) + 2 * below(2) * (batch < 7);
      Schedule s = make(offsets, heads, 1 << below(8), heads % 2 == 0 && below(2) ? heads / 2 : heads);
      if (round > 0) widen_last_group(s, kRows, 1 + below(40), round == 1);
      round % 2 ? check<true>(s) : check<false>(s);
    }
}

// All of the last 128 sequences at most, and enough of them.
TEST(last_group_is_wide) {
  for (const int batch : {0, 1, 7, 128, 129, 1000})
    for (const int group : {1, 4, 128})
      for (const int processors : {1, 10, 1000}) {
        Schedule s;
        s.batch = batch, s.total = int64_t{64} * batch, s.heads = 2, s.group = group;
        widen_last_group(s, 16, processors);
        const int size = batch - s.last_group, chunk = batch - (max_int(batch, 1) - 1) / kChunk * kChunk;
        CHECK(s.last_group >= 0 && s.last_group % group == 0 && size >= min_int(group, chunk) && size <= chunk);
        CHECK(size == chunk || size * 2 * 64 / 2 >= 0.75 * 16 * processors);
      }
}

}  // namespace hstu_ops::cuda
