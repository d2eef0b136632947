// What the Hopper kernels keep of relative bias in shared memory: written by warps of the loading warpgroup, tile by
// tile beside what is loaded (fwd_bias_prepare.h, bwd_bias_prepare.h), read by the computing ones (fwd_bias_add.h).
#pragma once

#include <type_traits>

#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/named_barrier.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/diagonal_window.h"
#include "cuda/sm90/fwd_bias_cells.h"
#include "cuda/sm90/meet.h"
#include "cuda/tile/bias.h"

namespace hstu_ops::cuda::sm90 {

// The lane, read where it is used: not kept in registers from tile to tile.
struct Lane {
  const int id = ptx::thread_index() & 31;

  __device__ int row() const { return id >> 2; }
  __device__ int col() const { return (id & 3) * 2; }
};

// A block's kRows rows, 16 a warp, and tiles of kCols columns: queries and keys or, if kTransposed, the reverse.
// Cells_: SharedCells of what tiles leave room for, or GlobalCells; kNotedTiles: looked at together. kLongTimes_: does
// a stage have what sums by bucket of time need?
template <int kRows_, bool kTransposed_, class Cells_, int kNotedTiles_, bool kLongTimes_ = false>
struct BiasShape {
  using Cells = Cells_;
  static constexpr int kRows = kRows_, kCols = 64;
  static constexpr int kNotedTiles = kNotedTiles_;
  static constexpr bool kTransposed = kTransposed_, kLongTimes = kLongTimes_;

  // Times such that a gap is that of the row less that of the column.
  __device__ static long long time(int64_t x) { return kTransposed ? static_cast<long long>(0ull - x) : x; }
};

// A warp's note of a tile, in shared memory. No bits: there is one bucket of times, or no time term.
struct WarpNote {
  static constexpr unsigned kSteps = 3;      // that many boundaries lie between the buckets
  static constexpr unsigned kCells = 4;      // the cells answer for all gaps,
  static constexpr unsigned kOneOctave = 8;  // those of one octave, the shift of which is code / kShift % 32
  static constexpr unsigned kSearch = 16;    // any of `buckets` behind bucket `first`
  static constexpr unsigned kClamped = 32;   // logical positions repeat: the position term is not one weight a diagonal
  static constexpr unsigned kBeyond = 64;    // and the window does not hold all of them
  static constexpr unsigned kOneByOne = kSearch | kBeyond, kBlockwise = kOneByOne | kCells,
                            kUncommon = kBlockwise | kClamped;
  static constexpr unsigned kShift = 128;
  static constexpr unsigned kBlocks = 32 * kShift;    // code / kBlocks % 16: see kept_block()
  static constexpr unsigned kUnknown = 16 * kBlocks;  // times are in disorder, or too far apart
  static constexpr int kMostSteps = 3, kBytes = 8 + kMostSteps * 8;

  uint32_t at;

  // Bits and the weight of the first bucket, times the argument of SiLU; 0 where it is looked up or searched for.
  __device__ void set(unsigned code, float weight) const {
    ptx::st_shared(at, make_int2(code, __float_as_int(weight)));
  }
  // Of the eight blocks of 8 columns, rows keep some of the first ones only; or, transposed, of the last ones only.
  template <bool kTransposed>
  __device__ static bool kept_block(unsigned code, int block, int count) {
    const int blocks = static_cast<int>(code / kBlocks % 16);
    return kTransposed ? block + count > blocks : block < blocks;
  }
  __device__ int2 head() const { return ptx::ld_shared_int_v2(at); }
  __device__ void mark(unsigned bits) const { ptx::red_shared_or(at, bits); }

  // Boundary i: gaps from `boundary` on have `change` more, where the tile's columns have times from `left` on; low
  // words.
  __device__ void set_step(int i, int boundary, int left, float change) const {
    ptx::st_shared(at + 8 + i * 8, make_int2(static_cast<int>(0u - boundary - left), __float_as_int(change)));
  }
  __device__ int2 step(int i) const { return ptx::ld_shared_int_v2(at + 8 + i * 8); }

