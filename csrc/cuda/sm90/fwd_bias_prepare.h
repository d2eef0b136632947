// What two warps of the loading warpgroup do for the computing ones where there is relative bias. One works out what
// each computing warp will find in a tile, eight tiles at a time; the other copies that, the weights of the position
// term by diagonal and the times of the keys into the stage of a tile, without waiting for memory:
//
//   notes_full    the noting warp              notes_empty    the filling warp
//   key_full      the loading lane, the filling warp's first lane, and each of its lanes when its copies have landed
#pragma once

#include "cuda/sm90/fwd_bias.h"
#include "cuda/sm90/fwd_storage.h"
#include "cuda/sm90/ring.h"
#include "cuda/tile/score.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T>
class BiasPreparer {
 public:
  __device__ BiasPreparer(const FwdArguments& arguments, const FwdStorage<C, T>& shared)
      : problem_(arguments.params.problem), shared_(shared) {}

  __device__ __forceinline__ void take_notes() {
    if (problem_.relative.time_weight) crowded_ = shared_.bias_tables().cells().crowded();
    each_item([this](FwdItem<C>& item) {
      if (problem_.relative.time_weight) read_queries(item);
      int tile = item.tiles().next(-1);
      while (tile < item.tiles().end()) {
        int mine = tile;  // lane i: tile i of the next eight
#pragma unroll 1
        for (int i = 0; i < Queue::kTiles; ++i, tile = item.tiles().next(tile))
          if (i <= lane_id()) mine = tile;
        shared_.barrier.notes_empty[buffer_.stage].wait(buffer_.round ^ 1);
        note_tiles(item, mine);
        __syncwarp();
        if (lane_id() == 0) shared_.barrier.notes_full[buffer_.stage].arrive();
        buffer_.next();
      }
    });
  }

  __device__ __forceinline__ void fill_stages() {
    Ring<C::kStages> ring;
    each_item([&](const FwdItem<C>& item) {
      int noted = 0;
#pragma unroll 1
      for (int tile = item.tiles().next(-1); tile < item.tiles().end(); tile = item.tiles().next(tile), ring.next()) {
        if (noted == 0) shared_.barrier.notes_full[buffer_.stage].wait(buffer_.round);
        shared_.barrier.value_empty[ring.stage].wait(ring.round ^ 1);
        fill(BiasStage<C>(shared_.bias_stage(ring.stage)), item, tile * C::kCols, noted);
        ptx::cp_async_arrive(shared_.barrier.key_full[ring.stage].address());
        __syncwarp();
        if (lane_id() == 0) shared_.barrier.key_full[ring.stage].arrive();
        if (++noted == Queue::kTiles) release_notes(), noted = 0;
      }
      if (noted > 0) release_notes();
    });
  }

 private:
  static constexpr int kWarps = BiasStage<C>::kWarps;
  static constexpr int kMostSteps = 3;          // beyond, a look-up in the cells takes less than comparisons
  static constexpr unsigned kSparse = 4 * 32;   // bytes: so many cells hold more boundaries than that
  static constexpr long long kFar = 1ll << 61;  // gaps of nearer times do not wrap around
  using Queue = NoteQueue<C>;
  using Cells = typename BiasTables<C>::Cells;

  template <class F>
  __device__ __forceinline__ void each_item(F&& f) const {
    for (Ring<kItems> at;; at.next()) {
      FwdItem<C>& item = shared_.items[at.stage];
      shared_.barrier.item_full[at.stage].wait(at.round);
      if (!item.more) return;
      f(item);
      __syncwarp();
      if (lane_id() == 0) shared_.barrier.item_empty[at.stage].arrive();
    }
  }
  __device__ __forceinline__ void release_notes() {
    __syncwarp();
    if (lane_id() == 0) shared_.barrier.notes_empty[buffer_.stage].arrive();
    buffer_.next();
  }

