// A place in a ring of shared-memory stages. Used by both directions.
#pragma once

namespace hstu_ops::cuda::sm90 {

// A stage of a ring and the parity of its current round.
template <int kStages>
struct Ring {
  int stage = 0;
  unsigned round = 0;

  __device__ void next() {
    if (++stage == kStages) stage = 0, round ^= 1;
  }
  __device__ Ring following() const {
    Ring r = *this;
    r.next();
    return r;
  }
  __device__ int before() const { return stage == 0 ? kStages - 1 : stage - 1; }
  __device__ Ring last() const { return {before(), stage == 0 ? round ^ 1 : round}; }
  // Of the number of steps so far.
  __device__ unsigned parity() const {
    static_assert(kStages % 2 == 1);
    return (stage + round) % 2;
  }
};

// The same for several rings that advance together: one register.
struct Count {
  unsigned count = 0;

  template <int kStages>
  __device__ int stage() const {
    return count % kStages;
  }
  template <int kStages>
  __device__ unsigned round() const {
    return count / kStages % 2;
  }
  __device__ void next() { ++count; }
  __device__ Count before() const { return {count - 1}; }
};

}  // namespace hstu_ops::cuda::sm90
