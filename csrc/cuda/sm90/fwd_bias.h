// What the Hopper forward keeps of relative bias in shared memory: written by two warps of the loading warpgroup, tile
// by tile beside the keys (fwd_bias_prepare.h), read by the computing ones (fwd_bias_add.h).
#pragma once

#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/memory.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/fwd_bias_cells.h"
#include "cuda/tile/bias.h"

namespace hstu_ops::cuda::sm90 {

// A warp's note of a tile.
//   few buckets          word: weight of the first one, as a float; where kStep is set there are two, and gaps from
//                        `boundary` on have `change` more
//   many, kCells         the cells answer for all gaps; if kOneOctave, it has shift note.first() and first cell `word`
//   many                 buckets are note.first() to note.first() + word
// Weights come multiplied by the argument of SiLU.
struct __align__(16) WarpNote {
  static constexpr unsigned kStep = 1u << 28, kCells = 1u << 30, kOneOctave = 1u << 31;
  static constexpr int kBytes = 16;

  BiasNote note;
  int word, boundary;
  float change;

  __device__ static WarpNote load(uint32_t from) {
    const uint4 x = ptx::ld_shared_u4(from);
    return {{x.x}, static_cast<int>(x.y), static_cast<int>(x.z), __uint_as_float(x.w)};
  }
  __device__ void store(uint32_t to) const {
    ptx::st_shared(to, make_uint4(note.code, static_cast<unsigned>(word), static_cast<unsigned>(boundary),
                                  __float_as_uint(change)));
  }
  __device__ bool many() const { return note.steps() == BiasNote::kMany; }
  __device__ float weight() const { return many() ? 0.f : __int_as_float(word); }
  __device__ bool step() const { return (note.code & kStep) != 0; }
  __device__ bool cells() const { return (note.code & kCells) != 0; }
  __device__ bool one_octave() const { return (note.code & kOneOctave) != 0; }
  __device__ Octave octave() const { return {note.first(), word}; }
};

// What a stage holds of relative bias besides its tile of keys.
template <class C>
class BiasStage {
 public:
  static constexpr int kWarps = C::kRows / 16;
  // Entry e of the window is the weight of column j and row i with e = j - i + kRows - 1.
  static constexpr int kWindow = C::kRows + C::kCols;

  __device__ explicit BiasStage(uint32_t base) : base_(base) {}

  // The window from `from` on, by a warp, sixteen bytes at a time: starts up to three entries early, ends up to three
  // late.
  __device__ __forceinline__ void copy_window(const float* from) const {
    const int early = static_cast<int>(reinterpret_cast<uintptr_t>(from) / 4 % 4);
    for (int i = lane_id(); i < kWindow / 4 + 1; i += 32) ptx::cp_async_16(base_ + i * 16, from - early + i * 4, 16);
    if (lane_id() == 0) ptx::st_shared(base_ + kEarly, static_cast<uint32_t>(early * 4));
  }
  // The same of a table in whose range the window does not lie.
  template <class Index>
  __device__ __forceinline__ void copy_window(const float* table, const Index& index) const {
    for (int e = lane_id(); e < kWindow; e += 32) ptx::cp_async_4(base_ + e * 4, table + index(e));
    if (lane_id() == 0) ptx::st_shared(base_ + kEarly, 0u);
  }
  __device__ uint32_t weights(int e) const { return base_ + ptx::ld_shared_int(base_ + kEarly) + e * 4; }

  // The low words of the times of the keys: differences of times less than 2^31 apart are right.
  __device__ uint32_t time(int key) const { return base_ + kTimes + key * 4; }
  __device__ void copy_time(int key, const int64_t* from) const { ptx::cp_async_4(time(key), from); }

  __device__ uint32_t note(int warp) const { return base_ + kNotes + warp * WarpNote::kBytes; }

 private:
  static constexpr int kTimes = (kWindow + 4) * 4, kNotes = kTimes + C::kCols * 4,
                       kEarly = kNotes + kWarps * WarpNote::kBytes;
  static_assert(kNotes % 16 == 0);

 public:
  static constexpr int kBytes = (kEarly + 4 + 127) / 128 * 128;

 private:
  uint32_t base_;
};

// Notes on their way to the stages: of kTiles tiles at a time, in two buffers.
template <class C>
struct NoteQueue {
  static constexpr int kTiles = 8, kBuffers = 2;
  static constexpr int kBytes = kBuffers * kTiles * BiasStage<C>::kWarps * WarpNote::kBytes;

  uint32_t base;

  __device__ uint32_t at(int buffer, int tile, int warp) const {
    return base + ((buffer * kTiles + tile) * BiasStage<C>::kWarps + warp) * WarpNote::kBytes;
  }
};

// What a block holds of relative bias: cells of the look-up and zeros in the place of weights.
template <class C>
struct BiasTables {
  using Cells = BiasCells<C::kDim == 256 ? 640 : 5120>;  // what the tiles of keys leave room for
  static constexpr int kZeros = Cells::kBytes, kBytes = kZeros + 384;

  uint32_t base;

  __device__ Cells cells() const { return Cells(base); }
  // In the place of BiasStage::weights.
  __device__ uint32_t zeros() const { return base + kZeros + 32; }
  // By `threads` threads that meet in sync(). The stages lie behind; without a position term their weights stay zeros.
  template <class Sync>
  __device__ __forceinline__ void make(const RelativeBiasParams& p, float argument, int stages_bytes, int thread,
                                       int threads, const Sync& sync) const {
    for (int i = thread; i < (kBytes - kZeros + stages_bytes) / 4; i += threads)
      ptx::st_shared(base + kZeros + i * 4, 0u);
    if (p.time_weight) {
      cells().make(TimeTerm(p, Sequence(), 0, nullptr), argument, thread, threads, sync);
    } else {
      sync();
    }
  }
  // For an item of another head; those of one head share tables.
  template <class Sync>
  __device__ __forceinline__ void turn(const RelativeBiasParams& p, int head, float argument, int thread, int threads,
                                       const Sync& sync) const {
    if (!p.time_weight || p.time_head_stride == 0) return;
    sync();
    cells().fill(TimeTerm(p, Sequence(), head, nullptr), argument, thread, threads);
    sync();
  }
};

}  // namespace hstu_ops::cuda::sm90
