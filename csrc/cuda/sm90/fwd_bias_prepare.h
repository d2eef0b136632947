// What two warps of the loading warpgroup do for the computing ones where there is relative bias. One works out what
// each computing warp will find in a tile, eight tiles at a time; the other copies that, the weights of the position
// term by diagonal and the times of the keys into a ring of stages, without waiting for memory:
//
//   notes_full    the noting warp              notes_empty    the filling warp
//   bias_full     the filling warp's first lane, and each of its lanes when its copies have landed
//   bias_empty    each computing warpgroup
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
    Ring<C::kBiasStages> ring;
    each_item([&](const FwdItem<C>& item) {
      int noted = 0;
#pragma unroll 1
      for (int tile = item.tiles().next(-1); tile < item.tiles().end(); tile = item.tiles().next(tile), ring.next()) {
        if (noted == 0) shared_.barrier.notes_full[buffer_.stage].wait(buffer_.round);
        shared_.barrier.bias_empty[ring.stage].wait(ring.round ^ 1);
        fill(BiasStage<C>(shared_.bias_stage(ring.stage)), item, tile * C::kCols, noted);
        ptx::cp_async_arrive(shared_.barrier.bias_full[ring.stage].address());
        __syncwarp();
        if (lane_id() == 0) shared_.barrier.bias_full[ring.stage].arrive();
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
      const int from = col - row(item) - (C::kRows - 1) + position.positions - 1, last = 2 * position.positions - 2;
      if (from >= 3 && from + BiasStage<C>::kWindow + 3 <= last) {
        stage.copy_window(position.weight + from);
      } else {
        stage.copy_window(position.weight, [=](int e) { return clamp_int(from + e, 0, last); });
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

  __device__ __forceinline__ void read_queries(FwdItem<C>& item) const {
    const TimeTerm time = times(item);
#pragma unroll
    for (int i = 0; i < C::kRows / 32; ++i) {
      long long lo = time.query_time(row(item) + i * 32 + lane_id()), hi = lo;
      item.times[i * 32 + lane_id()] = static_cast<int>(lo);
#pragma unroll
      for (int d = 8; d > 0; d /= 2) {
        lo = min(lo, __shfl_xor_sync(~0u, lo, d));
        hi = max(hi, __shfl_xor_sync(~0u, hi, d));
      }
      if (lane_id() % 16 == 0) item.ends[i * 2 + lane_id() / 16] = make_longlong2(lo, hi);
    }
    __syncwarp();
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
    const unsigned rises = timed ? rising(times(item), tile) : 0;
#pragma unroll 1
    for (int pair = lane_id(); pair < Queue::kTiles * kWarps; pair += 32) {
      static_assert(Queue::kTiles * kWarps % 32 == 0);
      const int i = pair / kWarps, warp = pair % kWarps, col = __shfl_sync(~0u, tile, i) * C::kCols;
      WarpNote note = {};
      if (timed) {
        const TimeTerm time = times(item);
        const long long l = time.key_time(col), r = time.key_time(col + C::kCols - 1);
        const long long first = item.ends[warp].x, last = item.ends[warp].y;
        const bool known = (rises >> i & 1) && min(first, l) >= -kFar && max(last, r) <= kFar && r - l <= INT32_MAX;
        note = note_times(time, known, first - r, last - l);
      }
      if (problem_.relative.position_weight && !linear(item.job.sequence.mask, row(item) + warp * 16, col))
        note.note.code |= BiasNote::kElementwise;
      note.store(shared_.notes().at(buffer_.stage, i, warp));
    }
  }

  // Of a tile with gaps lo to hi, if known.
  __device__ __forceinline__ WarpNote note_times(const TimeTerm& time, bool known, long long lo, long long hi) const {
    WarpNote note = {{static_cast<unsigned>(BiasNote::kMany) << BiasNote::kFirstBits}, time.count, 0, 0.f};
    if (!known) return note;
    unsigned span = 0;
    const WarpNote looked_up = look_up(lo, hi, span);
    if (span > kSparse) return looked_up;
    // Weights in the cells are those of the head that is computed now.
    if (looked_up.cells() && problem_.relative.time_head_stride == 0)
      return count(static_cast<int>(lo), static_cast<int>(hi), span / 4, looked_up);
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
  // From the cells of gaps lo to hi, `more` of them behind the first: that of one or two buckets, or else the note
  // given.
  __device__ __forceinline__ WarpNote count(int lo, int hi, unsigned more, const WarpNote& many) const {
    const Cells cells = shared_.bias_tables().cells();
    uint32_t cell = cells.cell(lo, cells.octave(Cells::octave_of(lo)));
    WarpNote note = {};
    note.word = ptx::ld_shared_int(cell + (lo >= ptx::ld_shared_int(cell) ? 4 : 0) + Cells::kWeight);
    int steps = 0;
    for (unsigned i = 0; i <= more; ++i, cell += 4) {
      const int boundary = ptx::ld_shared_int(cell);
      if (boundary <= lo || boundary > hi) continue;
      ++steps, note.boundary = boundary;
      note.change = ptx::ld_shared(cell + Cells::kWeight + 4) - ptx::ld_shared(cell + Cells::kWeight);
    }
    if (steps == 1) note.note.code = WarpNote::kStep | 1u << BiasNote::kFirstBits;
    return steps <= 1 ? note : many;
  }
  // The note of a tile that is looked up in the cells, if they answer for gaps lo to hi; `span`: bytes of those cells.
  __device__ __forceinline__ WarpNote look_up(long long lo, long long hi, unsigned& span) const {
    WarpNote note = {};
    if (lo < -Cells::kGaps || hi >= Cells::kGaps) return note;
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
  unsigned crowded_ = 0;
};

}  // namespace hstu_ops::cuda::sm90
