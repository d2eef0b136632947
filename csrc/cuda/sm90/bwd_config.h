// Tile sizes of the Hopper backward by compiled head dimension, and the limits they must keep.
#pragma once

#include <type_traits>

#include "cuda/sm90/config.h"
#include "cuda/sm90/fwd_bias.h"

namespace hstu_ops::cuda::sm90 {

// A block of threads owns kKeys keys of one head and walks tiles of kQueries queries. Two or three warpgroups compute:
//
//   kSplitKeys   each has 64 of the keys, and their dK and dV
//   otherwise    (dK and dV of 64 keys are more than a warpgroup can hold) both have all 64 keys, the first one P and
//                dV, the second one dS and dK
//
// Where kQuerySums, they find dQ, too, which is added up in global memory: each has 64 of the queries or, of 64
// queries, half of the columns; or each has every third tile's (kTurns). One more warpgroup feeds them.
template <int kDim_, bool kQuerySums_, int kQueries_, int kKeyStages_, int kValueStages_, int kQueryStages_,
          int kGradStages_, int kGroups_ = 2>
struct BwdShape {
  static constexpr int kDim = kDim_, kQueries = kQueries_;
  static constexpr bool kQuerySums = kQuerySums_, kSplitKeys = kDim <= 128;
  static constexpr int kGroups = kGroups_, kThreads = 128 * (kGroups + 1), kKeys = kSplitKeys ? 64 * kGroups : 64;
  static constexpr int kKeyStages = kKeyStages_, kValueStages = kValueStages_;    // items
  static constexpr int kQueryStages = kQueryStages_, kGradStages = kGradStages_;  // tiles of queries and of dO
  static constexpr int kPanels = kDim / kPanel, kKeyBytes = kKeys * kDim * 2, kQueryBytes = kQueries * kDim * 2;