  __device__ static int row(const FwdItem<C>& item) { return item.job.sequence.first_row + item.first; }
  __device__ TimeTerm times(const FwdItem<C>& item) const {
    return {problem_.relative, item.job.sequence, item.job.item.head, nullptr};
  }

  // ---- filling ----

  __device__ __forceinline__ void fill(const BiasStage<C>& stage, const FwdItem<C>& item, int col, int noted) const {
    const PositionTerm position(problem_.relative, item.job.item.head);
    if (position.weight) {
      const int from = col - row(item) - (C::kRows - 1) + position.positions - 1;
#pragma unroll
      for (int i = 0; i < BiasStage<C>::kWindow / 32; ++i) {
        const int e = i * 32 + lane_id();
        stage.copy_weight(e, position.weight + clamp_int(from + e, 0, 2 * position.positions - 2));
      }
    }
    if (problem_.relative.time_weight) {
      const TimeTerm time = times(item);
#pragma unroll
      for (int i = 0; i < C::kCols; i += 32)
        stage.copy_time(i + lane_id(), time.key_times + clamp_int(col + i + lane_id(), 0, time.last_key));
    }
    if (lane_id() < kWarps)
      WarpNote::load(shared_.notes().at(buffer_.stage, noted, lane_id())).store(stage.note(lane_id()));
  }

  // ---- noting ----

  // Are distances of logical positions those of rows and columns, for 16 rows and a tile of columns?
  __device__ static bool linear(const Mask& mask, int row, int col) {
    return min_int(row, col) >= mask.shift() &&
           (mask.history == mask.len || max_int(row + 16, col + C::kCols) <= mask.history + 1);
  }

  // Lane `warp` learns the first and the last time of that warp's rows.
  __device__ __forceinline__ void read_queries(FwdItem<C>& item) {
    const TimeTerm time = times(item);
    long long lo[C::kRows / 32];
#pragma unroll
    for (int i = 0; i < C::kRows / 32; ++i) {
      lo[i] = time.query_time(row(item) + i * 32 + lane_id());
      item.times[i * 32 + lane_id()] = static_cast<int>(lo[i]);
    }
#pragma unroll
    for (int i = 0; i < C::kRows / 32; ++i) {
      long long hi = lo[i];
#pragma unroll
      for (int d = 8; d > 0; d /= 2) {
        lo[i] = min(lo[i], __shfl_xor_sync(~0u, lo[i], d));
        hi = max(hi, __shfl_xor_sync(~0u, hi, d));
      }
      const long long least = __shfl_sync(~0u, lo[i], lane_id() % 2 * 16);
      hi = __shfl_sync(~0u, hi, lane_id() % 2 * 16);
      if (lane_id() / 2 == i) first_ = least, last_ = hi;
    }
  }

