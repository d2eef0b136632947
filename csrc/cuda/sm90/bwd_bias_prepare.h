// What a warp of the loading warpgroup of the Hopper backward does for the computing ones where there is relative bias:
// some tiles ahead it notes what each computing warp will find (bias_notes.h), then fills a stage for each with those
// notes, the weights of the position term by diagonal and the times of the queries.
#pragma once

#include "cuda/sm90/bias_notes.h"
#include "cuda/sm90/bwd_load.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T>
class BwdPreparer {
 public:
  __device__ BwdPreparer(const BwdArguments& arguments, const BwdStorage<C, T>& shared)
      : relative_(arguments.params.problem.relative),
        shared_(shared),
        times_(relative_, shared.bias_tables(), arguments.bias_factor) {}

  __device__ __forceinline__ void run() {
    put(progress().items, {}), put(progress().parts, {}), put(progress().tiles, {});
#pragma unroll 1
    while (prepare_item()) {
    }
  }

 private:
  using B = typename C::Relative;
  using Stage = BiasStage<B>;
  using Queue = typename C::Notes;
  static constexpr int kWarps = Stage::kWarps;

  __device__ TimeTerm times(const Job& job) const { return {relative_, job.sequence, job.item.head, nullptr}; }
  __device__ static int first_key(const Job& job) { return job.item.block * C::kKeys; }

  // Where the warp is, and what else lasts longer than a tile, is kept in shared memory: registers are few.
  __device__ BwdProgress& progress() const { return shared_.state.progress; }
  template <class X>
  __device__ __forceinline__ static void put(X& to, const X& value) {
    __syncwarp();
    if (lane_id() == 0) to = value;
    __syncwarp();
  }
  __device__ __forceinline__ static void advance(Count& at) { put(at, {at.count + 1}); }
  __device__ int job_stage() const { return progress().items.template stage<kBwdJobs>(); }
  __device__ int part_stage() const { return progress().parts.template stage<kBwdParts>(); }
  __device__ const Job& job() const { return shared_.state.jobs[job_stage()].job; }
  __device__ BwdRows<C>& rows() const { return shared_.state.rows[job_stage()]; }

  // False: there is none.
  __device__ __forceinline__ bool prepare_item() const {
    Gate<kBwdJobs>& gate = shared_.state.barrier.job;
    gate.full[job_stage()].wait(progress().items.template round<kBwdJobs>());
    if (!shared_.state.jobs[job_stage()].more) return false;
    if (relative_.time_weight) read_keys(job(), rows());
    put(progress().some, false);
#pragma unroll 1
    while (!prepare_part()) {
    }
    if (lane_id() == 0) gate.empty[job_stage()].arrive();
    advance(progress().items);
    return true;
  }

  // The same tiles as the loading warp, in the same order. Is it the item's last part?
  __device__ __forceinline__ bool prepare_part() const {
    Gate<kBwdParts>& gate = shared_.state.barrier.part;
    gate.full[part_stage()].wait(progress().parts.template round<kBwdParts>());
    const TilePart& part = shared_.state.parts[part_stage()];
    unsigned left = __ballot_sync(~0u, part.tiles[lane_id()].visited());
    if (left == 0 && part.last && !progress().some) left = 1;  // see BwdLoader; nobody adds its bias
    if (left != 0) put(progress().some, true);
    put(progress().left, left);
#pragma unroll 1
    while (progress().left != 0) prepare_tiles();
    const bool last = shared_.state.parts[part_stage()].last;
    __syncwarp();
    if (lane_id() == 0) gate.empty[part_stage()].arrive();
    advance(progress().parts);
    return last;
  }

