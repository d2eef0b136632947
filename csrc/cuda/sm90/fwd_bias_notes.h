// What a warp works out ahead of the computing ones, where rows are queries: which of a few ways to add the bias does
// for each tile of each of them.
#pragma once

#include "cuda/sm90/bias_notes.h"
#include "cuda/sm90/fwd_items.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class Storage>
class BiasNoter {
 public:
  __device__ BiasNoter(const AttentionProblem& problem, float factor, const Storage& shared)
      : problem_(problem), shared_(shared), times_(problem.relative, shared.bias().tables(), factor) {}

  // Of 16 queries each whose times do not rise, the ends are such that TimeEnds is not ordinary.
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

  // Notes of `count` tiles, at most as many as a buffer of the queue holds, of which lane i passes tile i (later ones
  // the last), for all computing warps.
  __device__ __forceinline__ void note_tiles(const FwdItem<C>& item, int tile, int count, int buffer) const {
    const bool timed = problem_.relative.time_weight != nullptr;
    KeyTimes keys = {};
    if (timed) keys = read_keys(times(item), tile);
#pragma unroll 1
    for (int pair = lane_id(); pair - lane_id() < count * kWarps; pair += 32) {
      static_assert(Queue::kTiles * kWarps % 32 == 0);  // all lanes have a place to write to
      const int i = pair / kWarps, warp = pair % kWarps, col = __shfl_sync(~0u, tile, i) * C::kCols;
      const TimeEnds at = {__shfl_sync(~0u, keys.left, i), __shfl_sync(~0u, keys.right, i), item.ends[warp].x,
                           item.ends[warp].y};
      const bool rise = __shfl_sync(~0u, keys.rise, i);
      const WarpNote note = shared_.bias().notes().at(buffer, i, warp);
      note.set(0, 0.f);
      if (timed) times_.note(times(item), rise && at.ordinary(), at.low(), at.high(), static_cast<int>(at.left), note);
      const Mask& mask = item.job.sequence.mask;
      const int top = item.row() + warp * 16;
      if (problem_.relative.position_weight && !PositionTerm::linear(mask, {top, col}, 16, C::kCols))
        note.mark(clamped_bits<B>(mask, item.row(), top, col));
      if (note.head().x != 0) {
        const RowSpans kept = mask.rows(top, top + 16);
        const int end = max_int(max_int(kept.prefix.hi, kept.window.hi), kept.group.hi);
        note.mark(clamp_int(ceil_div(end - col, 8), 0, C::kCols / 8) * WarpNote::kBlocks);
      }
    }
  }

 private:
  using B = typename C::Relative;
  static constexpr int kWarps = BiasStage<B>::kWarps;
  using Queue = typename C::Notes;

  __device__ TimeTerm times(const FwdItem<C>& item) const {
    return {problem_.relative, item.job.sequence, item.job.item.head, nullptr};
  }

  // Whether the times of a tile's keys rise, the first and the last of them. Lane i passes tile i and gets its.
  struct KeyTimes {
    long long left, right;
    bool rise;
  };
  __device__ __forceinline__ KeyTimes read_keys(const TimeTerm& time, int tile) const {
    constexpr int kBatch = C::kLoadRegisters >= 80 ? Queue::kTiles : 4;  // whose loads are in flight together
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

  const AttentionProblem& problem_;
  const Storage& shared_;
  TimeNoter<B> times_;
};

}  // namespace hstu_ops::cuda::sm90
