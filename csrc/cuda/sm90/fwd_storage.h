// What the roles of the Hopper forward share: arguments, barriers and the plan of shared memory.
#pragma once

#include <type_traits>

#include "core/launch.h"
#include "cuda/ptx/tma.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/fwd_bias.h"
#include "cuda/sm90/fwd_items.h"
#include "cuda/sm90/gate.h"
#include "cuda/sm90/origin.h"
#include "cuda/sm90/tickets.h"

namespace hstu_ops::cuda::sm90 {

struct FwdArguments {
  CUtensorMap q, k, v;
  AttentionFwdParams params;
  Schedule schedule;
  Tickets tickets;
  void* cells;  // of WideCells
  float alpha;  // times the argument of SiLU
  bool early;   // see find_items
};

// What tiles leave room for: see BiasShape. A ring of bias stages of its own, for tables come later than keys.
template <class Shape, class Bias>
struct FwdBiasSizes {
  static constexpr bool kHeads = Shape::kHeads > 1;
  using Cells = std::conditional_t<std::is_same_v<Bias, ManyBucketsBias>, WideCells,
                                   SharedCells<Shape::kDim == 256  ? 560
                                               : Shape::kDim == 64 ? 5120
                                               : kHeads            ? 4096
                                                                   : 4352>>;
  static constexpr int kNotedTiles = Shape::kDim == 256 ? 4 : 8;
  static constexpr int kStages = Shape::kDim == 256 ? 3 : Shape::kDim == 128 || kHeads ? 4 : 8;
};
template <class Shape, class Bias>
using FwdBiasPlan = BiasPlan<Shape, Bias, typename FwdBiasSizes<Shape, Bias>::Cells,
                             FwdBiasSizes<Shape, Bias>::kNotedTiles, FwdBiasSizes<Shape, Bias>::kStages>;

// Shape and Bias, one of tile/bias.h.
template <class Shape, class Bias>
struct FwdPlan : FwdBiasPlan<Shape, Bias> {
  using Base = FwdBiasPlan<Shape, Bias>;
  // The preparing warps take what the computing ones of this dimension leave.
  static constexpr bool kSpare = Base::kPreparers && Shape::kDim == 64 && Shape::kGroups == 3;
  static constexpr int kLoadRegisters = kSpare ? 80 : Shape::kLoadRegisters;
  static constexpr int kComputeRegisters = kSpare ? 144 : Shape::kComputeRegisters;
  static constexpr bool kSpans = std::is_same_v<Bias, NoBias>;
  // What stands in front of a product is done ahead where that pays: not with a relative bias that is worked out head
  // by head, whose note and weights are in front as well.
  static constexpr bool kAhead = !Base::kPreparers || Shape::kHeads > 1;
  static constexpr int kSpanBytes = kSpans ? 2 * Shape::kRows * 16 : 0;
  static constexpr int kSharedBytes = Shape::kSharedBytes + Base::kBiasBytes + kSpanBytes;
  static_assert(kSharedBytes + 2048 + kItems * Base::kTimeRows * 5 <= kSharedMemory, "barriers and items take 2 KB");
};

template <class C>
struct FwdBarriers {
  ptx::Mbarrier item_wanted, spans_full[kItems];
  Gate<kItems> item;
  Gate<1> query;
  Gate<C::Notes::kBuffers> notes;
  Gate<C::kBiasStages> bias;
  Gate<C::kStages> key, value;

  __device__ void init() {
    item_wanted.init(1);
    for (ptx::Mbarrier& b : spans_full) b.init(1);
    item.init(1, C::kGroups + 1 + C::kPreparers), query.init(1, C::kGroups);
    notes.init(1, 1), bias.init(1, C::kGroups);
    key.init(1, C::kGroups), value.init(1, C::kGroups);
    ptx::fence_mbarrier_init();
  }
};

// What all roles see of shared memory.
template <class C, class T>
struct FwdStorage {
  using Panel = SmemTile<T, kPanel>;  // its swizzle is the copy engine's

  FwdBarriers<C>& barrier;
  FwdItem<C> (&items)[kItems];
  uint32_t queries, keys, values, staging, spans;
  const Origin<C::kAhead> origin;

  __device__ FwdStorage(FwdBarriers<C>& barrier, FwdItem<C> (&items)[kItems], const unsigned char* memory)
      : barrier(barrier),
        items(items),
        queries((static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u),
        origin(queries) {
    keys = queries + C::kHeads * C::kQueryBytes;
    values = keys + C::kStages * C::kKeyBytes;
    staging = values + C::kStages * C::kKeyBytes;
    spans = bias().base + C::kBiasBytes;
  }
  __device__ ptx::Descriptor descriptor(uint32_t panel, int panel_bytes = 16) const {
    return origin.descriptor(queries, panel, panel_bytes);
  }
  __device__ BiasMemory<C> bias() const { return {staging + C::kRows * 128}; }
  __device__ Panel query_panel(int head, int panel) const {
    return {queries + head * C::kQueryBytes + panel * C::kRows * 128};
  }
  __device__ uint32_t row_spans(int buffer, int row) const { return spans + (buffer * C::kRows + row) * 16; }
  __device__ Panel key_panel(int stage, int panel) const {
    return {keys + stage * C::kKeyBytes + panel * C::kCols * 128};
  }
  __device__ Panel value_panel(int stage, int panel) const {
    return {values + stage * C::kKeyBytes + panel * C::kCols * 128};
  }
};

}  // namespace hstu_ops::cuda::sm90
