// Tile sizes by element type and compiled head dimension, and the limits they must keep.
#pragma once

#include "cuda/tile/layout.h"
#include "cuda/tile/tf32.h"

namespace hstu_ops::cuda::sm80 {

constexpr int kSmallSharedMemory = 99 * 1024;   // sm_86, sm_89
constexpr int kExtraBytes = 2560;               // a bias, its table and what is shared statically
constexpr int kLargeSharedMemory = 163 * 1024;  // sm_80, sm_90

// Forward: a block of threads owns kRows queries of one head, each warp 16 * kM of them, and walks tiles of kCols keys.
template <class T_, int kDim_, int kM_, int kWarps_, int kCols_, int kStep_, int kBlocks_, bool kAhead_ = true,
          bool kTwice_ = false>
struct FwdShape {
  using T = T_;
  static constexpr int kDim = kDim_, kM = kM_, kWarps = kWarps_, kCols = kCols_;
  static constexpr int kStep = kStep_;  // keys whose scores a warp holds at a time
  static constexpr int kThreads = 32 * kWarps, kWarpRows = 16 * kM, kRows = kWarps * kWarpRows;
  static constexpr int kStages = 2;
  static constexpr bool kAhead = kAhead_;   // two sets of scores: tensor cores work on one during SiLU of the other
  static constexpr bool kTwice = kTwice_;   // code for tiles that need no mask besides that for others
  static constexpr int kBlocks = kBlocks_;  // an SM; what the registers are limited for
  static constexpr int kBiasBlocks = kBlocks < 2 ? kBlocks : 2;  // a bias needs more of them
  static constexpr int kTileBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes = (kRows + 2 * kStages * kCols) * kTileBytes;
  static_assert(kSharedBytes <= kSmallSharedMemory - kExtraBytes, "no room for a bias and its table");
  static_assert(kCols % kStep == 0 && kStep % 16 == 0 && kStep <= 64, "keep bits are 64 a row");
};

template <class T, int kDim>
struct FwdConfig;
template <class T>
struct FwdConfig<T, 32> : FwdShape<T, 32, 2, 4, 64, 64, 2> {};
template <class T>
struct FwdConfig<T, 64> : FwdShape<T, 64, 2, 4, 128, 32, 2, true, true> {};
template <class T>
struct FwdConfig<T, 128> : FwdShape<T, 128, 2, 4, 64, 32, 2> {};
template <class T>
struct FwdConfig<T, 256> : FwdShape<T, 256, 1, 4, 32, 32, 2> {};
template <>
struct FwdConfig<Tf32, 64> : FwdShape<Tf32, 64, 2, 4, 32, 32, 2> {};
template <>
struct FwdConfig<Tf32, 128> : FwdShape<Tf32, 128, 1, 4, 32, 32, 2> {};
template <>
struct FwdConfig<float, 32> : FwdShape<float, 32, 1, 4, 32, 32, 3> {};
template <>
struct FwdConfig<float, 64> : FwdShape<float, 64, 1, 4, 32, 32, 3> {};
template <>
struct FwdConfig<float, 128> : FwdShape<float, 128, 1, 4, 32, 32, 2> {};
template <>
struct FwdConfig<float, 256> : FwdShape<float, 256, 1, 2, 16, 16, 2> {};

// With a bias: longer steps, as much of its work is per tile and step.
template <class T, int kDim>
struct FwdBiasConfig : FwdConfig<T, kDim> {};
template <>
struct FwdBiasConfig<__half, 64> : FwdShape<__half, 64, 2, 4, 128, 64, 2, false> {};
template <>
struct FwdBiasConfig<__nv_bfloat16, 64> : FwdShape<__nv_bfloat16, 64, 2, 4, 128, 64, 2, false> {};

template <>
struct FwdBiasConfig<__half, 128> : FwdShape<__half, 128, 2, 4, 64, 32, 2, false> {};
template <>
struct FwdBiasConfig<__nv_bfloat16, 128> : FwdShape<__nv_bfloat16, 128, 2, 4, 64, 32, 2, false> {};

// With tables of many buckets: looking them up takes registers.
template <class T, int kDim>
struct FwdManyBucketsConfig : FwdBiasConfig<T, kDim> {};
template <class T>
struct FwdManyBucketsConfig<T, 64> : FwdShape<T, 64, 2, 4, 64, 32, 2, false> {};

// Backward: a block of threads owns kKeys keys of one head and walks tiles of kQueries queries. Its warps form
// kKeyWarps groups of 16 * kM keys. A group is one warp, which holds scores of kStep queries at a time and multiplies
// them out of its registers; or kSplit warps, each with kStep of the queries of the scores and 1 / kSplit of the
// columns of dK and dV, which exchange P' and dS' through shared memory: fewer reads of operands, one barrier more. For
// dQ the warps are dealt out anew, each with 16 * kQueryM queries of a tile.
template <class T_, int kDim_, int kM_, int kKeyWarps_, int kSplit_, int kQueries_, int kStep_, int kQueryM_,
          int kStages_, int kBlocks_>
struct BwdShape {
  using T = T_;
  static constexpr int kDim = kDim_, kM = kM_, kKeyWarps = kKeyWarps_, kSplit = kSplit_, kQueries = kQueries_,
                       kStep = kStep_;
  static constexpr bool kExchange = kSplit > 1;
  static constexpr int kWarps = kKeyWarps * kSplit, kThreads = 32 * kWarps, kWarpKeys = 16 * kM,
                       kKeys = kKeyWarps * kWarpKeys;
  static constexpr int kOwnDim = kDim / kSplit;
  static constexpr int kQueryM = kQueryM_, kQueryRows = kQueries / (16 * kQueryM), kQueryCols = kWarps / kQueryRows;
  static constexpr int kQueryDim = kDim / kQueryCols;  // columns of dQ a warp
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kTileBytes = kDim * static_cast<int>(sizeof(T)),
                       kScoreBytes = kQueries * static_cast<int>(sizeof(T));
  // dS' of two tiles, or P' and dS' of one
  static constexpr int kSharedBytes = (2 * kKeys + 2 * kStages * kQueries) * kTileBytes + 2 * kKeys * kScoreBytes;
  static_assert(kSharedBytes <= kLargeSharedMemory - kExtraBytes, "no room for a bias and its table");
  static_assert(kQueries % kStep == 0 && kQueryRows * kQueryCols == kWarps && kQueryDim % 16 == 0,
                "all warps have a share of dQ");
  static_assert(kExchange ? kStep * kSplit == kQueries : kStages == 2, "see bwd.cuh");
};

// Shapes by bias: one costs registers, which shorter steps give back. Dense is also for tables of many buckets.
template <class None_, class Relative_ = None_, class Dense_ = Relative_>
struct BwdShapes {
  using None = None_;
  using Relative = Relative_;
  using Dense = Dense_;
};

// The last parameter: whether a block gets more than kSmallSharedMemory.
template <class T, int kDim, bool kLarge>
struct BwdConfig;
template <class T, bool kLarge>
struct BwdConfig<T, 32, kLarge> : BwdShapes<BwdShape<T, 32, 2, 4, 1, 64, 32, 2, 2, 2>> {};
template <class T, bool kLarge>
struct BwdConfig<T, 64, kLarge>
    : BwdShapes<BwdShape<T, 64, 2, 4, 1, 64, 32, 2, 2, 2>, BwdShape<T, 64, 2, 4, 1, 64, 32, 2, 2, 2>,
                BwdShape<T, 64, 2, 4, 1, 64, 16, 2, 2, 2>> {};
template <class T>
struct BwdConfig<T, 128, true>
    : BwdShapes<BwdShape<T, 128, 2, 4, 2, 64, 32, 2, 2, 1>, BwdShape<T, 128, 2, 4, 2, 64, 32, 2, 2, 1>,
                BwdShape<T, 128, 2, 2, 2, 32, 16, 2, 2, 2>> {};
template <class T>
struct BwdConfig<T, 128, false> : BwdShapes<BwdShape<T, 128, 2, 2, 2, 32, 16, 2, 2, 2>> {};
template <class T>
struct BwdConfig<T, 256, true>
    : BwdShapes<BwdShape<T, 256, 1, 4, 2, 32, 16, 2, 2, 1>, BwdShape<T, 256, 1, 2, 4, 64, 16, 2, 1, 1>> {};
template <class T>
struct BwdConfig<T, 256, false> : BwdShapes<BwdShape<T, 256, 1, 2, 2, 32, 16, 2, 1, 1>> {};

template <class T, int kDim>
struct BwdConfig32;  // fp32 and TF32, at any size of shared memory
template <class T>
struct BwdConfig32<T, 32> : BwdShapes<BwdShape<T, 32, 1, 4, 1, 32, 32, 1, 2, 2>> {};
template <class T>
struct BwdConfig32<T, 64> : BwdShapes<BwdShape<T, 64, 1, 4, 1, 32, 32, 1, 2, 2>> {};
template <class T>
struct BwdConfig32<T, 128> : BwdShapes<BwdShape<T, 128, 1, 2, 2, 32, 16, 1, 1, 2>> {};
template <class T>
struct BwdConfig32<T, 256> : BwdShapes<BwdShape<T, 256, 1, 1, 2, 16, 8, 1, 1, 2>> {};

template <class T, int kDim, bool kLarge>
using BwdConfigOf = typename std::conditional_t<kIs16Bit<T>, std::enable_if<true, BwdConfig<T, kDim, kLarge>>,
                                                std::enable_if<true, BwdConfig32<T, kDim>>>::type;

}  // namespace hstu_ops::cuda::sm80
