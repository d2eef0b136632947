// Tile sizes of the Hopper kernels by compiled head dimension, and the limits they must keep.
#pragma once

#include "cuda/tile/layout.h"

namespace hstu_ops::cuda::sm90 {

constexpr int kSharedMemory = 227 * 1024;
constexpr int kPanel = 64;  // columns of a 128-byte-swizzled panel of 16-bit elements

// A block of threads owns kRows queries of one head, 64 for each of kGroups warpgroups, and walks tiles of kCols keys.
// One more warpgroup feeds them.
template <int kDim_, int kGroups_, int kCols_, int kStages_, bool kQueryRegisters_>
struct FwdShape {
  static constexpr int kDim = kDim_, kGroups = kGroups_, kCols = kCols_;
  static constexpr int kStages = kStages_;                    // tiles of keys and values in flight
  static constexpr bool kQueryRegisters = kQueryRegisters_;  // queries are operands from registers, not shared memory
  static constexpr int kPartCols = kCols % 64 == 0 ? 64 : kCols % 48 == 0 ? 48 : kCols % 56 == 0 ? 56 : 40;  // masked at a time
  static constexpr int kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1), kPanels = kDim / kPanel;
  // The last kRows * 128 bytes are those where accumulators become rows of the output.
  static constexpr int kQueryBytes = kRows * kDim * 2, kKeyBytes = kCols * kDim * 2;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStages * kKeyBytes + kRows * 128 + 1024;
  // A launch gives every thread the same share of 64 K registers; setmaxnreg moves them to the computing warpgroups.
  static constexpr int kLoadRegisters = 56, kComputeRegisters = kGroups == 2 ? 224 : 152;
  static_assert(kDim % kPanel == 0 && kCols % kPartCols == 0 && kPartCols <= 64,
                "panels are whole, keep bits are 64 a row");
  static_assert(kSharedBytes + 2048 <= kSharedMemory, "barriers and jobs take 2 KB");
  static_assert(kGroups == 2 || kGroups == 3, "see the registers");
};

#ifndef HSTU_C64
#define HSTU_C64 64
#define HSTU_S64 4
#define HSTU_Q64 true
#endif
#ifndef HSTU_C128
#define HSTU_G128 2
#define HSTU_C128 128
#define HSTU_S128 2
#define HSTU_Q128 true
#endif
template <int kDim>
struct FwdConfig;
template <>
struct FwdConfig<64> : FwdShape<64, 3, HSTU_C64, HSTU_S64, HSTU_Q64> {};
template <>
struct FwdConfig<128> : FwdShape<128, HSTU_G128, HSTU_C128, HSTU_S128, HSTU_Q128> {};
template <>
struct FwdConfig<256> : FwdShape<256, 2, 64, 2, false> {};

}  // namespace hstu_ops::cuda::sm90
