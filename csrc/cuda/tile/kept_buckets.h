// Buckets of time that one warp found for the elements of its tile, kept in its scratch in shared memory between the
// bias and its gradient, and sums of the gradient by bucket. See tile/time_bias.h.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/table_grad.h"

namespace hstu_ops::cuda {

// Where nothing is kept.
struct NoSlots {};

// One warp's sums of values by key, in its scratch in shared memory: integers, scaled to 20 bits below the largest
// value, which shared memory adds at full speed and in any order to the same result. There are several sums of a key,
// as many as there is room for, because lanes that add to the same one wait for each other.
template <class Slots>
class KeyedSums {
 public:
  // `top`: the bits of the largest value without its sign. More keys than there is room for: one sum of each.
  __device__ __forceinline__ KeyedSums(const Slots& slots, unsigned top, int keys) : slots_(slots) {
    const int exponent = max_int(static_cast<int>(top >> 23), 20);
    scale_ = __int_as_float((273 - exponent) << 23), unscale_ = __int_as_float((exponent - 19) << 23);
    shift_ = clamp_int(31 - __clz(Slots::kCount / keys), 0, 3);
    mine_ = ptx::thread_index() % 32 / 4 & ((1 << shift_) - 1);
  }
  __device__ __forceinline__ void clear() const {
#pragma unroll
    for (int i = 0; i < Slots::kCount; i += 128)
      ptx::st_shared(slots_.at(i + ptx::thread_index() % 32 * 4), make_uint4(0, 0, 0, 0));
    __syncwarp();
  }
  __device__ __forceinline__ void add(int key, float x) const {
    ptx::red_shared_add_nonzero(slots_.at((key << shift_) + mine_), __float2int_rn(x * scale_));
  }
  // f(key, sum) for keys below `keys`, a lane each.
  template <class F>
  __device__ __forceinline__ void each(int keys, F&& f) const {
    __syncwarp();
    const int copies = 1 << shift_;
    for (int i = ptx::thread_index() % 32; i < keys; i += 32) {
      int sum = 0;
      for (int c = 0; c < copies; ++c) sum += ptx::ld_shared_int(slots_.at((i << shift_) + (c + i) % copies));
      f(i, static_cast<float>(sum) * unscale_);
    }
    __syncwarp();
  }

 private:
  const Slots& slots_;
  float scale_, unscale_;
  int shift_, mine_;
};

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

  // Adds the sums of ds by bucket; false: nothing is kept, or ds is not finite.
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
    const KeyedSums<Slots> sums(slots, top, count);
    sums.clear();
    each(const_cast<Accumulator<kM, kN>&>(ds), [&](float& x, int i) { sums.add(words_[i / 4] >> i % 4 * 8 & 255, x); });
    sums.each(count, [&](int i, float sum) { to.add(first + i, sum); });
    return true;
  }

 private:
  uint32_t words_[kWords] = {};
};

}  // namespace hstu_ops::cuda
