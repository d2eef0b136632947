// What two warps of the loading warpgroup of the Hopper backward do for the computing ones where there is relative
// bias. One notes, some tiles ahead, what each computing warp will find (bias_notes.h); the loading one fills a stage
// for each tile with those notes, the weights of the position term by diagonal and the times of the queries.
#pragma once

#include "cuda/sm90/bias_notes.h"
#include "cuda/sm90/bwd_storage.h"

namespace hstu_ops::cuda::sm90 {

// What the loading warp does for a tile.
template <class C, class T>
struct BwdFiller {
  using B = typename C::Relative;
  using Stage = BiasStage<B>;

  const BwdArguments& arguments;
  const BwdStorage<C, T>& shared;
  Count at;

  // The window arrives when it is there; the times are on their way while the stage and the notes are waited for.
  __device__ __forceinline__ void fill(const Job& job, BwdTile tile) const {
    const RelativeBiasParams& relative = arguments.params.problem.relative;
    const int lane = Lane().id, row = job.sequence.first_row + tile.tile() * C::kQueries;
    int times[B::kCols / 32];
    long long last = 0;
    if (relative.time_weight) {
      const TimeTerm time(relative, job.sequence, job.item.head, nullptr);
#pragma unroll
      for (int i = 0; i < B::kCols / 32; ++i)
        last = B::time(time.query_time(row + i * 32 + lane)), times[i] = static_cast<int>(last);
    }
    Gate<C::kBiasStages>& gate = shared.state.barrier.bias;
    const int index = at.stage<C::kBiasStages>();
    gate.empty[index].wait(at.round<C::kBiasStages>() ^ 1);
    const Stage stage(shared.bias().stage(index));
    const PositionTerm position(relative, job.item.head);
    if (position.weight) {
      const int from = (job.item.block + 1) * C::kKeys - 1 - row + position.positions - 1 - lane,
                last = 2 * position.positions - 2;
#pragma unroll
      for (int i = 0; i < Stage::kWindow / 32; ++i)
        stage.window().copy(i * 32 + lane, position.weight + clamp_int(from - i * 32, 0, last));
    }
    ptx::cp_async_arrive(gate.full[index].address());
    if (relative.time_weight) stage.write_times(times, lane);
    if (B::kLongTimes && lane == 31) stage.set_left(last);
    copy_notes(stage, lane);
    if (lane == 0) gate.full[index].arrive();
  }

 private:
  __device__ __forceinline__ void copy_notes(const Stage& stage, int lane) const {
    using Notes = typename C::Notes;
    Gate<Notes::kTiles>& gate = shared.state.barrier.notes;
    const int index = at.stage<Notes::kTiles>();
    gate.full[index].wait(at.round<Notes::kTiles>());
    constexpr int kChunks = Stage::kWarps * WarpNote::kBytes / 16;
    static_assert(kChunks <= 32);
    if (lane < kChunks)
      ptx::st_shared(stage.note(0).at + lane * 16,
                     ptx::ld_shared_u4(shared.bias().notes().at(0, index, 0).at + lane * 16));
    __syncwarp();
    if (lane == 0) gate.empty[index].arrive();
  }
};

// The noting warp.
template <class C, class T>
class BwdNoter {
 public:
  __device__ BwdNoter(const BwdArguments& arguments, const BwdStorage<C, T>& shared)
      : relative_(arguments.params.problem.relative),
        shared_(shared),
        times_(relative_, shared.bias().tables(), arguments.factors.bias) {}

  __device__ __forceinline__ void run() {
    put(progress().items, {}), put(progress().parts, {}), put(progress().tiles, {});
#pragma unroll 1
    while (note_item()) {
    }
  }

 private:
  using B = typename C::Relative;
  using Notes = typename C::Notes;
  static constexpr int kWarps = BiasStage<B>::kWarps;

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
  __device__ __forceinline__ bool note_item() const {
    Gate<kBwdJobs>& gate = shared_.state.barrier.job;
    gate.full[job_stage()].wait(progress().items.template round<kBwdJobs>());
    if (!shared_.state.jobs[job_stage()].more) return false;
    if (relative_.time_weight) read_keys(job(), rows());
    put(progress().some, false);
#pragma unroll 1
    while (!note_part()) {
    }
    if (lane_id() == 0) gate.empty[job_stage()].arrive();
    advance(progress().items);
    return true;
  }

  // The same tiles as the loading warp, in the same order. Is it the item's last part?
  __device__ __forceinline__ bool note_part() const {
    Gate<kBwdParts>& gate = shared_.state.barrier.part;
    gate.full[part_stage()].wait(progress().parts.template round<kBwdParts>());
    const TilePart& part = shared_.state.parts[part_stage()];
    unsigned left = __ballot_sync(~0u, part.tiles[lane_id()].visited());
    if (left == 0 && part.last && !progress().some) left = 1;  // see BwdLoader; nobody adds its bias
    if (left != 0) put(progress().some, true);
    put(progress().left, left);
#pragma unroll 1
    while (progress().left != 0) note_some();
    const bool last = shared_.state.parts[part_stage()].last;
    __syncwarp();
    if (lane_id() == 0) gate.empty[part_stage()].arrive();
    advance(progress().parts);
    return last;
  }

