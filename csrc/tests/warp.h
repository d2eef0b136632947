// A warp on the host: its lanes run one after the other from one exchange among them to the next. Include it before a
// header of cuda/ that needs nothing of CUDA but what is here.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__

namespace hstu_ops::test {

class Warp {
 public:
  static constexpr int kLanes = 32;

  // lane(): what each lane does. All take part in each exchange.
  explicit Warp(const std::function<void()>& lane) : lane_(lane) {
    for (int i = 0; i < kLanes; ++i) {
      constexpr size_t kStack = 1 << 16;
      stacks_.push_back(std::make_unique<char[]>(kStack));
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks_[i].get();
      contexts_[i].uc_stack.ss_size = kStack;
      contexts_[i].uc_link = &host_;
      makecontext(&contexts_[i], [] { running()->lane_(); }, 0);
    }
  }
  void run() {
    running() = this;
    do {
      exchanging_ = false;
      for (now_ = 0; now_ < kLanes; ++now_) swapcontext(&host_, &contexts_[now_]);
      taken_ = given_;
    } while (exchanging_);
  }

  static Warp*& running() {
    static Warp* warp = nullptr;
    return warp;
  }
  int lane() const { return now_; }
  // What all lanes give.
  const std::vector<int64_t>& exchange(int64_t mine) {
    given_[now_] = mine;
    exchanging_ = true;
    swapcontext(&contexts_[now_], &host_);
    return taken_;
  }

 private:
  std::function<void()> lane_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  ucontext_t host_, contexts_[kLanes];
  int now_ = 0;
  bool exchanging_ = false;
  std::vector<int64_t> given_ = std::vector<int64_t>(kLanes), taken_ = given_;
};

}  // namespace hstu_ops::test

struct ThreadIndex {
  struct {
    operator int() const { return hstu_ops::test::Warp::running()->lane(); }
  } x;
};
inline const ThreadIndex threadIdx = {};

inline const std::vector<int64_t>& exchange_among_lanes(int64_t mine) {
  return hstu_ops::test::Warp::running()->exchange(mine);
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return static_cast<T>(exchange_among_lanes(x)[lane]);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int by) {
  const std::vector<int64_t>& all = exchange_among_lanes(x);
  return threadIdx.x < by ? x : static_cast<T>(all[threadIdx.x - by]);
}
template <class T>
T __reduce_add_sync(unsigned, T x) {
  int64_t sum = 0;
  for (const int64_t y : exchange_among_lanes(x)) sum += y;
  return static_cast<T>(sum);
}
template <class T>
T __reduce_min_sync(unsigned, T x) {
  int64_t least = INT64_MAX;
  for (const int64_t y : exchange_among_lanes(x)) least = y < least ? y : least;
  return static_cast<T>(least);
}
template <class T>
T __reduce_max_sync(unsigned, T x) {
  int64_t most = INT64_MIN;
  for (const int64_t y : exchange_among_lanes(x)) most = y > most ? y : most;
  return static_cast<T>(most);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const std::vector<int64_t>& all = exchange_among_lanes(x);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
