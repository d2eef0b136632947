// What a team's threads find out together about their group of a row, and which of its elements dropout keeps.
#pragma once

#include "cuda/pointwise/team.h"

namespace hstu_ops::cuda {

// The sums of kCount numbers over a team, in every thread of it. All threads of the block call it alike.
template <int kCount>
__device__ __forceinline__ void team_sum(float (&x)[kCount], int lanes, float* shared) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    if (distance >= lanes) continue;
#pragma unroll
    for (int n = 0; n < kCount; ++n) x[n] += __shfl_xor_sync(~0u, x[n], distance);
  }
  if (lanes <= 32) return;
  constexpr int kWarps = kThreads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, team_warps = lanes / 32, first = warp / team_warps * team_warps;
  __syncthreads();  // the last sums have been read
#pragma unroll
  for (int n = 0; n < kCount; ++n)
    if (threadIdx.x % 32 == 0) shared[n * kWarps + warp] = x[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    x[n] = 0;
    for (int w = 0; w < team_warps; ++w) x[n] += shared[n * kWarps + first + w];
  }
}
template <int kCount>
constexpr int kTeamSumFloats = kCount * kThreads / 32;

// A number near a group's elements, around which sums of squares lose next to nothing to cancellation, so that one pass
// over the threads is enough for mean and variance: the mean of the first piece; for float32, and where a team has
// several warps, the mean of all.
template <class R, class T>
__device__ __forceinline__ float pivot_of(const Place<T>& at, uint32_t stage, int iteration, float* shared) {
  float total[1] = {0};
  if (sizeof(T) < 4 && at.lanes <= 32) {
    const Piece<T> x = R::get(stage, 0, 0);
#pragma unroll
    for (int e = 0; e < Piece<T>::kElements; ++e) total[0] += x[e];
    return __shfl_sync(~0u, total[0] * (1.f / Piece<T>::kElements), 0, at.lanes);
  }
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    if (iteration >= at.counts[piece]) continue;
    const Piece<T> x = R::get(stage, 0, piece);
#pragma unroll
    for (int e = 0; e < Piece<T>::kElements; ++e) total[0] += x[e];
  }
  team_sum(total, at.lanes, shared);
  return total[0] / static_cast<float>(at.width);
}

struct Statistics {
  float mean, rstd, offset;

  // From the sums of x - pivot and its square.
  __device__ Statistics(const NormProblem& p, float pivot, float sum, float squares) {
    const float inverse = 1.f / static_cast<float>(p.width()), shift = sum * inverse;
    mean = pivot + shift;
    rstd = rsqrtf(fmaxf(squares * inverse - shift * shift, 0.f) + static_cast<float>(p.eps));
    offset = -mean * rstd;
  }
  // (x - mean) * rstd; of the rounding of a 16-bit x nothing is added by multiplying first.
  template <class T>
  __device__ float normed(float x) const {
    return sizeof(T) < 4 ? x * rstd + offset : (x - mean) * rstd;
  }
};

// Dropout of a thread's elements.
struct Dropper {
  const DropoutParams& p;
  uint64_t seed = 0;
  float scale;

  __device__ explicit Dropper(const DropoutParams& p) : p(p), scale(static_cast<float>(p.scale)) {
    if (p) seed = static_cast<uint64_t>(p.seed_values ? *p.seed_values : p.seed);
  }

  // A bit for each element of a piece that is kept.
  template <class T>
  __device__ __forceinline__ uint32_t kept(const Place<T>& at, int64_t row, int piece, Section section) const {
    if (!p) return ~0u;
    const int column = at.column_of(piece);
    const RandomWords words = words_of(row, column, section);
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < Place<T>::kElements; ++e)
      bits |= (words.number(sizeof(T) < 4 ? e : column % 8 + e) >= p.threshold ? 1u : 0u) << e;
    return bits;
  }
  __device__ __forceinline__ float apply(uint32_t kept, int e, float x) const {
    return kept >> e & 1 ? x * scale : 0.f;
  }

  __device__ __forceinline__ float apply(int64_t row, int column, Section section, float x) const {
    if (!p) return x;
    return words_of(row, column, section).number(column % 8) >= p.threshold ? x * scale : 0.f;
  }

 private:
  __device__ __forceinline__ RandomWords words_of(int64_t row, int column, Section section) const {
    return random_words(seed, static_cast<uint64_t>(row), static_cast<uint32_t>(column / 8), section);
  }
};

}  // namespace hstu_ops::cuda
