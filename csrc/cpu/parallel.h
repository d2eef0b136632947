// Runs the tasks of an op on all threads. Used by attention.cpp and pointwise.cpp.
#pragma once

#include <algorithm>
#include <atomic>

#include "core/launch.h"

namespace hstu_ops {
namespace cpu {

constexpr const char* kNoKernels = "HSTU_OPS_ISA: expected an instruction set that this processor and this build have";
constexpr double kThreadWork = 1 << 20;  // multiplications that pay for waking a thread

// One thread after another takes the next of `count` items; run(item, worker). `work` bounds the threads woken.
template <class Run>
Status run_all(const Executor& executor, int64_t count, double work, const Run& run) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t count;
    const Run* run;
  } shared;
  shared.count = count;
  shared.run = &run;
  const auto take = [](int64_t worker, int64_t, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    for (int64_t item; (item = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) (*s.run)(item, worker);
  };
  const int64_t workers = std::min({int64_t{executor.threads}, count, static_cast<int64_t>(work / kThreadWork) + 1});
  if (workers <= 1) {
    take(0, 1, &shared);
    return {};
  }
  return executor.parallel_for(0, workers, 1, take, &shared) ? Status{"a worker thread failed"} : Status{};
}

}  // namespace cpu
}  // namespace hstu_ops
