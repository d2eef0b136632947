// The torch-free API: what csrc/torch calls and csrc/cpu and csrc/cuda implement. Arguments are checked by the caller;
// errors come back as values.
#pragma once

#include <cstddef>
#include <string>

#include "core/params.h"

namespace hstu_ops {

struct Status {
  std::string message;  // empty: success

  bool ok() const { return message.empty(); }
};

namespace cpu {

// Runs body(begin, end, context) over disjoint parts of [0, n) on up to `threads` threads; returns 0 on success.
// The signature of libtorch's torch_parallel_for, which it is in the product.
struct Executor {
  int threads = 1;
  int (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                      void* context) = nullptr;
};

// Bytes of scratch memory for `threads` threads, 64-byte aligned, contents irrelevant: O(total rows), never
// O(length^2).
size_t attention_fwd_workspace(const AttentionFwdParams& params, int threads);
size_t attention_bwd_workspace(const AttentionBwdParams& params, int threads);

// Wrong content of offsets or targets is reported here, before anything is computed: reading it is free on a CPU.
Status attention_fwd(const AttentionFwdParams& params, void* workspace, const Executor& executor);
Status attention_bwd(const AttentionBwdParams& params, void* workspace, const Executor& executor);

// The instruction set in use: "avx512", "avx2" or "generic".
const char* isa();

}  // namespace cpu

namespace cuda {

// Bytes of scratch memory on the device, contents irrelevant.
size_t attention_fwd_workspace(const AttentionFwdParams& params);
size_t attention_bwd_workspace(const AttentionBwdParams& params);

// Enqueued on `stream` (a cudaStream_t) of the current device.
Status attention_fwd(const AttentionFwdParams& params, void* workspace, void* stream);
Status attention_bwd(const AttentionBwdParams& params, void* workspace, void* stream);

// Architectures in this build, such as "80 86 89 90".
const char* archs();

}  // namespace cuda

}  // namespace hstu_ops
