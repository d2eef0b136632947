// How a kernel of the Hopper forward is launched: clusters where keys are split.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "core/params.h"
#include "cuda/errors.h"
#include "cuda/sm90/launch.h"

namespace hstu_ops::cuda::sm90 {

template <class C, auto kKernel>
struct FwdLaunch {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  FwdLaunch(unsigned blocks, unsigned cluster, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
    config.gridDim = blocks, config.blockDim = C::kThreads, config.dynamicSmemBytes = C::kSharedBytes;
    config.stream = stream, config.attrs = &attribute, config.numAttrs = cluster > 1;
  }

  // Clusters of `size` blocks that run at a time: fewer than the processors allow, as a cluster stays in a part of
  // them.
  static int most_clusters(int device, unsigned size) {
    static std::atomic<int> known[64][9] = {};
    if (device < 64 && known[device][size]) return known[device][size];
    FwdLaunch launch(size, size, nullptr);
    int most = 0;
    if (cudaOccupancyMaxActiveClusters(&most, kKernel, &launch.config) != cudaSuccess) cudaGetLastError();  // forget it
    if (most < 1) most = 1;
    if (device < 64) known[device][size] = most;
    return most;
  }

  // Into how many parts the keys of each item are cut where there are too few items to fill the processors.
  static int key_parts(const AttentionProblem& a, int device, int processors) {
    const JaggedParams& j = a.jagged;
    const int64_t queries = j.total_q / j.batch, tiles = j.total_kv / j.batch / C::kCols;
    const int64_t items = j.batch * a.heads * (queries / C::kRows + 1);
    if (2 * items > processors) return 1;
    constexpr int64_t kStart = 12;  // what a block needs before and after its tiles, in tiles
    int best = 1;
    int64_t best_time = kStart + tiles;
    for (int parts = 2; parts <= 8 && 8 * parts <= tiles; ++parts) {
      const int64_t clusters = most_clusters(device, parts), turns = (items + clusters - 1) / clusters;
      const int64_t time = turns * (kStart + tiles / parts);
      if (time < best_time) best = parts, best_time = time;
    }
    return best;
  }
};

}  // namespace hstu_ops::cuda::sm90
