// Spelling of "runs on host and device". Used by every header of core/.
#pragma once

#ifdef __CUDACC__
#define HSTU_HD __host__ __device__ __forceinline__
#else
// Always inlined: csrc/cpu compiles these headers once per instruction set, and an out-of-line copy made for one
// of them could be linked into the code for another.
#define HSTU_HD inline __attribute__((always_inline))
#endif

namespace hstu_ops {

HSTU_HD int min_int(int a, int b) { return a < b ? a : b; }
HSTU_HD int max_int(int a, int b) { return a > b ? a : b; }
HSTU_HD int clamp_int(int x, int lo, int hi) { return min_int(max_int(x, lo), hi); }
HSTU_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace hstu_ops