  // The next few of a part's tiles that are left, a bit each.
  __device__ __forceinline__ void note_some() const {
    Gate<Notes::kTiles>& gate = shared_.state.barrier.notes;
    unsigned left = progress().left;
    Count at = progress().tiles;
    int count = 0;
#pragma unroll 1
    for (; count < B::kNotedTiles && left != 0; ++count, at.next(), left &= left - 1) {
      gate.empty[place(at)].wait(at.round<Notes::kTiles>() ^ 1);
      const BwdTile tile = shared_.state.parts[part_stage()].tiles[__ffs(left) - 1];
      if (lane_id() == 0)
        shared_.state.columns[place(at)].row = job().sequence.first_row + tile.tile() * C::kQueries,
        shared_.state.columns[place(at)].tile = tile;
    }
    put(progress().left, left);
    if (relative_.time_weight) read_queries(count);
    __syncwarp();
    note_tiles(count);
    __syncwarp();
    if (lane_id() < count) gate.full[place({progress().tiles.count + lane_id()})].arrive();
    put(progress().tiles, {progress().tiles.count + count});
  }
  __device__ static int place(Count at) { return at.stage<Notes::kTiles>(); }

  // Of 16 keys, or of the queries of a tile, whose times do not rise, the ends are such that TimeEnds is not ordinary.
  __device__ __forceinline__ void read_keys(const Job& job, BwdRows<C>& rows) const {
    constexpr int kCount = C::kKeys / 32;
    long long t[kCount];  // requested together
    {
      const TimeTerm time = times(job);
      const int first = first_key(job) + Lane().id;
#pragma unroll
      for (int i = 0; i < kCount; ++i) t[i] = time.key_time(first + i * 32);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int lane = Lane().id;
      const long long x = B::time(t[i]), next = __shfl_down_sync(~0u, x, 1);
      rows.times[i * 32 + lane] = static_cast<int>(x);
      const unsigned falls = __ballot_sync(~0u, lane % 16 < 15 && x < next) >> (lane & 16);
      longlong2& ends = rows.ends[i * 2 + lane / 16];
      if (lane % 16 == 0) ends.y = falls & 0xffff ? INT64_MAX : x;
      if (lane % 16 == 15) ends.x = falls & 0xffff ? INT64_MIN : x;
    }
    __syncwarp();
  }
  // All tiles together: kLanes lanes each, kTimes times a lane.
  __device__ __forceinline__ void read_queries(int count) const {
    constexpr int kLanes = 32 / B::kNotedTiles, kTimes = B::kCols / kLanes;
    const int lane = Lane().id, mine = lane % kLanes;
    BwdColumns& columns = shared_.state.columns[place({progress().tiles.count + min_int(lane / kLanes, count - 1)})];
    const TimeTerm time = times(job());
    long long t[kTimes];
#pragma unroll
    for (int i = 0; i < kTimes; ++i) t[i] = B::time(time.query_time(columns.row + mine * kTimes + i));
    const long long next = __shfl_down_sync(~0u, t[0], 1);
    bool falls = mine < kLanes - 1 && t[kTimes - 1] < next;
#pragma unroll
    for (int i = 0; i < kTimes - 1; ++i) falls = falls || t[i] < t[i + 1];
    constexpr unsigned kTile = (1u << kLanes) - 1;
    falls = (__ballot_sync(~0u, falls) >> (lane - mine) & kTile) != 0;
    if (lane / kLanes >= count) return;
    if (mine == 0) columns.ends.y = falls ? INT64_MAX : t[0];
    if (mine == kLanes - 1) columns.ends.x = falls ? INT64_MIN : t[kTimes - 1];
  }

  __device__ __forceinline__ void note_tiles(int count) const {
#pragma unroll 1
    for (int pair = Lane().id; pair < count * kWarps; pair += 32) {
      const int i = place({progress().tiles.count + pair / kWarps}), warp = pair % kWarps;
      const BwdColumns& columns = shared_.state.columns[i];
      const WarpNote note = shared_.bias().notes().at(0, i, warp);
      note.set(0, 0.f);
      if (relative_.time_weight) {
        const TimeEnds at = {columns.ends.x, columns.ends.y, rows().ends[warp].x, rows().ends[warp].y};
        times_.note(times(job()), at.ordinary(), at.low(), at.high(), static_cast<int>(at.left), note);
      }
      const Mask& mask = job().sequence.mask;
      const int key = first_key(job()) + warp * 16;
      if (relative_.position_weight && !PositionTerm::linear(mask, {columns.row, key}, C::kQueries, 16))
        note.mark(clamped_bits<B>(mask, first_key(job()), key, columns.row));
      if (note.head().x & WarpNote::kBlockwise && !columns.tile.covered(warp / 4))
        note.mark(unkept_blocks(mask, columns.row, key) * WarpNote::kBlocks);
    }
  }
  // Blocks of 8 queries in front of the first that keeps some of 16 keys.
  __device__ static __forceinline__ unsigned unkept_blocks(const Mask& mask, int row, int key) {
    unsigned blocks = 0;
#pragma unroll 1
    while (blocks < B::kCols / 8 && !mask.touches(row, row + 8, key, key + 16)) ++blocks, row += 8;
    return blocks;
  }

  const RelativeBiasParams& relative_;
  const BwdStorage<C, T>& shared_;
  TimeNoter<B> times_;
};

}  // namespace hstu_ops::cuda::sm90
