// The bucket of a gap of time in one look-up, and its weight. Gaps of 32 bits are cut into octaves [2^e, 2^(e + 1)) and
// those into cells of equal width, narrow enough that a cell holds at most one boundary (or several equal ones). A cell
// keeps that boundary and the weight of its first gap; the weight beyond the boundary is that of the next cell.
//
// Octaves whose boundaries are too close for the room there is are crowded: their gaps must be searched for.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/tile/time_buckets.h"

namespace hstu_ops::cuda::sm90 {

// A difference of the low words of times.
__device__ __forceinline__ int minus(int a, int b) { return static_cast<int>(0u + a - b); }

// An octave: gap `gap` is in cell (gap >> shift) + first.
struct Octave {
  int shift, first;
};

// Where boundaries and weights are. A cell's address is that of its boundary; kWeight bytes on is the weight of its
// first gap. In shared memory:
template <int kCells_>
struct SharedCells {
  static constexpr int kCells = kCells_, kWeight = (kCells + 4) * 4, kBytes = 2 * kWeight, kGlobalBytes = 0;

  uint32_t first;  // address of cell 0

  // `at`: of kBytes of shared memory; memory, head: see GlobalCells.
  __device__ static SharedCells place(uint32_t at, void* /*memory*/, int /*head*/) { return {at}; }
  __device__ static SharedCells placed(uint32_t at) { return {at}; }
  __device__ int load(uint32_t at) const { return ptx::ld_shared_int(at); }
  __device__ void store(uint32_t at, uint32_t x) const { ptx::st_shared(at, x); }
};

// Or, where tiles leave no room, in global memory, kGlobalBytes for each head that has weights of its own: all blocks
// write the same.
template <int kCells_>
struct GlobalCells {
  static constexpr int kCells = kCells_, kWeight = (kCells + 4) * 4, kBytes = 8 /* where it is */,
                       kGlobalBytes = 2 * kWeight;
  static constexpr uint32_t first = 0;

  char* memory;

  __device__ static GlobalCells place(uint32_t at, void* memory, int head) {
    char* const mine = static_cast<char*>(memory) + static_cast<int64_t>(head) * kGlobalBytes;
    ptx::st_shared_int64(at, reinterpret_cast<int64_t>(mine));
    return {mine};
  }
  __device__ static GlobalCells placed(uint32_t at) { return {reinterpret_cast<char*>(ptx::ld_shared_int64(at))}; }
  __device__ int load(uint32_t at) const { return ptx::ld_global_int(memory + at); }
  __device__ void store(uint32_t at, uint32_t x) const { ptx::st_global(memory + at, x); }
};

// Of many buckets (ManyBucketsBias), where fwd_scratch.h and bwd_scratch.h say so: enough for 2048 square roots.
using WideCells = GlobalCells<4352>;

inline size_t wide_cell_bytes(const AttentionProblem& a) {
  return static_cast<size_t>(a.relative.time_head_stride ? a.heads : 1) * WideCells::kGlobalBytes;
}

// Place: SharedCells or GlobalCells.
template <class Place>
class BiasCells {
 public:
  static constexpr int kCells = Place::kCells;
  static constexpr int kGaps = 1 << 30;  // gaps below are looked up; from here on they are searched for

  // base: of kBytes of shared memory.
  __device__ explicit BiasCells(uint32_t base) : base_(base), cells_(Place::placed(base + kPlace)) {}
  // For make() or fill(). memory: of GlobalCells; head: whose weights are to be there.
  __device__ BiasCells(uint32_t base, void* memory, int head)
      : base_(base), cells_(Place::place(base + kPlace, memory, head)) {}

  // Octave 0 holds all gaps below 1, octave e + 1 those from 2^e on.
  __device__ static __forceinline__ int octave_of(int gap) {
    return max_int((__float_as_int(__int2float_rz(gap)) >> 23) - 126, 0);
  }
  __device__ __forceinline__ Octave octave(int o) const {
    const int2 x = ptx::ld_shared_int_v2(base_ + o * 8);
    return {x.x, x.y};
  }
  // Bit o: octave o is crowded.
  __device__ unsigned crowded() const { return static_cast<unsigned>(ptx::ld_shared_int(base_ + kCrowded)); }
  // Do the cells answer for gaps lo to hi?
  __device__ __forceinline__ bool answer(long long lo, long long hi) const {
    if (lo < -kGaps || hi >= kGaps) return false;
    const int first = octave_of(static_cast<int>(lo)), last = octave_of(static_cast<int>(hi));
    return (crowded() >> first & ((2u << (last - first)) - 1)) == 0;
  }

  // The address of a cell; 4 bytes on is the next one's.
  __device__ __forceinline__ uint32_t cell(int gap, const Octave& o) const { return cell_from(first(o), gap, o.shift); }
  __device__ __forceinline__ uint32_t cell(int gap) const { return cell(gap, octave(octave_of(gap))); }
  // The same in two steps, of which the first is not repeated.
  __device__ __forceinline__ uint32_t first(const Octave& o) const { return cells_.first + o.first * 4; }
  __device__ __forceinline__ static uint32_t cell_from(uint32_t first, int gap, int shift) {
    return first + (gap >> shift) * 4;
  }
  __device__ __forceinline__ int boundary(uint32_t cell) const { return cells_.load(cell); }
  __device__ __forceinline__ float weight(uint32_t cell) const {
    return __int_as_float(cells_.load(cell + Place::kWeight));
  }

