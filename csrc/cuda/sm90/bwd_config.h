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
// queries, half of the columns; or each has a tile's by turns (kTurns). One more warpgroup feeds them.
template <int kDim_, bool kQuerySums_, int kQueries_, int kKeyStages_, int kValueStages_, int kQueryStages_,
          int kGradStages_, int kGroups_ = 2, int kScoreStages_ = 2>
struct BwdShape {
  static constexpr int kDim = kDim_, kQueries = kQueries_;
  static constexpr bool kQuerySums = kQuerySums_, kSplitKeys = kDim <= 128;
  static constexpr int kGroups = kGroups_, kThreads = 128 * (kGroups + 1), kKeys = kSplitKeys ? 64 * kGroups : 64;
  static constexpr int kKeyStages = kKeyStages_, kValueStages = kValueStages_;    // items
  static constexpr int kQueryStages = kQueryStages_, kGradStages = kGradStages_;  // tiles of queries and of dO
  static constexpr int kPanels = kDim / kPanel, kKeyBytes = kKeys * kDim * 2, kQueryBytes = kQueries * kDim * 2;

  static constexpr int kScoreStages = kScoreStages_, kScoreBytes = kQuerySums ? kKeys * kQueries * 2 : 0;  // dS
  static constexpr int kSlopeStages = kSplitKeys ? 0 : 2, kSlopeBytes = kKeys * kQueries * 2;
  static constexpr bool kSplitQueries = kQueries == 128;
  static constexpr bool kTurns = kQuerySums && kDim == kPanel && !kSplitQueries;
  static constexpr int kTileStages = 2 * kScoreStages;                // tiles remembered: in flight, or dS in use
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
  static constexpr int kTimeRows = 1;     // whose times a block keeps
  static constexpr bool kTables = false;  // are gradients of the tables summed, too?
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
template <class Shape, class Cells, int kNotedTiles, int kLoads, int kCompute, bool kLongTimes = false>
struct BwdBiasShape : Shape {
  static constexpr bool kBias = true;
  static constexpr bool kFinishes = false;  // one warp adds: it would hold up the others (5 to 9 % of a call)
  static constexpr bool kFromLast = false;
  using Relative = BiasShape<Shape::kKeys, true, Cells, kNotedTiles, kLongTimes>;
  using Notes = NoteQueue<Relative, 1, 2 * kNotedTiles>;
  static constexpr int kBiasStages = 2 * Shape::kScoreStages, kBiasStageBytes = BiasStage<Relative>::kBytes;
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

// What each warp that sums gradients of the tables has in shared memory; behind the four of them are the boundaries
// and masks.
struct TableSumMemory {
  static constexpr int kKeys = 32 * 16, kSums = kKeys + 32 * 16, kPassed = kSums + 9 * 128, kWords = kPassed + 32,
                       kBytes = (kWords + 32 + 127) / 128 * 128;
  static constexpr int kAllBytes = 4 * kBytes + (TimeTerm::kMostCellBoundaries + 2) * 8 + 8 * 16;

  uint32_t base;  // on 128 bytes

  // Eight sums of a lane's, in pairs, that go on in the next tile.
  __device__ uint32_t carried(int lane) const { return base + lane * 16; }
  // Sums that the last lane has passed on.
  __device__ uint32_t passed(int i) const { return base + kPassed + i * 4; }
  // What a lane knows of its key.
  __device__ uint32_t key(int lane) const { return base + kKeys + lane * 16; }
  // Of a key's queries in front of those of a chunk, 0 to 8; places of keys are turned by chunk, so that those of four
  // chunks and eight keys are in different banks.
  __device__ uint32_t sum(int chunk, int lane) const {
    return ((base + kSums + lane * 4) ^ chunk % 8 * 16) + chunk * 128;
  }
  __device__ uint32_t word(int i) const { return base + kWords + i * 4; }
};

// With relative bias and sums of the gradients of its tables, by a warpgroup of their own: see bwd_tables.h.
template <class Shape, int kSums>
struct BwdTablesShape : Shape {
  static constexpr bool kTables = true;
  static constexpr int kThreads = Shape::kThreads + 128, kSumRegisters = kSums;
  static constexpr int kSharedBytes = Shape::kSharedBytes + TableSumMemory::kAllBytes;
  static_assert(Shape::kBiasBytes % 128 == 0, "TableSumMemory lies behind");
  static_assert(kSharedBytes + 2048 + 2 * Shape::kTimeRows * 5 <= kSharedMemory, "barriers and jobs take 2 KB");
};
template <int kDim>
struct BwdTablesConfig;
template <>
struct BwdTablesConfig<64>
    : BwdTablesShape<BwdBiasShape<BwdShape<64, true, 64, 1, 1, 3, 3, 2, 4>, SharedCells<1024>, 4, 40, 216, true>, 40> {
};
template <>
struct BwdTablesConfig<128>
    : BwdTablesShape<BwdBiasShape<BwdShape<128, true, 64, 1, 1, 2, 2>, SharedCells<1024>, 4, 32, 224, true>, 32> {};

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
