// Tile sizes of the Hopper kernels by compiled head dimension, and the limits they must keep.
#pragma once

#include "cuda/tile/layout.h"

namespace hstu_ops::cuda::sm90 {

constexpr int kSharedMemory = 227 * 1024;
constexpr int kPanel = 64;  // columns of a 128-byte-swizzled panel of 16-bit elements

// A block of threads owns kRows queries of kHeads heads, 64 for each of kGroups warpgroups, and walks tiles of kCols
// keys. One more warpgroup feeds them.
template <int kDim_, int kGroups_, int kStages_, bool kQueryRegisters_, int kHeads_ = 1>
struct FwdShape {
  static constexpr int kDim = kDim_, kGroups = kGroups_, kCols = 64, kHeads = kHeads_;
  static constexpr int kStages = kStages_;                   // tiles of a head's keys and values in flight
  static constexpr bool kQueryRegisters = kQueryRegisters_;  // queries are operands from registers, not shared memory
  static constexpr int kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1), kPanels = kDim / kPanel;
  static constexpr int kQueryBytes = kRows * kDim * 2 /* of a head */, kKeyBytes = kCols * kDim * 2;
  // The last kRows * 128 bytes are those where accumulators become rows of the output.
  static constexpr int kSharedBytes = kHeads * kQueryBytes + 2 * kStages * kKeyBytes + kRows * 128 + 1024;
  // A launch gives every thread the same share of 64 K registers; setmaxnreg moves them to the computing warpgroups.
  static constexpr int kLoadRegisters = 56, kComputeRegisters = kGroups == 2 ? 224 : 152;
  static_assert(kDim % kPanel == 0 && kCols == 64, "panels are whole, keep bits are 64 a row");
  static_assert(kSharedBytes + 2048 <= kSharedMemory, "barriers and items take 2 KB");
  static_assert(kRows * kDim * 4 <= 2 * kStages * kKeyBytes, "sums of parts are exchanged where tiles were");
  static_assert(kGroups == 2 || kGroups == 3, "see the registers");
  static_assert(kHeads == 1 || !kQueryRegisters);
};

template <int kDim>
struct FwdConfig;
template <>
struct FwdConfig<64> : FwdShape<64, 3, 4, true> {};
template <>
struct FwdConfig<128> : FwdShape<128, 3, 3, false> {};
template <>
struct FwdConfig<256> : FwdShape<256, 2, 2, false> {};

// Several heads that have the same bias: it is worked out once.
template <int kDim>
struct FwdHeadsConfig;
template <>
struct FwdHeadsConfig<64> : FwdShape<64, 2, 5, false, 4> {};
template <>
struct FwdHeadsConfig<128> : FwdShape<128, 2, 3, false, 2> {};

}  // namespace hstu_ops::cuda::sm90
