// What two warps of the loading warpgroup do for the computing ones where there is relative bias. One works out what
// each computing warp will find in a tile (fwd_bias_notes.h), some tiles at a time; the other copies that, the weights
// of the position term by diagonal and the times of the keys into a ring of stages, which it has read while the tile
// before was written:
//
//   notes_full    the noting warp              notes_empty    the filling warp
//   bias_full     the filling warp
//   bias_empty    each computing warpgroup
#pragma once

#include "cuda/sm90/fwd_bias.h"
#include "cuda/sm90/fwd_bias_notes.h"
#include "cuda/sm90/ring.h"

namespace hstu_ops::cuda::sm90 {

// `shared` has what FwdStorage has of it. Used by the backward's kernel for dQ, too.
template <class C, class Storage>
class BiasPreparer {
 public:
  // `factor`: what weights are multiplied with.
  __device__ BiasPreparer(const AttentionProblem& problem, float factor, const Storage& shared)
      : problem_(problem), shared_(shared), noter_(problem, factor, shared) {}

  // Warp 2 of the loading warpgroup notes, warp 3 fills.
  __device__ __forceinline__ void run(int warp) {
    if (warp == 2) {
      take_notes();
    } else {
      fill_stages();
    }
  }

 private:
  using Stage = BiasStage<typename C::Relative>;
  static constexpr int kWarps = Stage::kWarps;
  using Queue = typename C::Notes;

  __device__ __forceinline__ void take_notes() {
    each_item([this](FwdItem<C>& item) {
      if (problem_.relative.time_weight) noter_.read_queries(item);
      int tile = item.tiles().next(-1);
      while (tile < item.tiles().end()) {
        int mine = tile, count = 0;  // lane i: tile i of the next ones
#pragma unroll 1
        for (; count < Queue::kTiles && tile < item.tiles().end(); ++count, tile = item.tiles().next(tile))
          if (count <= lane_id()) mine = tile;
        shared_.barrier.notes.empty[buffer_.stage].wait(buffer_.round ^ 1);
        noter_.note_tiles(item, mine, count, buffer_.stage);
        __syncwarp();
        if (lane_id() == 0) shared_.barrier.notes.full[buffer_.stage].arrive();
        buffer_.next();
      }
    });
  }

  __device__ __forceinline__ void fill_stages() {
    Ring<C::kBiasStages> ring;
    each_item([&](const FwdItem<C>& item) {
      int noted = 0;
      typename Stage::Part part = {};
      int tile = item.tiles().next(-1);
      if (tile < item.tiles().end()) load(part, item, tile * C::kCols);
#pragma unroll 1
      while (tile < item.tiles().end()) {
        if (noted == 0) shared_.barrier.notes.full[buffer_.stage].wait(buffer_.round);
        shared_.barrier.bias.empty[ring.stage].wait(ring.round ^ 1);
        fill(Stage(shared_.bias().stage(ring.stage)), part, noted);
        __syncwarp();
        if (lane_id() == 0) shared_.barrier.bias.full[ring.stage].arrive();
        tile = item.tiles().next(tile);
        ring.next();
        if (tile < item.tiles().end()) load(part, item, tile * C::kCols);
        if (++noted == Queue::kTiles) release_notes(), noted = 0;
      }
      if (noted > 0) release_notes();
    });
  }

  template <class F>
  __device__ __forceinline__ void each_item(F&& f) const {
    for (Ring<kItems> at;; at.next()) {
      FwdItem<C>& item = shared_.items[at.stage];
      shared_.barrier.item.full[at.stage].wait(at.round);
      if (!item.more) return;
      f(item);
      __syncwarp();
      if (lane_id() == 0) shared_.barrier.item.empty[at.stage].arrive();
    }
  }
  __device__ __forceinline__ void release_notes() {
    __syncwarp();
    if (lane_id() == 0) shared_.barrier.notes.empty[buffer_.stage].arrive();
    buffer_.next();
  }

  // Begins to read what the stage of a tile from column `col` on holds.
  __device__ __forceinline__ void load(typename Stage::Part& part, const FwdItem<C>& item, int col) const {
    const PositionTerm position(problem_.relative, item.job.item.head);
    if (position.weight) {
      const int from = col - item.row() - (C::kRows - 1) + position.positions - 1, last = 2 * position.positions - 2;
      const bool inside = from >= 0 && from + Stage::kWindow <= last;
#pragma unroll
      for (int i = 0; i < Stage::kWindow / 32; ++i) {
        const int e = from + i * 32 + lane_id();
        part.weights[i] = ptx::ld_global(position.weight + (inside ? e : clamp_int(e, 0, last)));
      }
    }
    if (problem_.relative.time_weight) {
      const TimeTerm time(problem_.relative, item.job.sequence, item.job.item.head, nullptr);
#pragma unroll
      for (int i = 0; i < C::kCols / 32; ++i) part.times[i] = static_cast<int>(time.key_time(col + i * 32 + lane_id()));
    }
  }
  __device__ __forceinline__ void fill(const Stage& stage, const typename Stage::Part& part, int noted) const {
    if (problem_.relative.position_weight) stage.write_window(part);
    if (problem_.relative.time_weight) stage.write_times(part.times, lane_id());
    constexpr int kChunks = kWarps * WarpNote::kBytes / 16;
    static_assert(kChunks <= 32);
    if (lane_id() < kChunks)
      ptx::st_shared(stage.note(0).at + lane_id() * 16,
                     ptx::ld_shared_u4(shared_.bias().notes().at(buffer_.stage, noted, 0).at + lane_id() * 16));
  }

  const AttentionProblem& problem_;
  const Storage& shared_;
  Ring<Queue::kBuffers> buffer_;
  BiasNoter<C, Storage> noter_;
};

// By the preparing and the computing warps, while the first items are found: called before their roles part, for
// compute-sanitizer takes copies of one barrier for different ones.
template <class C, class Storage>
__device__ __forceinline__ void make_bias_tables(const RelativeBiasParams& relative, void* cells, float factor,
                                                 const Storage& shared) {
  constexpr int kThreads = C::kThreads - 64;
  const auto tables = shared.bias().tables();
  tables.clear_stages(C::kBiasStages * C::kBiasStageBytes, threadIdx.x - 64, kThreads);
  tables.make(relative, cells, factor, threadIdx.x - 64, kThreads, [] { meet(2 + C::kGroups, kThreads); });
}

}  // namespace hstu_ops::cuda::sm90
