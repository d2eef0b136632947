// A team of threads takes one group of one row at a time, each thread two pieces of 16 bytes of every tensor. Teams of
// a block take neighbouring groups first, then neighbouring rows; a team keeps its group and walks over rows. The rows
// ahead are on their way into shared memory meanwhile, each thread's pieces into places that no other thread uses, so
// nothing needs a barrier. Used by norm_fwd.cu and norm_bwd.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/pointwise.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/memory.h"

namespace hstu_ops::cuda {

constexpr int kThreads = 256;  // of a block, and of a team at most

struct TeamLayout {
  int lanes = 0;   // threads of a team, a power of 2
  int groups = 0;  // that a block takes of a row
  int slots = 0;   // rows that a block holds at a time
};

constexpr int kPieces = 2;  // of a thread

template <class T>
struct Piece {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  using Floats = float[kElements];
  union {
    uint4 word;
    T element[kElements];
  };

  __device__ float operator[](int e) const { return static_cast<float>(element[e]); }
};

// Which columns of which rows are a thread's.
template <class T>
struct Place {
  static constexpr int kElements = Piece<T>::kElements;
  using Floats = typename Piece<T>::Floats;

  int lanes, width;
  int first;            // column of the group
  int column;           // of the first piece, in the row
  int counts[kPieces];  // rows in which a piece exists
  int iterations;       // of the block
  int64_t row, step;    // the first row, and from one to the next

  __device__ Place(const NormProblem& p, const TeamLayout& layout) : lanes(layout.lanes), width(p.width()) {
    const int lane = static_cast<int>(threadIdx.x) % lanes, team = static_cast<int>(threadIdx.x) / lanes;
    const int group = static_cast<int>(blockIdx.y) * layout.groups + team % layout.groups;
    const int slot = team / layout.groups;
    first = group * width;
    column = first + lane * kElements;
    step = int64_t{gridDim.x} * layout.slots;
    const int64_t base = int64_t{blockIdx.x} * layout.slots;
    row = base + slot;
    iterations = static_cast<int>((p.rows - base + step - 1) / step);
    const bool valid = slot < layout.slots && group < p.groups && row < p.rows;
    const int count = valid ? static_cast<int>((p.rows - row + step - 1) / step) : 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) counts[i] = (i * lanes + lane) * kElements < width ? count : 0;
  }

  __device__ int column_of(int piece) const { return column + piece * lanes * kElements; }
};

// A thread's pieces of a tensor, row after row.
template <class T>
struct Stream {
  char* at = nullptr;
  int64_t step = 0;  // bytes

  __device__ Stream() {}
  __device__ Stream(const Place<T>& place, const Rows& rows, int64_t offset = 0)
      : at(reinterpret_cast<char*>(static_cast<T*>(rows.data) + place.row * rows.row_stride + offset + place.column)),
        step(place.step * rows.row_stride * static_cast<int>(sizeof(T))) {}

  // At one row only: for kernels short of registers.
  __device__ static Stream at_row(const Place<T>& place, const Rows& rows, int64_t row, int64_t offset = 0) {
    Stream stream;
    stream.at = reinterpret_cast<char*>(static_cast<T*>(rows.data) + row * rows.row_stride + offset + place.column);
    return stream;
  }

  __device__ void advance() { at += step; }
  __device__ uint4* piece(const Place<T>& place, int i) const {
    return reinterpret_cast<uint4*>(at + i * place.lanes * 16);
  }
  __device__ Piece<T> load(const Place<T>& place, int i) const {
    Piece<T> data;
    data.word = __ldcs(piece(place, i));
    return data;
  }
  __device__ void store(const Place<T>& place, int i, const typename Piece<T>::Floats& x) const {
    Piece<T> data;
#pragma unroll
    for (int e = 0; e < Piece<T>::kElements; ++e) data.element[e] = static_cast<T>(x[e]);
    *piece(place, i) = data.word;
  }
};

// to[e] = f(to[e], the weight or bias of the piece's column) where there is one.
template <class T, class F>
__device__ __forceinline__ void with_affine(const Place<T>& place, const void* values, int piece,
                                            typename Piece<T>::Floats& to, F&& f) {
  if (!values) return;
  const float* from = static_cast<const float*>(values) + place.column_of(piece);
#pragma unroll
  for (int e = 0; e < Piece<T>::kElements; e += 4) {
    const float4 x = *reinterpret_cast<const float4*>(from + e);
    to[e] = f(to[e], x.x), to[e + 1] = f(to[e + 1], x.y), to[e + 2] = f(to[e + 2], x.z), to[e + 3] = f(to[e + 3], x.w);
  }
}
struct Times {
  __device__ float operator()(float a, float b) const { return a * b; }
};
struct Plus {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// kStages rows of kTensors tensors in shared memory. A stage is the address of this thread's first piece.
template <class T, int kTensors, int kStages>
struct Ring {
  static constexpr int kStageBytes = kTensors * kPieces * kThreads * 16;
  static constexpr int kBytes = kStages * kStageBytes;

  __device__ static uint32_t at(uint32_t stage, int tensor, int piece) {
    return stage + (tensor * kPieces + piece) * kThreads * 16;
  }
  __device__ static void fetch(uint32_t stage, int tensor, const Place<T>& place, int iteration, Stream<T>& from) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (iteration < place.counts[i]) ptx::cp_async_16(at(stage, tensor, i), from.piece(place, i), 16);
    from.advance();
  }
  __device__ static Piece<T> get(uint32_t stage, int tensor, int piece) {
    Piece<T> data;
    data.word = ptx::ld_shared_u4(at(stage, tensor, piece));
    return data;
  }

  // Calls fetch(stage, iteration) for rows ahead and run(stage, iteration) for each of a team's rows; all threads of a
  // block go around together.
  template <class Fetch, class Run>
  __device__ static __forceinline__ void walk(void* memory, int iterations, Fetch&& fetch, Run&& run) {
    const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + threadIdx.x * 16;
    const auto next = [&](uint32_t stage) {
      return stage == start + kBytes - kStageBytes ? start : stage + kStageBytes;
    };
    uint32_t ahead = start, stage = start;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i, ahead += kStageBytes) {
      fetch(ahead, i);
      ptx::cp_async_commit();
    }
#pragma unroll 1
    for (int i = 0; i < iterations; ++i) {
      ptx::cp_async_wait<kStages - 2>();
      fetch(ahead, i + kStages - 1);
      ptx::cp_async_commit();
      run(stage, i);
      ahead = next(ahead), stage = next(stage);
    }
    ptx::cp_async_wait<0>();
  }
};

// What a kernel does beside the norm.
enum class Gate { kNone, kPlain, kSilu, kAny };  // kAny: dropout, copies, with or without SiLU

inline Gate gate_of(const NormProblem& p) {
  return !p.u ? Gate::kNone : p.dropout || p.concat ? Gate::kAny : p.silu_u ? Gate::kSilu : Gate::kPlain;
}

}  // namespace hstu_ops::cuda
