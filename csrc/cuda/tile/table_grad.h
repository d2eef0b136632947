// Sums of bias gradients into small tables that all blocks of threads share.
//
// Normally one fp32 reduction in global memory per value, in whatever order. On request exact: a value is split into
// 32-bit digits of a fixed-point number that spans all of fp32, and integer sums do not depend on their order.
#pragma once

#include <cstddef>

#include "core/params.h"
#include "cuda/ptx/memory.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/scratch.h"

namespace hstu_ops::cuda {

struct TableSums {
  static constexpr int kDigits = 9;           // 32 bits each, in 64-bit words: room for 2^31 values
  static constexpr int kWords = kDigits + 1;  // and one word of flags: 1 +inf, 2 -inf, 4 NaN

  float* sums = nullptr;                 // [entries]; null: not wanted
  unsigned long long* words = nullptr;   // [kWords][entries]; null: sums are added to directly
  int64_t entries = 0, head_stride = 0;  // head_stride 0: all heads share one table

  // What must be zero before anything is added.
  void* start() const { return words ? static_cast<void*>(words) : sums; }
  size_t bytes() const { return entries * (words ? kWords * sizeof(unsigned long long) : sizeof(float)); }

  static __device__ __forceinline__ void add_exactly(unsigned long long* word, int64_t entries, float x) {
    const unsigned bits = __float_as_uint(x), exponent = bits >> 23 & 255, fraction = bits & 0x7fffff;
    if (exponent == 255) {
      atomicOr(word + kDigits * entries, fraction ? 4ull : bits >> 31 ? 2ull : 1ull);
      return;
    }
    const unsigned position = exponent ? exponent - 1 : 0;
    const unsigned long long value = static_cast<unsigned long long>(exponent ? fraction | 0x800000 : fraction)
                                     << position % 32;
    unsigned long long low = value & 0xffffffff, high = value >> 32;
    if (bits >> 31) low = -low, high = -high;
    word += position / 32 * entries;
    ptx::red_add(word, low);
    if (high) ptx::red_add(word + entries, high);
  }
  __device__ __forceinline__ void add(int head, int index, float x) const {
    if (x == 0.f) return;
    const int64_t at = head * head_stride + index;
    if (words) {
      add_exactly(words + at, entries, x);
    } else {
      atomicAdd(sums + at, x);
    }
  }
  // The exact sum, rounded once or twice.
  __device__ float total(int64_t at) const {
    const unsigned long long flags = words[kDigits * entries + at];
    if (flags) return __uint_as_float(flags == 1 ? 0x7f800000 : flags == 2 ? 0xff800000 : 0x7fffffff);
    double sum = 0;
    for (int d = kDigits - 1; d >= 0; --d)
      sum += ldexp(static_cast<double>(static_cast<long long>(words[d * entries + at])), 32 * d - 149);
    return static_cast<float>(sum);
  }
};

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Sums over each four lanes, a quarter of which stays in each: in lane `quad` of them, t[0] is sum number kCount / 4
// times (0, 2, 1, 3)[quad].
template <int kCount>
__device__ __forceinline__ void sum_quarters(float (&t)[kCount], int quad) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int half = kCount / 2, bit = 1; bit <= 2; half /= 2, bit *= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = quad & bit ? t[i + half] : t[i], send = quad & bit ? t[i] : t[i + half];
      t[i] = keep + __shfl_xor_sync(~0u, send, bit);
    }
}

// Where one head's sums go, each times a factor.
struct TableTarget {
  const TableSums& sums;
  int head;
  float factor;

  __device__ __forceinline__ void add(int index, float x) const { sums.add(head, index, x * factor); }
  // The sum over the warp's lanes.
  __device__ __forceinline__ void add_of_warp(int index, float x) const {
    x = sum_of_warp(x);
    if (lane_id() == 0) add(index, x);
  }
};

// A lane's sum over elements of one entry that has not been added to the table yet.
struct TableRun {
  int entry = 0;
  float sum = 0.f;

  __device__ __forceinline__ void turn(const TableTarget& to, int next) {
    if (next == entry) return;
    to.add(entry, sum);
    entry = next;
    sum = 0.f;
  }
  // Where the whole warp holds one entry a single addition does.
  __device__ __forceinline__ void finish(const TableTarget& to) {
    if (__reduce_min_sync(~0u, entry) == __reduce_max_sync(~0u, entry)) {
      sum = sum_of_warp(sum);
      if (lane_id() != 0) sum = 0.f;
    }
    to.add(entry, sum);
    sum = 0.f;
  }
};

struct BiasGradients {
  const TableSums &position, &time;
  int head;
  float factor;  // turns what add_grad is given into gradients
};

// Gradients of both tables, those that are wanted.
struct TableGrads {
  TableSums position, time;

  // scratch: for exact sums.
  static TableGrads plan(const AttentionBwdParams& p, Scratch& scratch) {
    const RelativeBiasParams& r = p.problem.relative;
    const auto table = [&](void* grad, int entries, int64_t stride) {
      TableSums t;
      if (!grad) return t;
      t.sums = static_cast<float*>(grad);
      t.head_stride = stride ? entries : 0;
      t.entries = stride ? static_cast<int64_t>(entries) * p.problem.heads : entries;
      // fp32 sums of thousands of fp32 values would be too coarse.
      if (p.deterministic || p.problem.dtype == DType::kFloat32)
        t.words = static_cast<unsigned long long*>(
            scratch.take(static_cast<size_t>(t.entries) * TableSums::kWords * sizeof(unsigned long long)));
      return t;
    };
    TableGrads tables;
    tables.position = table(p.grad_position_weight, 2 * r.positions - 1, r.position_head_stride);
    tables.time = table(p.grad_time_weight, r.num_boundaries + 1, r.time_head_stride);
    return tables;
  }
  bool any() const { return position.sums || time.sums; }
  bool exact() const { return position.words || time.words; }
  int64_t entries() const { return position.entries + time.entries; }
  // Exact sums to fp32, by `threads` threads.
  __device__ void round(int64_t thread, int64_t threads) const {
    for (const TableSums* t : {&position, &time})
      if (t->words)
        for (int64_t i = thread; i < t->entries; i += threads) t->sums[i] = t->total(i);
  }
};

}  // namespace hstu_ops::cuda
