// What a warp of the Hopper forward works out ahead of the computing ones: which of a few ways to add the bias does for
// each tile of each of them.
#pragma once

#include "cuda/sm90/fwd_bias.h"
#include "cuda/sm90/fwd_storage.h"
#include "cuda/tile/score.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T>
class BiasNoter {
 public:
  __device__ BiasNoter(const AttentionProblem& problem, const FwdStorage<C, T>& shared)
      : problem_(problem), shared_(shared) {}

  // Once the tables are made.
  __device__ void begin() {
    if (problem_.relative.time_weight) crowded_ = shared_.bias_tables().cells().crowded();
  }

  // Of 16 queries each whose times do not rise, the ends are such that TileTimes is not ordinary.
  __device__ __forceinline__ void read_queries(FwdItem<C>& item) const {
    const TimeTerm time = times(item);
    constexpr int kCount = C::kRows / 32;
    long long t[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) t[i] = time.query_time(item.row() + i * 32 + lane_id());
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      item.times[i * 32 + lane_id()] = static_cast<int>(t[i]);
      const long long next = __shfl_down_sync(~0u, t[i], 1), last = __shfl_down_sync(~0u, t[i], 15);
      const unsigned falls = __ballot_sync(~0u, lane_id() % 16 < 15 && t[i] > next);
      const bool rises = (falls >> lane_id() & 0x7fff) == 0;
      if (lane_id() % 16 == 0)
        item.ends[i * 2 + lane_id() / 16] = rises ? make_longlong2(t[i], last) : make_longlong2(INT64_MIN, INT64_MAX);
    }
    __syncwarp();
  }

  // Notes of as many tiles as a buffer of the queue holds, of which lane i passes tile i, for all computing warps.
  __device__ __forceinline__ void note_tiles(const FwdItem<C>& item, int tile, int buffer) const {
    const bool timed = problem_.relative.time_weight != nullptr;
    KeyTimes keys = {};
    if (timed) keys = read_keys(times(item), tile);
#pragma unroll 1
    for (int pair = lane_id(); pair < Queue::kTiles * kWarps; pair += 32) {
      static_assert(Queue::kTiles * kWarps % 32 == 0);
      const int i = pair / kWarps, warp = pair % kWarps, col = __shfl_sync(~0u, tile, i) * C::kCols;
      const TileTimes at = {__shfl_sync(~0u, keys.left, i), __shfl_sync(~0u, keys.right, i), item.ends[warp].x,
                            item.ends[warp].y};
      const bool rise = __shfl_sync(~0u, keys.rise, i);
      const WarpNote note = shared_.notes().at(buffer, i, warp);
      note.set(0, 0.f);
      if (timed) note_times(times(item), rise && at.ordinary(), at, note);
      const Mask& mask = item.job.sequence.mask;
      const int top = item.row() + warp * 16;
      if (problem_.relative.position_weight && !linear(mask, top, col)) note.mark(WarpNote::kElementwise);
      if (note.head().x != 0) {
        const RowSpans kept = mask.rows(top, top + 16);
        const int end = max_int(max_int(kept.prefix.hi, kept.window.hi), kept.group.hi);
        note.mark(clamp_int(ceil_div(end - col, 8), 0, C::kCols / 8) * WarpNote::kBlocks);
      }
    }
  }

 private:
  static constexpr int kWarps = BiasStage<C>::kWarps;
  static constexpr unsigned kSparse = 4 * 8;    // bytes: more cells hold more boundaries than a note has room for
  static constexpr long long kFar = 1ll << 61;  // gaps of nearer times do not wrap around
  using Queue = NoteQueue<C>;
  using Cells = typename BiasTables<C>::Cells;

  __device__ TimeTerm times(const FwdItem<C>& item) const {
    return {problem_.relative, item.job.sequence, item.job.item.head, nullptr};
  }

  // Are distances of logical positions those of rows and columns, for 16 rows and a tile of columns?
  __device__ static bool linear(const Mask& mask, int row, int col) {
    return min_int(row, col) >= mask.shift() &&
           (mask.history == mask.len || max_int(row + 16, col + C::kCols) <= mask.history + 1);
  }

  // Whether the times of a tile's keys rise, the first and the last of them. Lane i passes tile i and gets its.
  struct KeyTimes {
    long long left, right;
    bool rise;
  };
  __device__ __forceinline__ KeyTimes read_keys(const TimeTerm& time, int tile) const {
    constexpr int kBatch = C::kDim == 64 ? Queue::kTiles : 4;  // whose loads are in flight together
    KeyTimes mine = {};
#pragma unroll
    for (int first = 0; first < Queue::kTiles; first += kBatch) {
      long long a[kBatch], b[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int key = __shfl_sync(~0u, tile, first + i) * C::kCols + lane_id() * 2;
        a[i] = time.key_time(key), b[i] = time.key_time(key + 1);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const long long next = __shfl_down_sync(~0u, a[i], 1), left = __shfl_sync(~0u, a[i], 0),
                        right = __shfl_sync(~0u, b[i], 31);
        const bool rise = __all_sync(~0u, a[i] <= b[i] && (lane_id() == 31 || b[i] <= next));
        if (lane_id() == first + i) mine = {left, right, rise};
      }
    }
    return mine;
  }

  // The first and the last time of a tile's keys and of its queries.
  struct TileTimes {
    long long left, right, first, last;

    __device__ long long low() const { return first - right; }  // the gaps
    __device__ long long high() const { return last - left; }
    // Differences do not wrap around, and those between gaps have 32 bits.
    __device__ bool ordinary() const {
      return min(first, left) >= -kFar && max(last, right) <= kFar && high() - low() <= INT32_MAX;
    }
  };

  // `known`: times rise and are ordinary.
  __device__ __forceinline__ void note_times(const TimeTerm& time, bool known, const TileTimes& at,
                                             const WarpNote& note) const {
    unsigned code = WarpNote::kSearch, span = 0;
    int2 range = {0, time.count};
    if (known) {
      const Octave octave = look_up(at.low(), at.high(), code, span);
      if (code & WarpNote::kCells) {
        note.set_words(octave.first, 0);
        note.set(code, 0.f);
        // Weights in the cells are those of the head that is computed now.
        if (problem_.relative.time_head_stride == 0) {
          if (span <= kSparse) count(at, span / 4, note);
          return;
        }
        if (span > kSparse) return;
      }
      range = time.buckets(at.low(), at.high());
      const int steps = range.y - range.x;
      if (steps <= WarpNote::kMostSteps) {
        float weight = Score<T>::kArgument * __ldg(time.weight + range.x);
        note.set(static_cast<unsigned>(steps), weight);
#pragma unroll 1
        for (int i = 0; i < steps; ++i) {
          const float next = Score<T>::kArgument * __ldg(time.weight + range.x + i + 1);
          note.set_step(i, __ldg(time.boundaries + range.x + i), at.left, next - weight);
          weight = next;
        }
        return;
      }
      if (code & WarpNote::kCells) return;
    }
    note.set(WarpNote::kSearch, 0.f);
    note.set_words(range.x, range.y - range.x);
  }
  // From the cells of the gaps, `more` of them behind the first: the note if there are few buckets; else it stays that
  // of a look-up.
  __device__ __forceinline__ void count(const TileTimes& at, unsigned more, const WarpNote& note) const {
    const Cells cells = shared_.bias_tables().cells();
    const int low = static_cast<int>(at.low()), high = static_cast<int>(at.high());
    const Octave octave = cells.octave(Cells::octave_of(low));
    uint32_t cell = cells.cell(low, octave);
    const float weight = ptx::ld_shared(cell + (low >= ptx::ld_shared_int(cell) ? 4 : 0) + Cells::kWeight);
    int steps = 0;
    for (unsigned i = 0; i <= more; ++i, cell += 4) {
      const int boundary = ptx::ld_shared_int(cell);
      if (boundary <= low || boundary > high) continue;
      if (++steps > WarpNote::kMostSteps) break;
      note.set_step(steps - 1, boundary, at.left,
                    ptx::ld_shared(cell + Cells::kWeight + 4) - ptx::ld_shared(cell + Cells::kWeight));
    }
    if (steps <= WarpNote::kMostSteps) {
      note.set(static_cast<unsigned>(steps), weight);
    } else {
      note.set_words(cells.octave(Cells::octave_of(high)).first, 0);
    }
  }
  // Bits of the note of a tile that is looked up in the cells, if they answer for gaps lo to hi; `span`: bytes of those
  // cells.
  __device__ __forceinline__ Octave look_up(long long lo, long long hi, unsigned& code, unsigned& span) const {
    if (lo < -Cells::kGaps || hi >= Cells::kGaps) return {};
    const Cells cells = shared_.bias_tables().cells();
    const int first = Cells::octave_of(static_cast<int>(lo)), last = Cells::octave_of(static_cast<int>(hi));
    if (crowded_ >> first & ((2u << (last - first)) - 1)) return {};
    const Octave octave = cells.octave(last);
    span = cells.cell(static_cast<int>(hi), octave) - cells.cell(static_cast<int>(lo), cells.octave(first));
    code = WarpNote::kCells;
    if (first == last) code |= WarpNote::kOneOctave | static_cast<unsigned>(octave.shift) * WarpNote::kShift;
    return octave;
  }

  const AttentionProblem& problem_;
  const FwdStorage<C, T>& shared_;
  unsigned crowded_ = 0;
};

}  // namespace hstu_ops::cuda::sm90
