// What the portable backward is given and what its blocks keep in shared memory: see bwd.cuh.
#pragma once

#include "core/launch.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/load.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/workspace.h"

namespace hstu_ops::cuda::sm80 {

struct BwdArguments {
  AttentionBwdParams params;
  Schedule schedule;
  BwdWorkspace workspace;
  float alpha, scale;
};

template <class C>
struct BwdStorage {
  using T = typename C::T;
  SmemTile<T, C::kDim> k, v;
  SmemTile<T, C::kDim> q, g;    // kStages tiles each; g: gradient of the output
  SmemTile<T, C::kQueries> ds;  // two tiles [key][query]; with kExchange the second is P'
  void* bias;

  __device__ explicit BwdStorage(unsigned char* shared) {
    k.base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    v.base = k.base + C::kKeys * C::kTileBytes;
    q.base = v.base + C::kKeys * C::kTileBytes;
    g.base = q.base + C::kStages * C::kQueries * C::kTileBytes;
    ds.base = g.base + C::kStages * C::kQueries * C::kTileBytes;
    bias = shared + C::kSharedBytes;
  }
};

// An item, in shared memory: see fwd.cuh.
template <class T>
struct BwdItem : Job {
  RowPair<T> queries;   // and gradients of the output
  float* sums;          // of dQ: the head's first part, from the sequence's first row on
  int64_t sums_stride;  // to the next part
  float factor;         // of all scaled gradients; a scale of each row is in dS and P already
};

}  // namespace hstu_ops::cuda::sm80
