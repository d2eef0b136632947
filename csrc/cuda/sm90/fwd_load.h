// The warp of the Hopper forward that requests queries, and tiles of keys and values.
#pragma once

#include "cuda/ptx/tma.h"
#include "cuda/sm90/fwd_storage.h"
#include "cuda/sm90/ring.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T>
struct FwdLoader {
  const FwdArguments& arguments;
  const FwdStorage<C, T>& shared;
  Ring<C::kStages> ring;
  unsigned query_round = 0;

  __device__ void load_queries(const FwdItem<C>& item) {
    FwdBarriers<C>& barrier = shared.barrier;
    barrier.query.empty[0].wait(query_round ^ 1);
    if (lane_id() == 0) {
      barrier.query.full[0].arrive_expect_tx(C::kHeads * C::kQueryBytes);
      const int row = static_cast<int>(item.job.sequence.begin_q) + item.first;
      for (int head = 0; head < C::kHeads; ++head)
        for (int p = 0; p < C::kPanels; ++p)
          ptx::tma_load_3d(shared.query_panel(head, p).base, arguments.q, barrier.query.full[0], p * kPanel,
                           item.job.item.head + head, row);
    }
    query_round ^= 1;
  }

  // The keys of a tile, or its values.
  __device__ void load_tile(const CUtensorMap& map, ptx::Mbarrier& full, ptx::Mbarrier& empty, uint32_t to, int head,
                            int row) const {
    empty.wait(ring.round ^ 1);
    if (lane_id() == 0) {
      full.arrive_expect_tx(C::kKeyBytes);
      for (int p = 0; p < C::kPanels; ++p) ptx::tma_load_3d(to + p * C::kCols * 128, map, full, p * kPanel, head, row);
    }
  }

  // The next item may be taken.
  __device__ void want_item() const {
    if (lane_id() == 0) shared.barrier.item_wanted.arrive();
  }

  __device__ void load_item(const FwdItem<C>& item) {
    FwdBarriers<C>& barrier = shared.barrier;
    const Job& job = item.job;
    const TileSpans tiles = item.tiles();
    const int head = job.item.head, begin = static_cast<int>(job.sequence.begin_kv);
    bool queries = false;
    int left = item.paced() ? tiles.size() : 0;
    if (left > 0 && left <= kLateTiles) want_item();
    for (int tile = tiles.next(-1); tile < tiles.end(); tile = tiles.next(tile)) {
      const int row = begin + tile * C::kCols;
      for (int i = 0; i < C::kHeads; ++i, ring.next()) {
        const int stage = ring.stage;
        load_tile(arguments.k, barrier.key.full[stage], barrier.key.empty[stage], shared.key_panel(stage, 0).base,
                  head + i, row);
        if (!queries)
          load_queries(item), queries = true;  // behind the first keys, which need not wait for the item before
        load_tile(arguments.v, barrier.value.full[stage], barrier.value.empty[stage], shared.value_panel(stage, 0).base,
                  head + i, row);
      }
      if (--left == kLateTiles) want_item();
    }
    if (!queries) load_queries(item);
  }

  __device__ void run() {
    if (lane_id() == 0)
      for (const CUtensorMap* map : {&arguments.k, &arguments.q, &arguments.v}) ptx::prefetch_tensor_map(*map);
    for (Ring<kItems> at;; at.next()) {
      const FwdItem<C>& job = shared.items[at.stage];
      shared.barrier.item.full[at.stage].wait(at.round);
      if (!job.more) return;
      load_item(job);
      __syncwarp();
      if (lane_id() == 0) shared.barrier.item.empty[at.stage].arrive();
    }
  }
};

}  // namespace hstu_ops::cuda::sm90
