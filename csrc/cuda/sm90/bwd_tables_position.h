// Sums of dS' by distance of positions, of a warp's 32 keys, tile by tile.
//
// Lanes r = lane % 8 have a row of each of four blocks of eight keys. Of the blocks of eight queries lane c = lane / 8
// takes those that lie c, modulo four, blocks behind the keys: a lane's elements of a block diagonal lie on the same
// diagonals of elements, and four blocks are added up, as pairs of 16 bits. What belongs to a diagonal is then in eight
// lanes, which pass their sums on. Of what the last ones have, the rest comes in the next tile.
#pragma once

#include "cuda/sm90/bwd_tables_warp.h"

namespace hstu_ops::cuda::sm90 {

template <class C, class T>
struct PositionSums {
  using Words = ScoreWords<T>;

  const TableWarp<C, T>& w;

  __device__ __forceinline__ void sum_tile(bool clamped) const {
    if (clamped) {
      sum_clamped();
    } else {
      sum_diagonals();
    }
  }

  // What belongs to a tile that does not come.
  __device__ __forceinline__ void finish() const {
    const int at = w.get(w.kCarried);
    if (at >= 0) {
#pragma unroll 1
      for (int j = 0; j < 8; ++j) {
        const uint32_t pair = ptx::ld_shared_int(w.memory().carried(w.lane()) + j / 2 * 4);
        const float2 x = unpack(pair, T{});
        add_sum(distance(at) + 32 - j, j % 2 ? x.y : x.x);
      }
      if (w.lane() < 7)  // on their way to the first lane, as value `lane`
        add_sum(w.get(w.kDistance) - at * C::kQueries + 32 + 7 - w.lane(), ptx::ld_shared(w.memory().passed(w.lane())));
    }
    __syncwarp();
    Words{}.store(w.memory().carried(w.lane()));
    if (w.lane() < 8) ptx::st_shared(w.memory().passed(w.lane()), 0u);
    w.put(w.kCarried, -1);
  }

 private:
  __device__ int row() const { return w.mine() % 8; }
  __device__ int column() const { return w.mine() / 8 % 4; }
  __device__ __forceinline__ Words words(int block, int chunk) const {
    return Words::load(w.address(w.warp() * w.kKeys + block * 8 + row(), chunk));
  }

  // near: c blocks behind the keys; far: four fewer, begun in the tile before; next: four more.
  __device__ __forceinline__ void sum_diagonals() const {
    if (w.get(w.kCarried) != w.tile().tile()) finish();
    Words far = Words::load(w.memory().carried(w.lane())), near = {}, next = {};
#pragma unroll 1
    for (int b = 0; b < 4; b += 2) {
      const int c = column() + b;
      near.add(words(b, c)), near.add(words(b + 1, c + 1));
      const Words x = words(b, (c + 4) & 7), y = words(b + 1, (c + 5) & 7);
      if (c < 4) {
        next.add(x);
      } else {
        far.add(x);
      }
      if (c + 1 < 4) {
        next.add(y);
      } else {
        far.add(y);
      }
    }
    next.store(w.memory().carried(w.lane()));
    add_diagonals(far, near);
    w.put(w.kCarried, w.tile().tile() + 1);
  }

  // Value j of row r lies 8 c + j - r queries behind the key in `near`, and 32 fewer in `far`. In the order of 8 c - r
  // a lane's sum goes to the next one, which has the next value of that diagonal; from the last lane of `far` to the
  // first of `near`, and from the last of `near` to the first of the next tile's `far`.
  __device__ __forceinline__ void add_diagonals(const Words& far, const Words& near) const {
    const int from = (row() < 7 ? w.lane() + 1 : w.lane() - 15) & 31;
    const bool first = w.lane() == 7;
    float x = far.at(7), y = near.at(7);
#pragma unroll
    for (int j = 6; j >= 0; --j) {
      const float u = __shfl_sync(~0u, x, from), v = __shfl_sync(~0u, y, from);
      const uint32_t at = w.memory().passed(j);
      const float before = ptx::ld_shared(at);
      ptx::st_shared_if(first, at, v);
      x = (first ? before : u) + far.at(j), y = (first ? u : v) + near.at(j);
    }
    const int distance = this->distance(w.tile().tile());
    add_sum(distance + 32, x), add_sum(distance, y);
  }
  // How far a lane's keys lie behind the queries of value 0 of `near`.
  __device__ __forceinline__ int distance(int tile) const {
    return w.get(w.kDistance) - tile * C::kQueries - 8 * column() + row();
  }
  __device__ __forceinline__ void add(int distance, float x) const {
    const int far = w.relative().positions - 1;
    ptx::red_add(w.table(w.kPosition) + (clamp_int(distance, -far, far) + far), x * w.factor());
  }
  // Of Words' sums.
  __device__ __forceinline__ void add_sum(int distance, float x) const { add(distance, x * Words::kUnit); }

  // A tile where some rows or columns share a position, row by row: runs of one distance.
  __device__ __forceinline__ void sum_clamped() const {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const int key = w.warp() * w.kKeys + i / 2 * 8 + row(), chunk = column() + i % 2 * 4;
      int at = 0;
      float sum = 0.f;
#pragma unroll 1
      for (int j = 0; j < 8; ++j) {
        const Job& job = w.job();
        const Mask& mask = job.sequence.mask;
        const int next =
            mask.position(w.first_key(job) + key) - mask.position(w.first_query(job, w.tile().tile()) + chunk * 8 + j);
        if (next != at && sum != 0.f) add(at, sum), sum = 0.f;
        at = next;
        sum += w.element(key, chunk * 8 + j);
      }
      if (sum != 0.f) add(at, sum);
    }
    __syncwarp();
  }
};

}  // namespace hstu_ops::cuda::sm90
