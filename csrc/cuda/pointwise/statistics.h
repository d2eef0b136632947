// What a team's threads find out together about their group of a row, and which of its elements dropout keeps.
#pragma once

#include "cuda/pointwise/team.h"
#include "cuda/ptx/math.h"

namespace hstu_ops::cuda {

// The sums of kCount numbers over a team, in every thread of it. All threads of the block call it alike.
template <int kCount>
__device__ __forceinline__ void team_sum(float (&x)[kCount], int lanes, float* shared) {
  const auto add = [&](int distance) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) x[n] += __shfl_xor_sync(~0u, x[n], distance);
  };
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    if (distance >= lanes) return;
    add(distance);
  }
  if (lanes == 32) return;
  constexpr int kWarps = kThreads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, first = warp & ~(lanes / 32 - 1);
  __syncthreads();  // the last sums have been read
#pragma unroll
  for (int n = 0; n < kCount; ++n)
    if (threadIdx.x % 32 == 0) shared[n * kWarps + warp] = x[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    x[n] = 0;
#pragma unroll 1
    for (int w = 0; w < lanes / 32; ++w) x[n] += shared[n * kWarps + first + w];
  }
}
template <int kCount>
constexpr int kTeamSumFloats = kCount * kThreads / 32;

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
  __device__ __forceinline__ Piece<T> drop(const Piece<T>& x, int64_t row, int column, Section section) const {
    if (!p) return x;
    const uint4 bits = mask<T>(row, column, section);
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
