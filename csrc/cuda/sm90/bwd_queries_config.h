// Tile sizes of the Hopper backward's kernel for dQ by compiled head dimension, and the limits they must keep.
#pragma once

#include <type_traits>

#include "cuda/sm90/config.h"
#include "cuda/sm90/fwd_bias.h"
#include "cuda/sm90/fwd_items.h"

namespace hstu_ops::cuda::sm90 {

// A block of threads owns kRows queries of one head, 64 for each of kGroups warpgroups, and walks tiles of kCols keys;
// or 64 queries, and the groups take tiles by turns (kTurns): half of the room. One more warpgroup feeds them.
template <int kDim_, int kGroups_, int kKeyStages_, int kValueStages_, bool kTurns_ = false>
struct BwdQueriesShape {
  static constexpr bool kTurns = kTurns_;
  static constexpr int kDim = kDim_, kGroups = kGroups_, kCols = 64;
  static constexpr int kKeyStages = kKeyStages_, kValueStages = kValueStages_;  // tiles in flight
  static constexpr int kRows = kTurns ? 64 : 64 * kGroups, kThreads = 128 * (kGroups + 1), kPanels = kDim / kPanel;
  static constexpr int kQueryBytes = kRows * kDim * 2, kKeyBytes = kCols * kDim * 2;
  static constexpr int kClaimTiles = 6;  // left of an item when the next one is claimed
  static constexpr int kSharedBytes = 2 * kQueryBytes + (kKeyStages + kValueStages) * kKeyBytes + 1024;
  static constexpr int kLoadRegisters = 56, kComputeRegisters = kGroups == 2 ? 224 : 152;
  static constexpr int kUsers = kTurns ? 1 : kGroups;  // warpgroups that use a tile
  static_assert(kGroups == 2 || kGroups == 3, "see the registers");
  static_assert(!kTurns || kGroups == 2, "sums of two are joined");
};

// A tile's keys serve two products, its values only the first of them: they are back long before the keys.
template <int kDim, class Bias>
struct BwdQueriesConfig;
template <class Bias>
struct BwdQueriesConfig<64, Bias> : BwdQueriesShape<64, 3, 4, 3> {};
template <class Bias>
struct BwdQueriesConfig<128, Bias> : BwdQueriesShape<128, 2, 4, 3> {};
template <>
struct BwdQueriesConfig<128, RelativeBias> : BwdQueriesShape<128, 2, 4, 2> {};
template <class Bias>
struct BwdQueriesConfig<256, Bias> : BwdQueriesShape<256, 2, 2, 1> {};
template <>
struct BwdQueriesConfig<256, RelativeBias> : BwdQueriesShape<256, 2, 2, 2, true> {};
template <>
struct BwdQueriesConfig<256, ManyBucketsBias> : BwdQueriesConfig<256, RelativeBias> {};

// Cells and tiles noted together: see BiasShape.
template <class Shape, class Bias>
using BwdQueriesBias = BiasPlan<
    Shape, Bias,
    std::conditional_t<std::is_same_v<Bias, ManyBucketsBias>, WideCells, SharedCells<Shape::kDim == 256 ? 720 : 4096>>,
    8, Shape::kDim == 64 ? 8 : 4>;

template <class Shape, class Bias>
struct BwdQueriesPlan : BwdQueriesBias<Shape, Bias> {
  using Base = BwdQueriesBias<Shape, Bias>;
  static constexpr int kScratchBytes = Base::kPreparers ? Shape::kGroups * 4 * 2048 : 0;  // 2 KB a warp
  static constexpr int kSharedBytes = Shape::kSharedBytes + Base::kBiasBytes + kScratchBytes;
  // As in the forward.
  static constexpr bool kSpare = Base::kPreparers && Shape::kGroups == 3;
  static constexpr int kLoadRegisters = kSpare ? 80 : Shape::kLoadRegisters;
  static constexpr int kComputeRegisters = kSpare ? 144 : Shape::kComputeRegisters;
  static_assert(kSharedBytes + 2048 + kItems * (Base::kTimeRows / 16) * 80 <= kSharedMemory,
                "barriers and items take 2 KB");
};

}  // namespace hstu_ops::cuda::sm90