  static constexpr int kScoreStages = 2, kScoreBytes = kQuerySums ? kKeys * kQueries * 2 : 0;  // dS
  static constexpr int kSlopeStages = kSplitKeys ? 0 : 2, kSlopeBytes = kKeys * kQueries * 2;
  static constexpr bool kSplitQueries = kQueries == 128;
  static constexpr bool kTurns = kGroups == 3;
  static constexpr int kSumStages = 2;                                // of dQ on its way out
  static constexpr int kSumBytes = kQuerySums ? 64 * kPanel * 4 : 0;  // each
  static constexpr int kSharedBytes = (kKeyStages + kValueStages) * kKeyBytes +
                                      (kQueryStages + kGradStages) * kQueryBytes + kScoreStages * kScoreBytes +
                                      kSlopeStages * kSlopeBytes + kSumStages * kSumBytes + 1024;
  static constexpr bool kFinishes = kQuerySums;       // no other kernel clears and converts the sums: see bwd_finish.h
  static constexpr bool kFromLast = true;             // queries: see bwd_finish.h
  static constexpr bool kOrdered = false;             // are the sums' parts added in a fixed order?
  static constexpr int kClaimTiles = kTurns ? 2 : 1;  // left of an item when the next one is claimed
  // A launch gives every thread the same share of 64 K registers; setmaxnreg moves them to the computing warpgroups.
  // Of a relative bias: see BwdBiasShape. Dense bias: see BwdDenseShape.
  static constexpr bool kBias = false, kDense = false;
  using Relative = BiasShape<kKeys, true, SharedCells<1>, 1>;
  using Notes = NoteQueue<Relative, 1, 1>;
  static constexpr int kBiasStages = 1, kBiasStageBytes = 0;
  static constexpr int kTimeRows = 1;  // whose times a block keeps
  static constexpr int kLoadRegisters = kGroups == 2 ? 40 : 32, kComputeRegisters = kGroups == 2 ? 232 : 160;
  static_assert(kSharedBytes + 2048 <= kSharedMemory, "barriers and jobs take 2 KB");
  static_assert(kQueries == 64 || kQueries == 128, "one or two panels of dS");
  static_assert(!kQuerySums || kDim == (kSplitQueries || kTurns ? kPanel : 2 * kPanel), "64 columns of dQ a warpgroup");
};

template <int kDim, bool kQuerySums>
struct BwdConfig;
template <bool kQuerySums>
struct BwdConfig<64, kQuerySums> : BwdShape<64, kQuerySums, 128, 2, 2, 2, 2> {};
template <>
struct BwdConfig<64, true> : BwdShape<64, true, 64, 2, 2, 3, 3, 3> {};
template <bool kQuerySums>
struct BwdConfig<128, kQuerySums> : BwdShape<128, kQuerySums, 64, 2, 1, 2, 2> {};
template <>
struct BwdConfig<256, false> : BwdShape<256, false, 64, 1, 1, 2, 2> {};

// With relative bias, which may take the place of keys loaded ahead.
template <class Shape, class Cells, int kNotedTiles, int kLoads, int kCompute>
struct BwdBiasShape : Shape {
  static constexpr bool kBias = true;
  static constexpr bool kFinishes = false;  // one warp adds: it would hold up the others (5 to 9 % of a call)
  static constexpr bool kFromLast = false;
  using Relative = BiasShape<Shape::kKeys, true, Cells, kNotedTiles>;
  using Notes = NoteQueue<Relative, 1, 2 * kNotedTiles>;
  static constexpr int kBiasStages = 4, kBiasStageBytes = BiasStage<Relative>::kBytes;
  // 2 KB a warp for scores that wait: where dS or slopes go later, or a place of their own.
  static constexpr bool kScratch = !Shape::kQuerySums && Shape::kSplitKeys;
  static constexpr int kBiasBytes =
      BiasTables<Relative>::kBytes + kBiasStages * kBiasStageBytes + Notes::kBytes + kScratch * Shape::kKeys * 128;
  static constexpr int kSharedBytes = Shape::kSharedBytes + kBiasBytes;
  static constexpr int kTimeRows = Shape::kKeys;
  static constexpr int kClaimTiles = Shape::kClaimTiles + 2;  // notes take longer than tiles to load
  static constexpr int kLoadRegisters = kLoads, kComputeRegisters = kCompute;
  static_assert(kSharedBytes + 2048 + 2 * kTimeRows * 5 <= kSharedMemory, "barriers and jobs take 2 KB");
  static_assert(Shape::kQueries == Relative::kCols);
};

template <int kDim, bool kQuerySums, class Bias = RelativeBias>
struct BwdBiasConfig;
template <>
struct BwdBiasConfig<64, true> : BwdBiasShape<BwdShape<64, true, 64, 1, 1, 3, 3, 3>, SharedCells<4096>, 2, 32, 160> {};
template <>
struct BwdBiasConfig<128, true> : BwdBiasShape<BwdShape<128, true, 64, 1, 1, 2, 2>, SharedCells<2432>, 4, 40, 232> {};
template <>
struct BwdBiasConfig<64, false> : BwdBiasShape<BwdShape<64, false, 64, 2, 2, 4, 4>, SharedCells<4096>, 4, 40, 232> {};
template <>
struct BwdBiasConfig<128, false> : BwdBiasShape<BwdShape<128, false, 64, 2, 1, 2, 2>, SharedCells<4096>, 4, 40, 232> {};
template <>
struct BwdBiasConfig<256, false> : BwdBiasShape<BwdConfig<256, false>, SharedCells<880>, 4, 40, 232> {};
template <>
struct BwdBiasConfig<128, true, ManyBucketsBias>
    : BwdBiasShape<BwdShape<128, true, 64, 1, 1, 2, 2>, WideCells, 4, 40, 232> {};
template <>
struct BwdBiasConfig<256, false, ManyBucketsBias> : BwdBiasShape<BwdConfig<256, false>, WideCells, 4, 40, 232> {};

// With dense bias, which is read where it is used.
template <class Shape>
struct BwdDenseShape : Shape {
  static constexpr bool kDense = true;
};
template <int kDim, bool kQuerySums, class Bias>
using BwdConfigOf = std::conditional_t<
    std::is_same_v<Bias, DenseBias>, BwdDenseShape<BwdConfig<kDim, kQuerySums>>,
    std::conditional_t<kIsRelative<Bias>, BwdBiasConfig<kDim, kQuerySums, Bias>, BwdConfig<kDim, kQuerySums>>>;

// With sums that are cleared before and converted after; of a shape that never finishes them, that shape.
template <class Shape>
struct ClearedShape : Shape {
  static constexpr bool kFinishes = false, kFromLast = false;
};
template <class Shape>
using BwdClearedShape = std::conditional_t<Shape::kFinishes, ClearedShape<Shape>, Shape>;

// With parts of the sums in order, where the kernel finishes them: deterministic.
template <class Shape>
struct BwdOrderedShape : Shape {
  static constexpr bool kOrdered = true;
};

}  // namespace hstu_ops::cuda::sm90
