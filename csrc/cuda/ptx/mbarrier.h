// Barriers in shared memory that count arrivals of threads and bytes of the copy engine. A wait names the parity of the
// phase it waits for: the first phase has parity 0, and a wait for parity 1 on a fresh barrier returns at once.
#pragma once

#include <cstdint>

namespace hstu_ops::ptx {

struct Mbarrier {
  uint64_t state;

  __device__ __forceinline__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state));
  }

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  __device__ __forceinline__ void arrive_expect_tx(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  // Whether wait() would return at once: asked beside other work, it takes the time to ask, 20 to 40 clocks, off the
  // wait. What the barrier stands for may be read only behind a branch on the answer: loads overtake the question.
  __device__ __forceinline__ bool ready(unsigned parity) {
    int done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(address()), "r"(parity)
        : "memory");
    return done;
  }
  // ready: what ready() has said of it.
  __device__ __forceinline__ void wait(unsigned parity, bool ready = false) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "setp.ne.b32 done, %2, 0;\n"
        "@done bra there;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "there:\n"
        "}\n" ::"r"(address()),
        "r"(parity), "r"(static_cast<int>(ready))
        : "memory");
  }
};

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Makes this thread's writes to shared memory visible to the tensor cores and the copy engine.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same of global memory, and the other way round.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace hstu_ops::ptx
