// What a team's threads find out together about their group of a row, and which of its elements dropout keeps.
#pragma once

#include "cuda/pointwise/team.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/named_barrier.h"

namespace hstu_ops::cuda {

// The sums of up to kMost numbers over a team, in every thread of it; all its threads call it alike. A team of several
// warps meets at a barrier of its own once a call, as calls write to two places in turn: who writes to a place again
// has met the others since they read it.
template <int kMost>
struct TeamSum {
  static constexpr int kWarps = kThreads / 32, kFloats = 2 * kMost * kWarps;

  float* const shared;
  const int lanes;
  int place = 0;

  __device__ TeamSum(float* shared, int lanes) : shared(shared), lanes(lanes) {}

  template <int kCount>
  __device__ __forceinline__ void operator()(float (&x)[kCount]) {
    static_assert(kCount <= kMost, "places hold fewer");
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      if (distance >= lanes) return;
#pragma unroll
      for (int n = 0; n < kCount; ++n) x[n] += __shfl_xor_sync(~0u, x[n], distance);
    }
    if (lanes > 32) over_warps(x);
  }

 private:
  template <int kCount>
  __device__ __forceinline__ void over_warps(float (&x)[kCount]) {
    const int warp = static_cast<int>(threadIdx.x) / 32, first = warp & ~(lanes / 32 - 1);
    float* const at = shared + place;
    place = kMost * kWarps - place;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) at[n * kWarps + warp] = x[n];
    }
    ptx::named_barrier_sync(1 + first, lanes);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      x[n] = 0;
#pragma unroll 1
      for (int w = 0; w < lanes / 32; ++w) x[n] += at[n * kWarps + first + w];
    }
  }
};

// (x - mean) * rstd
struct Normed {
  float mean, rstd, offset;

  __device__ Normed(float mean, float rstd) : mean(mean), rstd(rstd), offset(-mean * rstd) {}

  // Of the rounding of a 16-bit x nothing is added by multiplying first.
  template <class T>
  __device__ float of(float x) const {
    return sizeof(T) < 4 ? x * rstd + offset : (x - mean) * rstd;
  }
};

// Dropout of a thread's elements.
struct Dropper {
  const DropoutParams& p;
  RandomWords state;
  uint32_t add;  // to a number, and its bit 15 says whether the element is kept
  float scale;

  __device__ Dropper(const DropoutParams& p, float scale) : p(p), state{}, add(0), scale(scale) {
    if (!p) return;
    state = dropout_state(static_cast<uint64_t>(p.seed_values ? *p.seed_values : p.seed));
    add = (0x8000 - p.threshold) * 0x10001u;
  }

  // All bits of a piece that are kept.
  template <class T>
  __device__ __forceinline__ uint4 mask(int64_t row, int column, Section section) const {
    if (!p) return make_uint4(~0u, ~0u, ~0u, ~0u);
    const RandomWords words =
        random_words(state, static_cast<uint64_t>(row), static_cast<uint32_t>(column / 8), section);
    if constexpr (sizeof(T) == 2) {
      return make_uint4(ptx::signs_of_halves(kept(words.x0)), ptx::signs_of_halves(kept(words.x1)),
                        ptx::signs_of_halves(kept(words.x2)), ptx::signs_of_halves(kept(words.x3)));
    } else {
      const uint32_t x = kept(column & 4 ? words.x2 : words.x0), y = kept(column & 4 ? words.x3 : words.x1);
      return make_uint4(ptx::sign_of_half(x, false), ptx::sign_of_half(x, true), ptx::sign_of_half(y, false),
                        ptx::sign_of_half(y, true));
    }
  }
  // x of a piece, 0 where an element is dropped; not scaled.
  template <class T>
  __device__ __forceinline__ static Piece<T> drop(const Piece<T>& x, const uint4& bits) {
    return Piece<T>(make_uint4(x.word.x & bits.x, x.word.y & bits.y, x.word.z & bits.z, x.word.w & bits.w));
  }

  __device__ __forceinline__ float apply(int64_t row, int column, Section section, float x) const {
    if (!p) return x;
    const RandomWords words =
        random_words(state, static_cast<uint64_t>(row), static_cast<uint32_t>(column / 8), section);
    return words.number(column % 8) >= p.threshold ? x * scale : 0.f;
  }

 private:
  // Bits 15 and 31: whether the elements of a word are kept.
  __device__ uint32_t kept(uint32_t word) const { return (word & 0x7fff7fff) + add; }
};

}  // namespace hstu_ops::cuda