  // Weights of gaps whose cells are `at`, which moves to the next cell where a gap is beyond the boundary.
  template <int kCount>
  __device__ __forceinline__ void weigh(const int (&gap)[kCount][4], uint32_t (&at)[kCount][4],
                                        float (&weights)[kCount][4]) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (gap[n][e] >= boundary(at[n][e])) at[n][e] += 4;
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[n][e] = weight(at[n][e]);
  }

  // All of it, by `threads` threads that meet in sync(). Weights are multiplied by `argument`.
  template <class Sync>
  __device__ void make(const TimeTerm& time, float argument, int thread, int threads, const Sync& sync) const {
    if (thread <= kOctaves) ptx::st_shared(base_ + thread * 8, make_int2(max_int(thread - 1, 0), 0));
    if (thread == 0) ptx::st_shared(base_ + kCrowded, 0u);
    sync();
    for (int k = thread; k + 1 < time.count; k += threads)
      narrow(__ldg(time.boundaries + k), __ldg(time.boundaries + k + 1));
    sync();
    if (thread == 0) place();
    sync();
    fill(time, argument, thread, threads);
    sync();
  }

  // Weights alone, of another table; boundaries are written again.
  __device__ void fill(const TimeTerm& time, float argument, int thread, int threads) const {
    each_bucket(time, thread, threads, [&](int k, int first, int last, int64_t to, bool inside) {
      if (inside && first > last)
        ptx::red_shared_or(base_ + kCrowded, 1u << octave_of(static_cast<int>(max(to, int64_t{0}))));
      const uint32_t weight = __float_as_uint(argument * __ldg(time.weight + k));
      for (int c = first; c <= last; ++c) {
        const int64_t boundary = !inside || c < last ? INT32_MAX : to < INT32_MIN ? INT32_MIN : to;
        cells_.store(cells_.first + c * 4, static_cast<uint32_t>(boundary));
        cells_.store(cells_.first + c * 4 + Place::kWeight, weight);
      }
    });
  }

  // f(bucket, first, last cell, boundary behind it, is that in a cell?) for this thread's share of the buckets that
  // hold anything, once there are cells.
  template <class F>
  __device__ __forceinline__ void each_bucket(const TimeTerm& time, int thread, int threads, F&& f) const {
    const int end = octave(kOctaves).first;
    for (int k = thread; k <= time.count; k += threads) {
      const int64_t from = k > 0 ? __ldg(time.boundaries + k - 1) : INT64_MIN;
      const int64_t to = k < time.count ? __ldg(time.boundaries + k) : INT64_MAX;
      if (from == to) continue;
      const int first = k > 0 ? index(from, end) + 1 : 0, last = index(to, end);
      f(k, first, last, to, k < time.count && last < end);
    }
  }
  // Number of the cell whose boundary is at an address.
  __device__ __forceinline__ int number(uint32_t at) const { return static_cast<int>(at - cells_.first) / 4; }

 private:
  static constexpr int kOctaves = 31;  // below kGaps; one more entry says where the cells end
  static constexpr int kCrowded = (kOctaves + 1) * 8, kPlace = kCrowded + 8;
  static constexpr int kMostCells = 1024;  // of an octave

 public:
  static constexpr int kBytes = (kPlace + Place::kBytes + 127) / 128 * 128;

 private:
  // Cells of the octave of two neighbouring boundaries are no wider than their distance.
  __device__ __forceinline__ void narrow(int64_t a, int64_t b) const {
    if (a < 1 || b >= kGaps || a == b) return;
    const int low = static_cast<int>(a), high = static_cast<int>(b), o = octave_of(low);
    if (o == octave_of(high)) ptx::red_shared_min(base_ + o * 8, max_int(31 - __clz(high - low), 0));
  }
  // Gives octaves their cells, in order, by one thread; each has at least one.
  __device__ __forceinline__ void place() const {
    int used = 2;  // of octave 0: negative gaps, and 0
    ptx::st_shared(base_, make_int2(31, 1));
    for (int o = 1; o < kOctaves; ++o) {
      const int room = min_int(kMostCells, kCells - used - (kOctaves - 1 - o));
      const int cells_bits = min_int(o - 1 - octave(o).shift, 31 - __clz(room)), shift = o - 1 - cells_bits;
      ptx::st_shared(base_ + o * 8, make_int2(shift, used - (1 << cells_bits)));
      used += 1 << cells_bits;
    }
    ptx::st_shared(base_ + kOctaves * 8, make_int2(0, used));
  }
  // Cell of a boundary; `end` for those that no gap looked up reaches.
  __device__ __forceinline__ int index(int64_t boundary, int end) const {
    if (boundary >= kGaps) return end;
    const int gap = static_cast<int>(max(boundary, int64_t{-1}));
    const Octave o = octave(octave_of(gap));
    return (gap >> o.shift) + o.first;
  }

  uint32_t base_;
  Place cells_;
};

}  // namespace hstu_ops::cuda::sm90
