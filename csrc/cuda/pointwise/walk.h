// For blocks that stay and walk over rows: the rows ahead are on their way into shared memory meanwhile, and what is
// the same for all rows is there too. Used by norm_fwd.cu and norm_bwd.cu.
#pragma once

#include "cuda/pointwise/team.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/memory.h"

namespace hstu_ops::cuda {

// Weight and bias of a block's columns in shared memory: neighbours read neighbouring 16 bytes, which from global
// memory, where a piece is 32 bytes of them, takes twice as long; absent ones are 1 and 0.
template <class T>
class SharedAffine {
 public:
  static size_t bytes(const TeamLayout& layout) {
    return sizeof(float) * 2 * kPieces * Piece<T>::kElements * layout.groups * layout.lanes;
  }

  __device__ SharedAffine() {}
  // Called by all threads of a block; `memory` holds `bytes`.
  template <class P>
  __device__ SharedAffine(const P& place, uint32_t memory) {
    const int lanes = place.lanes(), groups = place.layout.groups;
    const int team = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
    step_ = groups * lanes * 16;
    at_ = memory + (team % groups * lanes + lane) * 16;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (team >= groups || !place.has(i)) continue;
      put(place, place.p.weight, 1.f, 0, i);
      put(place, place.p.bias, 0.f, 1, i);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void weight(int piece, typename Piece<T>::Floats& to) const { get(0, piece, to); }
  __device__ __forceinline__ void bias(int piece, typename Piece<T>::Floats& to) const { get(1, piece, to); }

 private:
  static constexpr int kParts = Piece<T>::kElements / 4;

  __device__ uint32_t part(int which, int piece, int n) const {
    return at_ + ((which * kPieces + piece) * kParts + n) * step_;
  }
  template <class P>
  __device__ void put(const P& place, const void* values, float otherwise, int which, int piece) const {
    typename Piece<T>::Floats x;
    read_affine<T>(values, place.column_of(piece), otherwise, x);
#pragma unroll
    for (int n = 0; n < kParts; ++n)
      ptx::st_shared(part(which, piece, n), make_uint4(__float_as_uint(x[4 * n]), __float_as_uint(x[4 * n + 1]),
                                                       __float_as_uint(x[4 * n + 2]), __float_as_uint(x[4 * n + 3])));
  }
  __device__ __forceinline__ void get(int which, int piece, typename Piece<T>::Floats& to) const {
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      const float4 x = ptx::ld_shared_v4(part(which, piece, n));
      to[4 * n] = x.x, to[4 * n + 1] = x.y, to[4 * n + 2] = x.z, to[4 * n + 3] = x.w;
    }
  }

  uint32_t at_ = 0;
  int step_ = 0;  // bytes
};

constexpr int kManyTurns = 3;

// Which rows a block takes that stays. Some processors get their rows up to 1.4 times as fast as others, so blocks come
// in turns: those of the first, as many as the device holds, take three quarters of the rows, those of a later one half
// of what is left, and go to the processors that are done. In a turn, a block takes every step-th row from `first` on.
struct Span {
  int64_t first, step;

  __device__ Span(const NormProblem& p, const TeamLayout& layout) : rows_(p.rows) {
    const unsigned blocks = gridDim.x / layout.turns, turn = blockIdx.x / blocks;
    step = int64_t{blocks} * layout.slots;
    const unsigned rounds = static_cast<unsigned>((p.rows + step - 1) / step), left = rounds / 4;
    const unsigned begin = turn == 0 ? 0 : rounds - (left >> (turn - 1));
    const unsigned end = turn + 1 == layout.turns ? rounds : rounds - (left >> turn);
    rounds_ = end - begin;
    first = begin * step + blockIdx.x % blocks * layout.slots;
  }
  // Of this turn: the last round may be short.
  __device__ unsigned count_from(int64_t row) const {
    return rounds_ - (row + (int64_t{rounds_} - 1) * step >= rows_ ? 1 : 0);
  }

 private:
  int64_t rows_;
  unsigned rounds_;
};

// kStages rows of kTensors tensors in shared memory; each thread's pieces are in places that no other thread uses, so
// nothing needs a barrier. A stage is the address of this thread's first piece.
template <class T, int kTensors, int kStages>
struct Ring {
  static constexpr int kStageBytes = kTensors * kPieces * kThreads * 16;
  static constexpr int kBytes = kStages * kStageBytes;

  __device__ static uint32_t at(uint32_t stage, int tensor, int piece) {
    return stage + (tensor * kPieces + piece) * kThreads * 16;
  }
  template <class P>
  __device__ static void fetch(uint32_t stage, int tensor, const P& place, bool exists, Stream<T>& from) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (exists && place.has(i)) ptx::cp_async_16(at(stage, tensor, i), place.piece(from.at, i), 16);
    from.advance();
  }
  __device__ static Piece<T> get(uint32_t stage, int tensor, int piece) {
    return Piece<T>(ptx::ld_shared_u4(at(stage, tensor, piece)));
  }
  __device__ static void put(uint32_t stage, int tensor, int piece, const Piece<T>& x) {
    ptx::st_shared(at(stage, tensor, piece), x.word);
  }

  // Calls fetch(stage, iteration) for rows ahead and run(stage, iteration) for each of a team's rows; all threads of a
  // block go around together.
  template <class Fetch, class Run>
  __device__ static __forceinline__ void walk(void* memory, unsigned iterations, Fetch&& fetch, Run&& run) {
    static_assert(kStages == 2 || kStages == 4, "a stage is found with a mask");
    const uint32_t start = ptx::shared_address(memory) + threadIdx.x * 16;
    const auto stage = [&](unsigned iteration) { return start + iteration % kStages * kStageBytes; };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      fetch(stage(i), i);
      ptx::cp_async_commit();
    }
#pragma unroll 1
    for (unsigned i = 0; i < iterations; ++i) {
      ptx::cp_async_wait<kStages - 2>();
      fetch(stage(i + kStages - 1), i + kStages - 1);
      ptx::cp_async_commit();
      run(stage(i), i);
    }
    ptx::cp_async_wait<0>();
  }
};

}  // namespace hstu_ops::cuda
