// What the roles of the Hopper forward share: arguments, barriers and the plan of shared memory.
#pragma once

#include <type_traits>

#include "core/launch.h"
#include "cuda/ptx/tma.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/fwd_bias.h"
#include "cuda/sm90/fwd_items.h"
#include "cuda/sm90/tickets.h"

namespace hstu_ops::cuda::sm90 {

struct FwdArguments {
  CUtensorMap q, k, v;
  AttentionFwdParams params;
  Schedule schedule;
  Tickets tickets;
  float alpha;  // times the argument of SiLU
};

constexpr int kBiasWarps = 2;  // of the loading warpgroup, which prepare relative bias

constexpr int kItems = 3;  // the item in work and the next two: a longer queue would leave blocks idle at the end

template <class Shape>
using FwdBiasShape = BiasShape<Shape::kRows, false,
                               Shape::kDim == 256   ? 560
                               : Shape::kDim == 128 ? 4352
                                                    : 5120,
                               Shape::kDim == 256 ? 4 : 8>;

// Shape and Bias, one of tile/bias.h.
template <class Shape, class Bias_>
struct FwdPlan : Shape {
  using Bias = Bias_;
  using Relative = FwdBiasShape<Shape>;
  using Notes = NoteQueue<Relative, 2, Relative::kNotedTiles>;
  static constexpr int kPreparers = std::is_same_v<Bias, RelativeBias> ? kBiasWarps : 0;
  // The preparing warps take what the computing ones of this dimension leave.
  static constexpr bool kSpare = kPreparers && Shape::kDim == 64;
  static constexpr int kLoadRegisters = kSpare ? 80 : Shape::kLoadRegisters;
  static constexpr int kComputeRegisters = kSpare ? 144 : Shape::kComputeRegisters;
  static constexpr int kBiasStages = Shape::kDim == 64    ? 8
                                     : Shape::kDim == 128 ? 4
                                                          : 3;  // a ring of its own: tables come later than keys
  static constexpr int kBiasStageBytes = kPreparers ? BiasStage<Relative>::kBytes : 0;
  static constexpr int kBiasBytes =
      kPreparers ? BiasTables<Relative>::kBytes + kBiasStages * kBiasStageBytes + Notes::kBytes : 0;
  static constexpr bool kSpans = std::is_same_v<Bias, NoBias>;
  static constexpr int kSpanBytes = kSpans ? 2 * Shape::kRows * 16 : 0;
  static constexpr int kSharedBytes = Shape::kSharedBytes + kBiasBytes + kSpanBytes;
  static constexpr int kTimeRows = kPreparers ? Shape::kRows : 1;  // of an item, whose times it keeps
  static_assert(kSharedBytes + 2048 + kItems * kTimeRows * 5 <= kSharedMemory, "barriers and items take 2 KB");
};

template <class C>
struct FwdBarriers {
  ptx::Mbarrier item_wanted, item_full[kItems], item_empty[kItems], spans_full[kItems], query_full, query_empty;
  ptx::Mbarrier notes_full[2], notes_empty[2], bias_full[C::kBiasStages], bias_empty[C::kBiasStages];
  ptx::Mbarrier key_full[C::kStages], key_empty[C::kStages], value_full[C::kStages], value_empty[C::kStages];

  __device__ void init() {
    item_wanted.init(1);
    for (int i = 0; i < kItems; ++i) item_full[i].init(1), spans_full[i].init(1);
    for (ptx::Mbarrier& b : item_empty) b.init(C::kGroups + 1 + C::kPreparers);
    for (int i = 0; i < 2; ++i) notes_full[i].init(1), notes_empty[i].init(1);
    for (int i = 0; i < C::kBiasStages; ++i) bias_full[i].init(1), bias_empty[i].init(C::kGroups);
    query_full.init(1), query_empty.init(C::kGroups);
    for (int i = 0; i < C::kStages; ++i) {
      key_full[i].init(1), value_full[i].init(1);
      key_empty[i].init(C::kGroups), value_empty[i].init(C::kGroups);
    }
    ptx::fence_mbarrier_init();
  }
};

// What all roles see of shared memory.
template <class C, class T>
struct FwdStorage {
  using Panel = SmemTile<T, kPanel>;  // its swizzle is the copy engine's

  FwdBarriers<C>& barrier;
  FwdItem<C> (&items)[kItems];
  uint32_t queries, keys, values, staging, bias, spans;

  __device__ FwdStorage(FwdBarriers<C>& barrier, FwdItem<C> (&items)[kItems], const unsigned char* memory)
      : barrier(barrier), items(items) {
    queries = (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u;
    keys = queries + C::kQueryBytes;
    values = keys + C::kStages * C::kKeyBytes;
    staging = values + C::kStages * C::kKeyBytes;
    bias = staging + C::kRows * 128;
    spans = bias + C::kBiasBytes;
  }
  __device__ BiasTables<typename C::Relative> bias_tables() const { return {bias}; }
  __device__ uint32_t bias_stage(int stage) const {
    return bias + BiasTables<typename C::Relative>::kBytes + stage * C::kBiasStageBytes;
  }
  __device__ typename C::Notes notes() const { return {bias_stage(C::kBiasStages)}; }
  __device__ Panel query_panel(int panel) const { return {queries + panel * C::kRows * 128}; }
  __device__ uint32_t row_spans(int buffer, int row) const { return spans + (buffer * C::kRows + row) * 16; }
  __device__ Panel key_panel(int stage, int panel) const {
    return {keys + stage * C::kKeyBytes + panel * C::kCols * 128};
  }
  __device__ Panel value_panel(int stage, int panel) const {
    return {values + stage * C::kKeyBytes + panel * C::kCols * 128};
  }
};

}  // namespace hstu_ops::cuda::sm90
