// Buckets of time that one warp found for the elements of its tile, kept in its scratch in shared memory between the
// bias and its gradient, and sums of the gradient by bucket. See tile/time_bias.h.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/table_grad.h"

namespace hstu_ops::cuda {

// Where nothing is kept.
struct NoSlots {};

// Elements of an accumulator tile, in the order of each().
template <int kM, int kN>
class KeptBuckets {
 public:
  static constexpr int kElements = kM * kN * 4, kWords = kElements / 4;

  template <class F>
  __device__ static __forceinline__ void each(Accumulator<kM, kN>& s, F&& f) {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r) f(s.x[r / 2][n][r % 2 * 2 + c], (n * 2 + c) * 2 * kM + r);
  }

  // Buckets count from the tile's smallest one, `first`; there are `count` of them. Put element by element from 0
  // on: a word is stored with its fourth.
  template <class Slots>
  __device__ __forceinline__ void put(const Slots& slots, int element, int bucket) {
    uint32_t& word = words_[element / 4];
    word |= bucket << element % 4 * 8;
    if (element % 4 == 3) ptx::st_shared(slots.at(element / 4 * 32 + ptx::thread_index() % 32), word);
  }
  template <class Slots>
  __device__ __forceinline__ void finish(const Slots& slots, int first, int count) const {
    const bool fits = count <= 256 && count <= Slots::kCount;
    if (lane_id() == 0) ptx::st_shared(slots.at(kWords * 32), fits ? uint2{unsigned(first), unsigned(count)} : uint2{});
  }
  template <class Slots>
  __device__ static __forceinline__ void store_nothing(const Slots& slots) {
    if (lane_id() == 0) ptx::st_shared(slots.at(kWords * 32), uint2{});
  }

  // Bits of a lane's largest value without its sign; those of a NaN are larger than any number's.
  __device__ static __forceinline__ unsigned largest(const Accumulator<kM, kN>& ds) {
    unsigned most = 0;
    ds.each([&](float x, int, int) { most = max(most, __float_as_uint(fabsf(x))); });
    return most;
  }

  // Adds the sums of ds by bucket; false: nothing is kept. Sums are integers, scaled to 20 bits below the largest
  // value, which shared memory adds at full speed and in any order to the same result. There are several sums of a
  // bucket, as many as there is room for, because lanes that add to the same one wait for each other.
  template <class Slots>
  __device__ __forceinline__ bool sum(const Slots& slots, const Accumulator<kM, kN>& ds, const TableTarget& to) {
    static_assert(kElements <= 32, "sums of 1024 values of 20 bits fit");
    const int lane = ptx::thread_index() % 32;
    __syncwarp();
    const int2 header = ptx::ld_shared_int_v2(slots.at(kWords * 32));
    const int first = header.x, count = header.y;
    if (count == 0) return false;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words_[i] = ptx::ld_shared_int(slots.at(i * 32 + lane));
    const unsigned top = __reduce_max_sync(~0u, largest(ds));
    if (top >= 0x7f800000) return false;
    if (top == 0) return true;
    const int exponent = max_int(static_cast<int>(top >> 23), 20);
    const float scale = __int_as_float((273 - exponent) << 23), unscale = __int_as_float((exponent - 19) << 23);
    const int shift = min_int(31 - __clz(Slots::kCount / count), 3), copies = 1 << shift;
#pragma unroll
    for (int i = 0; i < Slots::kCount; i += 128) ptx::st_shared(slots.at(i + lane * 4), make_uint4(0, 0, 0, 0));
    __syncwarp();
    const int mine = lane / 4 & (copies - 1);
    each(const_cast<Accumulator<kM, kN>&>(ds), [&](float& x, int i) {
      const int bucket = words_[i / 4] >> i % 4 * 8 & 255;
      ptx::red_shared_add_nonzero(slots.at((bucket << shift) + mine), __float2int_rn(x * scale));
    });
    __syncwarp();
    for (int i = lane; i < count; i += 32) {
      int sum = 0;
      for (int c = 0; c < copies; ++c) sum += ptx::ld_shared_int(slots.at((i << shift) + (c + i) % copies));
      to.add(first + i, static_cast<float>(sum) * unscale);
    }
    __syncwarp();
    return true;
  }

 private:
  uint32_t words_[kWords] = {};
};

}  // namespace hstu_ops::cuda
