// Calls an op's launcher on the device of its tensors: threads, streams and scratch memory are torch's.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "torch/stable.h"

namespace hstu_ops {

inline void expect_arguments(uint64_t got, uint64_t wanted) {
  if (got != wanted) throw std::logic_error("hstu_ops: the schema and the code that reads its arguments disagree");
}

inline cpu::Executor torch_executor() {
  uint32_t threads = 1;
  HSTU_ABI(torch_get_num_threads(&threads));
  return {static_cast<int>(threads), abi::torch_parallel_for};
}

// Scratch memory of one call; null where none is needed.
class Workspace {
 public:
  Workspace(size_t bytes, Device device) {
    if (bytes > 0) memory_.emplace(make(static_cast<int64_t>(bytes), device));
  }
  void* data() const { return memory_ ? memory_->data() : nullptr; }

 private:
  static Tensor make(int64_t bytes, Device device) {
    return Tensor::empty({bytes}, abi::aoti_torch_dtype_uint8(), device);
  }
  std::optional<Tensor> memory_;
};

// An op's launchers on both devices.
template <class Params>
struct Launchers {
  size_t (*cpu_workspace)(const Params&, int threads);
  Status (*cpu)(const Params&, void* workspace, const cpu::Executor&);
  size_t (*cuda_workspace)(const Params&);
  Status (*cuda)(const Params&, void* workspace, void* stream);
};

// A failure on a CPU is wrong content of offsets or targets, hence an argument's error.
template <class Params>
void launch(const Params& params, Device device, const Launchers<Params>& launchers) {
  if (device.is_cuda()) {
    const DeviceGuard guard(device.index);
    const Workspace workspace(launchers.cuda_workspace(params), device);
    const Status status = launchers.cuda(params, workspace.data(), current_cuda_stream(device.index));
    if (!status.ok()) throw std::runtime_error("hstu_ops: " + status.message);
    return;
  }
  const cpu::Executor executor = torch_executor();
  const Workspace workspace(launchers.cpu_workspace(params, executor.threads), device);
  const Status status = launchers.cpu(params, workspace.data(), executor);
  if (!status.ok()) throw std::invalid_argument("hstu_ops: " + status.message);
}

inline void launch_attention(const AttentionFwdParams& params, Device device) {
  launch(params, device,
         {cpu::attention_fwd_workspace, cpu::attention_fwd, cuda::attention_fwd_workspace, cuda::attention_fwd});
}
inline void launch_attention(const AttentionBwdParams& params, Device device) {
  launch(params, device,
         {cpu::attention_bwd_workspace, cpu::attention_bwd, cuda::attention_bwd_workspace, cuda::attention_bwd});
}

}  // namespace hstu_ops
