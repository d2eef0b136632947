// Shared memory of a relative bias in the Hopper backward.
#pragma once

#include "cuda/tile/bias.h"

namespace hstu_ops::cuda::sm90 {

// Parts are 64 queries and a warp's 16 keys: what is added to scores, and summed, at a time.
template <int kQueries>
struct BwdBiasPlan {
  static constexpr int kWarps = 8, kMostBuckets = 256;  // a bucket is a byte

  // Of a part: weights by diagonal, its note. Where there are few buckets, times of queries from the first one's on,
  // for each boundary what they are compared with by key, and how weights change there; where there are many, each
  // element's bucket. Which elements are kept.
  static constexpr int kStripLength = 79, kStrip = 0, kNote = kStripLength * 4, kBuckets = 320, kQueryTimes = kBuckets,
                       kLimits = kQueryTimes + 64 * 4, kChanges = kLimits + BiasNote::kMostSteps * 16 * 4,
                       kBits = kBuckets + 16 * 64, kPartBytes = kBits + 128;
  static_assert(kChanges + BiasNote::kMostSteps * 4 <= kBits);
  // Of a warp: its parts, and sums of buckets that have not been added to the table yet, by the bucket's last two bits;
  // the tile's number.
  static constexpr int kWindow = kQueries / 64 * kPartBytes, kTile = kWindow + 4 * 4 + 4 * 128, kWarpBytes = kTile + 16;

  static constexpr int kCells = 128, kNotes = kCells * sizeof(TimeCell),
                       kScratch = kNotes + (kWarps * BiasNotes::kBytes + 127) / 128 * 128,
                       kBytes = kScratch + kWarps * kWarpBytes;
};

}  // namespace hstu_ops::cuda::sm90
