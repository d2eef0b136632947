// The CPU kernels of one instruction set: compiled once for each, in a namespace of its own (HSTU_ISA). Used by
// attention.cpp.
#include "cpu/bwd.h"
#include "cpu/fwd.h"

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

template <class Scratch>
Scratch carve(const AttentionProblem& problem, const Limits& limits, void* memory) {
  Scratch scratch;
  Arena arena{static_cast<char*>(memory)};
  scratch.layout(arena, problem, limits);
  return scratch;
}

template <class C>
void fwd(const AttentionFwdParams& params, const Task& task, const Limits& limits, void* memory) {
  const FwdScratch<C> scratch = carve<FwdScratch<C>>(params.problem, limits, memory);
  Forward<C>(params, task, scratch).run();
}

template <class C>
void bwd(const AttentionBwdParams& params, const Task& task, const Limits& limits, const SharedGrads& shared,
         void* memory) {
  const BwdScratch<C> scratch = carve<BwdScratch<C>>(params.problem, limits, memory);
  Backward<C>(params, task, shared, scratch).run();
}

template <class C>
void merge(const AttentionBwdParams& params, int sequence, int parts, const void* split_grad_q, void* memory) {
  merge_grad_q(params, sequence, parts, static_cast<const C*>(split_grad_q), static_cast<C*>(memory));
}

constexpr const char* name_of_isa() {
#define HSTU_STRING_(x) #x
#define HSTU_STRING(x) HSTU_STRING_(x)
  return HSTU_STRING(HSTU_ISA);
}

}  // namespace

const Kernels kernels = {name_of_isa(), fwd<float>, fwd<double>, bwd<float>, bwd<double>, merge<float>, merge<double>};

}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
