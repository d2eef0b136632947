// A team of threads takes one group of one row at a time, each thread two pieces of 16 bytes of every tensor. Teams of
// a block take neighbouring groups first, then neighbouring rows; a team keeps its group. Used by norm_fwd.cu and
// norm_bwd.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/pointwise.h"

namespace hstu_ops::cuda {

constexpr int kThreads = 256;  // of a block, and of a team at most

struct TeamLayout {
  int lanes = 0;                          // threads of a team, a power of 2
  int groups = 0;                         // that a block takes of a row
  int slots = 0;                          // rows that a block holds at a time
  int turns = 1;                          // of blocks that stay: see Span
  float inverse = 0, eps = 0, scale = 0;  // 1 / width; of the problem; of what dropout keeps
};

constexpr int kPieces = 2;  // of a thread

// How a team is told at compile time: each is a warp with every piece in use, or any.
enum class Team { kWarp, kAny };

template <class T>
struct Piece {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  using Floats = float[kElements];
  union {
    uint4 word;
    uint32_t words[4];
    T element[kElements];
  };

  __device__ Piece() : word{} {}
  __device__ explicit Piece(uint4 word) : word(word) {}
  __device__ explicit Piece(const Floats& x) : word{} {
#pragma unroll
    for (int e = 0; e < kElements; ++e) element[e] = static_cast<T>(x[e]);
  }

  __device__ float operator[](int e) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the compiler takes two instructions for every second one
      return __uint_as_float(e % 2 ? words[e / 2] & 0xffff0000 : words[e / 2] << 16);
    } else {
      return static_cast<float>(element[e]);
    }
  }
};

// Which columns of which rows are a thread's: pieces i of rows first_row, first_row + step, ...
template <class T, Team kTeam>
struct Place {
  static constexpr int kElements = Piece<T>::kElements;

  const NormProblem& p;
  const TeamLayout& layout;
  int column;           // of the first piece, in the row
  int64_t row;          // the first
  bool there[kPieces];  // which pieces exist

  // `first`: row of the block.
  __device__ Place(const NormProblem& p, const TeamLayout& layout, int64_t first) : p(p), layout(layout) {
    const int lane = static_cast<int>(threadIdx.x) % lanes(), team = static_cast<int>(threadIdx.x) / lanes();
    const int group = static_cast<int>(blockIdx.y) * layout.groups + team % layout.groups;
    const int slot = team / layout.groups;
    column = group * p.width() + lane * kElements;
    row = first + slot;
    const bool valid = slot < layout.slots && group < p.groups;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) there[i] = valid && (i * lanes() + lane) * kElements < p.width();
  }

  __device__ int lanes() const { return kTeam == Team::kWarp ? 32 : layout.lanes; }
  __device__ bool has(int piece) const { return kTeam == Team::kWarp ? there[0] : there[piece]; }
  __device__ int column_of(int piece) const { return column + piece * lanes() * kElements; }
  __device__ uint4* piece(char* at, int i) const { return reinterpret_cast<uint4*>(at + i * lanes() * 16); }
};

// A thread's pieces of a tensor, row after row.
template <class T>
struct Stream {
  char* at = nullptr;
  uint32_t step = 0;  // bytes

  __device__ Stream() {}
  // From place.row on every `rows`-th row.
  template <class P>
  __device__ Stream(const P& place, const Rows& tensor, int64_t rows, int64_t offset = 0)
      : at(reinterpret_cast<char*>(static_cast<T*>(tensor.data) + place.row * tensor.row_stride + offset +
                                   place.column)),
        step(static_cast<uint32_t>(rows * tensor.row_stride * static_cast<int>(sizeof(T)))) {}

  __device__ void advance() { at += step; }
};

// Weight or bias of a piece's columns; `otherwise` where there is none.
template <class T>
__device__ __forceinline__ void read_affine(const void* values, int column, float otherwise,
                                            typename Piece<T>::Floats& to) {
#pragma unroll
  for (int e = 0; e < Piece<T>::kElements; ++e) to[e] = otherwise;
  if (!values) return;
  const float4* const from = reinterpret_cast<const float4*>(static_cast<const float*>(values) + column);
#pragma unroll
  for (int e = 0; e < Piece<T>::kElements; e += 4) {
    const float4 x = __ldg(from + e / 4);
    to[e] = x.x, to[e + 1] = x.y, to[e + 2] = x.z, to[e + 3] = x.w;
  }
}

// What a kernel does beside the norm.
enum class Gate { kNone, kPlain, kSilu, kAny };  // kAny: dropout, copies, with or without SiLU

inline Gate gate_of(const NormProblem& p) {
  return !p.u ? Gate::kNone : p.dropout || p.concat ? Gate::kAny : p.silu_u ? Gate::kSilu : Gate::kPlain;
}

}  // namespace hstu_ops::cuda