  // In the place of steps: the octave's first cell; or the range of a search.
  __device__ void set_words(int x, int y) const { ptx::st_shared(at + 8, make_int2(x, y)); }
  __device__ int2 words() const { return step(0); }
};

// What a stage holds of relative bias besides its tile.
template <class B>
class BiasStage {
 public:
  static constexpr int kWarps = B::kRows / 16;
  using Window = DiagonalWindow<B::kRows, B::kCols>;
  static constexpr int kWindow = Window::kEntries;

  __device__ explicit BiasStage(uint32_t base) : base_(base) {}

  // What a warp writes of a stage: lane i has entries i, i + 32, ... of the window, and times of columns.
  struct Part {
    float weights[kWindow / 32];
    int times[B::kCols / 32];
  };
  __device__ __forceinline__ void write_window(const Part& part) const {
#pragma unroll
    for (int i = 0; i < kWindow / 32; ++i) window().set(i * 32 + lane_id(), part.weights[i]);
  }
  __device__ __forceinline__ void write_times(const int (&times)[B::kCols / 32], int lane) const {
    const int left = B::kTransposed ? __shfl_sync(~0u, times[B::kCols / 32 - 1], 31) : __shfl_sync(~0u, times[0], 0);
#pragma unroll
    for (int i = 0; i < B::kCols / 32; ++i)
      ptx::st_shared(time(i * 32 + lane), static_cast<uint32_t>(0u + times[i] - left));
    if (lane == 0) ptx::st_shared(base_ + kLeft, static_cast<uint32_t>(left));
    if (B::kLongTimes && lane % 8 == 7)
#pragma unroll
      for (int i = 0; i < B::kCols / 32; ++i)
        ptx::st_shared(chunk_end(i * 4 + lane / 8), static_cast<uint32_t>(0u + times[i] - left));
  }

  __device__ Window window() const { return {base_}; }

  // Times of columns from the smallest on, if they are in order, and the low word of that: differences of times less
  // than 2^31 apart are right.
  __device__ uint32_t time(int col) const { return base_ + kTimes + col * 4; }
  __device__ int left() const { return ptx::ld_shared_int(base_ + kLeft); }
  // Where kLongTimes: the last time of each eight columns, and all of the smallest one.
  __device__ uint32_t chunk_end(int chunk) const { return base_ + kChunkEnds + chunk * 4; }
  __device__ void set_left(long long x) const { ptx::st_shared_int64(base_ + kLongLeft, x); }
  __device__ long long long_left() const { return ptx::ld_shared_int64(base_ + kLongLeft); }

  __device__ WarpNote note(int warp) const { return {base_ + kNotes + warp * WarpNote::kBytes}; }

 private:
  static constexpr int kTimes = Window::kBytes, kNotes = kTimes + B::kCols * 4,
                       kLeft = kNotes + kWarps * WarpNote::kBytes, kLongLeft = kLeft + 8, kChunkEnds = kLongLeft + 8;
  static_assert(kWindow % 32 == 0 && kNotes % 16 == 0 && kLeft % 16 == 0);

 public:
  static constexpr int kBytes = ((B::kLongTimes ? kChunkEnds + B::kCols / 8 * 4 : kLeft + 4) + 127) / 128 * 128;

 private:
  uint32_t base_;
};

// Notes on their way to the stages, of kTiles tiles in each buffer.
template <class B, int kBuffers_, int kTiles_>
struct NoteQueue {
  static constexpr int kTiles = kTiles_, kBuffers = kBuffers_;
  static constexpr int kBytes = kBuffers * kTiles * BiasStage<B>::kWarps * WarpNote::kBytes;

  uint32_t base;