  // Bit i: the times of tile i's keys rise. Lane i passes tile i.
  __device__ __forceinline__ unsigned rising(const TimeTerm& time, int tile) const {
    unsigned bits = 0;
#pragma unroll
    for (int first = 0; first < Queue::kTiles; first += 2) {
      long long a[2], b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = __shfl_sync(~0u, tile, first + i) * C::kCols + lane_id() * 2;
        a[i] = time.key_time(key), b[i] = time.key_time(key + 1);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const long long next = __shfl_down_sync(~0u, a[i], 1);
        if (__all_sync(~0u, a[i] <= b[i] && (lane_id() == 31 || b[i] <= next))) bits |= 1u << (first + i);
      }
    }
    return bits;
  }

  // Notes of eight tiles, of which lane i passes tile i, for all computing warps.
  __device__ __forceinline__ void note_tiles(const FwdItem<C>& item, int tile) const {
    const bool timed = problem_.relative.time_weight != nullptr;
    long long left = 0, right = 0;
    unsigned rises = 0;
    if (timed) {
      const TimeTerm time = times(item);
      rises = rising(time, tile);
      left = time.key_time(tile * C::kCols), right = time.key_time(tile * C::kCols + C::kCols - 1);
    }
#pragma unroll 1
    for (int pair = lane_id(); pair < Queue::kTiles * kWarps; pair += 32) {
      static_assert(Queue::kTiles * kWarps % 32 == 0);
      const int i = pair / kWarps, warp = pair % kWarps;
      WarpNote note = {};
      if (timed) {
        const long long l = __shfl_sync(~0u, left, i), r = __shfl_sync(~0u, right, i);
        const long long first = __shfl_sync(~0u, first_, warp), last = __shfl_sync(~0u, last_, warp);
        note = note_times(times(item), (rises >> i & 1) && min(first, l) >= -kFar && max(last, r) <= kFar, first - r,
                          last - l, r - l);
      }
      const int col = __shfl_sync(~0u, tile, i) * C::kCols;
      if (problem_.relative.position_weight && !linear(item.job.sequence.mask, row(item) + warp * 16, col))
        note.note.code |= BiasNote::kElementwise;
      note.store(shared_.notes().at(buffer_.stage, i, warp));
    }
  }

  // Of a tile with gaps lo to hi (if known) and keys over `width`.
  __device__ __forceinline__ WarpNote note_times(const TimeTerm& time, bool known, long long lo, long long hi,
                                                 long long width) const {
    WarpNote note = {{static_cast<unsigned>(BiasNote::kMany) << BiasNote::kFirstBits}, time.count, 0, 0.f};
    if (!known || width > INT32_MAX) return note;
    unsigned span = 0;
    const WarpNote looked_up = look_up(lo, hi, width, span);
    if (span > kSparse) return looked_up;
    const int2 range = time.buckets(lo, hi);
    const int steps = range.y - range.x;
    if (range.y >= 1 << BiasNote::kFirstBits) return note;
    if (steps <= (looked_up.cells() ? kMostSteps : BiasNote::kMostSteps)) {
      note.note.code = static_cast<unsigned>(range.x) | static_cast<unsigned>(steps) << BiasNote::kFirstBits;
      const float weight = __ldg(time.weight + range.x);
      note.word = __float_as_int(Score<T>::kArgument * weight);
      if (steps == 1 && looked_up.cells()) {
        note.note.code |= WarpNote::kStep;
        note.boundary = static_cast<int>(__ldg(time.boundaries + range.x));
        note.change = Score<T>::kArgument * (__ldg(time.weight + range.x + 1) - weight);
      }
      return note;
    }
    if (looked_up.cells()) return looked_up;
    note.note.code |= static_cast<unsigned>(range.x), note.word = steps;
    return note;
  }
  // The note of a tile that is looked up in the cells, if they answer for gaps lo to hi; `span`: bytes of those cells.
  __device__ __forceinline__ WarpNote look_up(long long lo, long long hi, long long width, unsigned& span) const {
    WarpNote note = {};
    if (lo < -Cells::kGaps || hi >= Cells::kGaps || width >= Cells::kGaps) return note;
    const Cells cells = shared_.bias_tables().cells();
    const int first = Cells::octave_of(static_cast<int>(lo)), last = Cells::octave_of(static_cast<int>(hi));
    if (crowded_ >> first & ((2u << (last - first)) - 1)) return note;
    const Octave octave = cells.octave(last);
    span = cells.cell(static_cast<int>(hi), octave) - cells.cell(static_cast<int>(lo), cells.octave(first));
    note.note.code = static_cast<unsigned>(BiasNote::kMany) << BiasNote::kFirstBits | WarpNote::kCells;
    if (first == last) {
      note.note.code |= WarpNote::kOneOctave | static_cast<unsigned>(octave.shift);
      note.word = octave.first;
    }
    return note;
  }

  const AttentionProblem& problem_;
  const FwdStorage<C, T>& shared_;
  Ring<Queue::kBuffers> buffer_;
  long long first_ = 0, last_ = 0;  // times of the rows of warp `lane`
  unsigned crowded_ = 0;
};

}  // namespace hstu_ops::cuda::sm90