  // The next few of a part's tiles that are left, a bit each.
  __device__ __forceinline__ void prepare_tiles() const {
    unsigned left = progress().left;
    int count = 0;
#pragma unroll 1
    for (; count < Queue::kTiles && left != 0; ++count, left &= left - 1) {
      const int tile = shared_.state.parts[part_stage()].tiles[__ffs(left) - 1].tile();
      read_queries(job(), job().sequence.first_row + tile * C::kQueries, count);
    }
    put(progress().left, left);
    note_tiles(count);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      fill_stage(job(), progress().tiles, i);
      advance(progress().tiles);
    }
  }

  // Of 16 keys, or of the queries of a tile, whose times do not rise, the ends are such that TileTimes is not ordinary.
  __device__ __forceinline__ void read_keys(const Job& job, BwdRows<C>& rows) const {
    const TimeTerm time = times(job);
#pragma unroll 2
    for (int i = lane_id(); i < C::kKeys; i += 32) {
      const long long t = B::time(time.key_time(first_key(job) + i)), next = __shfl_down_sync(~0u, t, 1);
      rows.times[i] = static_cast<int>(t);
      const unsigned falls = __ballot_sync(~0u, lane_id() % 16 < 15 && t < next) >> (lane_id() & 16);
      longlong2& ends = rows.ends[i / 16];
      if (lane_id() % 16 == 0) ends.y = falls & 0xffff ? INT64_MAX : t;
      if (lane_id() % 16 == 15) ends.x = falls & 0xffff ? INT64_MIN : t;
    }
    __syncwarp();
  }
  __device__ __forceinline__ void read_queries(const Job& job, int row, int to) const {
    BwdColumns& columns = shared_.state.columns[to];
    if (lane_id() == 0) columns.row = row;
    if (!relative_.time_weight) return;
    const TimeTerm time = times(job);
    const long long a = B::time(time.query_time(row + lane_id() * 2)),
                    b = B::time(time.query_time(row + lane_id() * 2 + 1)), next = __shfl_down_sync(~0u, a, 1);
    const bool falls = __any_sync(~0u, a < b || (lane_id() < 31 && b < next));
    if (lane_id() == 0) columns.ends.y = falls ? INT64_MAX : a;
    if (lane_id() == 31) columns.ends.x = falls ? INT64_MIN : b;
  }

  __device__ __forceinline__ void note_tiles(int count) const {
#pragma unroll 1
    for (int pair = Lane().id; pair < count * kWarps; pair += 32) {
      const int i = pair / kWarps, warp = pair % kWarps;
      const BwdColumns& columns = shared_.state.columns[i];
      const WarpNote note = shared_.notes().at(0, i, warp);
      note.set(0, 0.f);
      if (relative_.time_weight) {
        const TileTimes at = {columns.ends.x, columns.ends.y, rows().ends[warp].x, rows().ends[warp].y};
        times_.note(times(job()), at.ordinary(), at.low(), at.high(), static_cast<int>(at.left), note);
      }
      const Mask& mask = job().sequence.mask;
      const int key = first_key(job()) + warp * 16;
      if (relative_.position_weight && !linear<C::kQueries, 16>(mask, columns.row, key))
        note.mark(WarpNote::kElementwise);
      if (note.head().x != 0) note.mark(unkept_blocks(mask, columns.row, key) * WarpNote::kBlocks);
    }
  }
  // Blocks of 8 queries in front of the first that keeps some of 16 keys.
  __device__ static __forceinline__ unsigned unkept_blocks(const Mask& mask, int row, int key) {
    unsigned blocks = 0;
#pragma unroll 1
    while (blocks < B::kCols / 8 && !mask.touches(row, row + 8, key, key + 16)) ++blocks, row += 8;
    return blocks;
  }

  // The window arrives when it is there: held in registers until the stage is free, it would be more than there are.
  __device__ __forceinline__ void fill_stage(const Job& job, Count tiles, int noted) const {
    const int query = shared_.state.columns[noted].row, lane = Lane().id;
    int part[B::kCols / 32];
    if (relative_.time_weight) {
      const TimeTerm time = times(job);
#pragma unroll
      for (int i = 0; i < B::kCols / 32; ++i)
        part[i] = static_cast<int>(B::time(time.query_time(query + i * 32 + lane)));
    }
    Gate<C::kBiasStages>& gate = shared_.state.barrier.bias;
    const int at = tiles.stage<C::kBiasStages>();
    gate.empty[at].wait(tiles.round<C::kBiasStages>() ^ 1);
    const Stage stage(shared_.bias_stage(at));
    const PositionTerm position(relative_, job.item.head);
    if (position.weight) {
      const int from = first_key(job) - query + C::kKeys - 1 + position.positions - 1 - lane,
                last = 2 * position.positions - 2;
#pragma unroll
      for (int i = 0; i < Stage::kWindow / 32; ++i)
        stage.copy_weight(i * 32 + lane, position.weight + clamp_int(from - i * 32, 0, last));
    }
    ptx::cp_async_arrive(gate.full[at].address());
    if (relative_.time_weight) stage.write_times(part, lane);
    constexpr int kChunks = kWarps * WarpNote::kBytes / 16;
    static_assert(kChunks <= 32);
    if (lane < kChunks)
      ptx::st_shared(stage.note(0).at + lane * 16, ptx::ld_shared_u4(shared_.notes().at(0, noted, 0).at + lane * 16));
    __syncwarp();
    if (lane == 0) gate.full[at].arrive();
  }

  const RelativeBiasParams& relative_;
  const BwdStorage<C, T>& shared_;
  TimeNoter<B> times_;
};

}  // namespace hstu_ops::cuda::sm90