  __device__ WarpNote at(int buffer, int tile, int warp) const {
    return {base + ((buffer * kTiles + tile) * BiasStage<B>::kWarps + warp) * WarpNote::kBytes};
  }
};

// What a block holds of relative bias: cells of the look-up and zeros in the place of weights.
template <class B>
struct BiasTables {
  using Cells = BiasCells<typename B::Cells>;
  static constexpr int kZeroBytes = 384;  // the stages behind them start on 128 bytes
  static constexpr int kBytes = Cells::kBytes + kZeroBytes;

  uint32_t base;

  __device__ Cells cells() const { return Cells(base); }
  // Where a lane's weights of row `row` and column `col` of a tile are, those of block diagonals -1 to 7 from there 32
  // bytes apart: zeros, if the position term is not one weight a diagonal.
  __device__ __forceinline__ uint32_t diagonals(const BiasStage<B>& stage, unsigned code, int row, int col) const {
    static_assert(kZeroBytes >= 9 * 32);
    return code & WarpNote::kClamped ? base + Cells::kBytes + 32 : stage.window().pair(row, col);
  }
  // The zeros, and the stages, which lie behind: without a position term their weights stay zeros. Before anyone fills
  // one.
  __device__ __forceinline__ void clear_stages(int bytes, int thread, int threads) const {
    for (int i = thread; i < (kZeroBytes + bytes) / 4; i += threads) ptx::st_shared(base + Cells::kBytes + i * 4, 0u);
  }
  // By `threads` threads that meet in sync(). memory: of GlobalCells.
  template <class Sync>
  __device__ __forceinline__ void make(const RelativeBiasParams& p, void* memory, float argument, int thread,
                                       int threads, const Sync& sync) const {
    if (p.time_weight) {
      Cells(base, memory, 0).make(TimeTerm(p, Sequence(), 0, nullptr), argument, thread, threads, sync);
    } else {
      sync();
    }
  }
  // For an item of another head; those of one head share tables.
  template <class Sync>
  __device__ __forceinline__ void turn(const RelativeBiasParams& p, void* memory, int head, float argument, int thread,
                                       int threads, const Sync& sync) const {
    if (!p.time_weight || p.time_head_stride == 0) return;
    sync();
    Cells(base, memory, head).fill(TimeTerm(p, Sequence(), head, nullptr), argument, thread, threads);
    sync();
  }
};

// Where a kernel of configuration C has its tables, stages and notes on their way: one behind the other from `base` on.
template <class C>
struct BiasMemory {
  using Tables = BiasTables<typename C::Relative>;

  uint32_t base;

  __device__ Tables tables() const { return {base}; }
  __device__ uint32_t stage(int index) const { return base + Tables::kBytes + index * C::kBiasStageBytes; }
  __device__ typename C::Notes notes() const { return {stage(C::kBiasStages)}; }
  __device__ uint32_t end() const { return notes().base + C::Notes::kBytes; }
};

// Shape and what a bias (one of tile/bias.h) adds to it where rows are queries: warps of the loading warpgroup that
// prepare it, stages and room for them.
template <class Shape, class Bias_, class Cells, int kNotedTiles, int kStages>
struct BiasPlan : Shape {
  using Bias = Bias_;
  using Relative = BiasShape<Shape::kRows, false, Cells, kNotedTiles>;
  using Notes = NoteQueue<Relative, 2, kNotedTiles>;
  static constexpr int kPreparers = kIsRelative<Bias> ? 2 : 0;
  static constexpr int kBiasStages = kStages;
  static constexpr int kBiasStageBytes = kPreparers ? BiasStage<Relative>::kBytes : 0;
  static constexpr int kBiasBytes =
      kPreparers ? BiasTables<Relative>::kBytes + kBiasStages * kBiasStageBytes + Notes::kBytes : 0;
  static constexpr int kTimeRows = kPreparers ? Shape::kRows : 1;  // of an item, whose times it keeps
};

}  // namespace hstu_ops::cuda::sm90
