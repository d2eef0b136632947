// Tile sizes of the Hopper kernel for gradients of bias tables, and what it keeps in shared memory beside tiles.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/diagonal_window.h"
#include "cuda/sm90/fwd_bias_cells.h"
#include "cuda/tile/table_grad.h"
#include "cuda/tile/time_buckets.h"

namespace hstu_ops::cuda::sm90 {

constexpr int kTableTile = 64;  // queries and keys of a tile

using TableWindow = DiagonalWindow<kTableTile, kTableTile>;

// What a computing warp knows of its tiles of 32 steps: a BiasNote each, and the weight of the first bucket of few. And
// how many jobs it has done, which would take a register.
struct TableNotes {
  static constexpr int kBytes = 33 * 8;
  // Of the note of a tile of many buckets: times are within 2^30 of that of the tile's first key; cells answer.
  static constexpr unsigned kNear = 1u << 30, kCells = 1u << 31;

  uint32_t base;

  __device__ void set(int at, int2 x) const { ptx::st_shared(base + at * 8, x); }
  __device__ int2 get(int at) const { return ptx::ld_shared_int_v2(base + at * 8); }
  __device__ unsigned jobs() const { return static_cast<unsigned>(get(32).x); }
  __device__ void set_jobs(unsigned jobs) const {
    __syncwarp();
    if (lane_id() == 0) set(32, {static_cast<int>(jobs), 0});
    __syncwarp();
  }
};

// Times of a tile's rows: low words, of keys those of the distance from the first one, which is left().
struct StepTimes {
  static constexpr int kBytes = (kTableTile + 4) * 4;

  uint32_t base;

  __device__ uint32_t at(int i) const { return base + i * 4; }
  __device__ uint32_t left() const { return at(kTableTile); }
};

// Each lane's sums of four buckets that have not been added to the table yet, by the bucket's last two bits: tiles that
// follow one another hold the same buckets or the next ones.
struct BucketSums {
  static constexpr int kBytes = 4 * 4 + 4 * 128;

  uint32_t base;

  __device__ uint32_t sum(int slot) const { return base + 16 + slot * 128 + ptx::thread_index() % 32 * 4; }
  __device__ void reset() const {
    if (lane_id() < 4) ptx::st_shared(base + lane_id() * 4, 0u);
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) ptx::st_shared(sum(slot), 0u);
    __syncwarp();
  }
  __device__ __forceinline__ void put(const TableTarget& to, int bucket, float x) const {
    const int slot = bucket % 4, there = ptx::ld_shared_int(base + slot * 4);
    const float before = ptx::ld_shared(sum(slot));
    if (there == bucket) {
      x += before;
    } else {
      to.add_of_warp(there, before);
      if (lane_id() == 0) ptx::st_shared(base + slot * 4, static_cast<uint32_t>(bucket));
      __syncwarp();
    }
    ptx::st_shared(sum(slot), __float_as_uint(x));
  }
  __device__ void finish(const TableTarget& to) const {
#pragma unroll 1
    for (int slot = 0; slot < 4; ++slot) to.add_of_warp(ptx::ld_shared_int(base + slot * 4), ptx::ld_shared(sum(slot)));
    __syncwarp();
  }
};

// Cells, and the bucket of each.
template <class Place>
struct CellBuckets {
  using Cells = BiasCells<Place>;
  static constexpr int kBytes = Cells::kBytes + (Cells::kCells + 8) * 2;

  uint32_t base;

  __device__ Cells cells() const { return Cells(base); }
  __device__ int bucket(int cell) const { return ptx::ld_shared_u16(base + Cells::kBytes + cell * 2); }

  // By `threads` threads that meet in sync(). memory: of GlobalCells.
  template <class Sync>
  __device__ void make(const TimeTerm& time, void* memory, float argument, int thread, int threads,
                       const Sync& sync) const {
    const Cells cells(base, memory, 0);
    cells.make(time, argument, thread, threads, sync);
    cells.each_bucket(time, thread, threads, [&](int k, int first, int last, int64_t, bool) {
      for (int c = first; c <= last; ++c) ptx::st_shared(base + Cells::kBytes + c * 2, static_cast<uint16_t>(k));
    });
    sync();
  }
};

using NoCells = SharedCells<0>;

// kGroups warpgroups compute, each the tiles of one diagonal; one more feeds them. A step is a tile of queries and one
// of keys of each of up to kHeads heads; the groups use the keys one after the other, in as many steps, and kAhead more
// are on their way. Cells_: where buckets are many; or NoCells.
template <int kDim_, int kGroups_, int kHeads_, class Cells_, int kQueryStages_, int kAhead>
struct TableShape {
  using Cells = Cells_;
  static constexpr int kDim = kDim_, kGroups = kGroups_, kHeads = kHeads_, kCells = Cells::kCells;
  static constexpr int kThreads = 128 * (kGroups + 1), kPanels = kDim / kPanel;
  static constexpr int kTileBytes = kTableTile * kDim * 2;
  // Tiles go back as soon as their products are done, what else is known of a step is needed longer. A step is written
  // when all warps are past the products of kQueryStages tiles before; they may still use keys' times two steps before.
  static constexpr unsigned kQueryStages = kQueryStages_, kKeyStages = (kGroups - 1) * kHeads + kAhead, kSteps = 8;
  // Of a warp's scratch; see KeptBuckets.
  static constexpr int kSlotWords = kDim == 64 && (kHeads == 1 || kCells > 0) ? 512 : 256;
  static constexpr int kWarps = 4 * kGroups, kNotes = (kSlotWords + 4) * 4, kBuckets = kNotes + TableNotes::kBytes,
                       kWarpBytes = (kBuckets + BucketSums::kBytes + 15) / 16 * 16;
  static constexpr int kCellBytes = kCells == 0 ? 0 : CellBuckets<Cells>::kBytes;
  static constexpr int kSharedBytes = 2 * (kKeyStages + kQueryStages) * kTileBytes + TimeTerm::kSharedBytes +
                                      kWarps * kWarpBytes + kGroups * TableWindow::kBytes +
                                      2 * kSteps * StepTimes::kBytes + kCellBytes + 1024;
  static constexpr int kLoadRegisters = 56, kComputeRegisters = kGroups == 2 ? 224 : 152;
  static_assert(kSteps > kQueryStages + kGroups - 1 && kKeyStages > (kGroups - 1) * kHeads,
                "a tile of keys is in use for kGroups steps");
  static_assert(kSharedBytes + 2048 <= kSharedMemory, "barriers and jobs take 2 KB");
};

// A warp's scratch.
template <class C>
struct TableSlots {
  static constexpr int kCount = C::kSlotWords;

  uint32_t base;

  __device__ uint32_t at(int i) const { return base + i * 4; }
};

}  // namespace hstu_ops::cuda::sm90
