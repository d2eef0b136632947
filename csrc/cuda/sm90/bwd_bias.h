// The bias of a computing warp of the Hopper backward: its 16 keys and a tile of queries, 64 of them at a time.
//
//   prepare   before the products: what is to be known of the tile, buckets of elements where there are many
//   fetch     while the products run: weights and times to shared memory, since registers are full from then on
//   add       turns products into arguments of SiLU
//   sum       adds dS' to the tables' gradients (bwd_tables.h)
#pragma once

#include "cuda/sm90/bwd_bias_warp.h"

namespace hstu_ops::cuda::sm90 {

using BwdPart = Accumulator<1, 8>;  // 16 keys, 64 queries

template <class C, class T, class Bias = typename C::Bias>
struct BwdBias {
  static_assert(std::is_same_v<Bias, NoBias>);

  __device__ BwdBias(const BwdArguments&, const BwdStorage<C, T>&, const Job&) {}
  __device__ static void make_cells(const BwdArguments&, const BwdStorage<C, T>&) {}
  __device__ void begin() const {}
  __device__ void finish() const {}
  __device__ void prepare(int, bool) const {}
  __device__ void fetch(int) const {}
  template <class Bits>
  __device__ void put_bits(const Bits&) const {}
  template <class Bits>
  __device__ void get_bits(Bits&) const {}
  __device__ __forceinline__ void add(BwdPart& u, int, float alpha) const {
    u.each([alpha](float& x, int, int) { x *= alpha; });
  }
  template <class Slots>
  __device__ void sum(const BwdOperand&, int, Slots&&) const {}
};

template <class C, class T>
struct BwdBias<C, T, RelativeBias> : BwdBiasWarp<C, T> {
  using Base = BwdBiasWarp<C, T>;
  using Base::arguments, Base::col, Base::few, Base::job, Base::kArgument, Base::lane, Base::note, Base::origin,
      Base::params, Base::position, Base::row, Base::scratch, Base::tables, Base::time;
  using typename Base::Plan;

  __device__ BwdBias(const BwdArguments& arguments, const BwdStorage<C, T>& shared, const Job& job)
      : Base(arguments, shared, job) {}

  // A masked tile's bits wait here for their turn.
  template <class Bits>
  __device__ __forceinline__ void put_bits(const Bits& bits) const {
#pragma unroll
    for (int i = 0; i < C::kQueries / 64; ++i) ptx::st_shared(scratch(i) + Plan::kBits + lane() * 4, bits.words[i]);
  }
  template <class Bits>
  __device__ __forceinline__ void get_bits(Bits& bits) const {
#pragma unroll
    for (int i = 0; i < C::kQueries / 64; ++i)
      bits.words[i] = static_cast<unsigned>(ptx::ld_shared_int(scratch(i) + Plan::kBits + lane() * 4));
  }

  __device__ __forceinline__ void fetch(int tile) const {
    constexpr int kParts = C::kQueries / 64;
    const PositionTerm p = position();
    const float* weight = time().weight;
    float constant[kParts], strip[kParts][3];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const BiasNote note = Base::note(tile, part);
      const TileOrigin at = origin(tile, part);
      const float* from = p.weight + (at.key - at.query + p.positions - 1 + 15) - lane();
      constant[part] = weight && note.steps() != BiasNote::kMany ? __ldg(weight + note.first()) : 0.f;
#pragma unroll
      for (int i = 0; i < 3; ++i)
        strip[part][i] = note.diagonal() && i * 32 + lane() < Plan::kStripLength ? __ldg(from - i * 32) : 0.f;
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const BiasNote note = Base::note(tile, part);
      const uint32_t to = scratch(part);
#pragma unroll
      for (int i = 0; i < 3; ++i)
        if (i * 32 + lane() < Plan::kStripLength)
          ptx::st_shared(to + Plan::kStrip + (i * 32 + lane()) * 4,
                         __float_as_uint(kArgument * (strip[part][i] + constant[part])));
      if (lane() == 0) ptx::st_shared(to + Plan::kNote, note.code);
      if (few(note)) put_steps(origin(tile, part), note, to);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void put_steps(TileOrigin at, BiasNote note, uint32_t to) const {
    const TimeTerm t = time();
    const int64_t base = t.query_time(at.query), key = t.key_time(at.key + lane() % 16) - base;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ptx::st_shared(to + Plan::kQueryTimes + (i * 32 + lane()) * 4,
                     static_cast<uint32_t>(t.query_time(at.query + i * 32 + lane()) - base));
#pragma unroll 1
    for (int i = lane() / 16; i < note.steps(); i += 2) {
      const int64_t limit = key + __ldg(t.boundaries + note.first() + i);
      ptx::st_shared(to + Plan::kLimits + (i * 16 + lane() % 16) * 4,
                     static_cast<uint32_t>(limit > INT32_MAX   ? INT32_MAX
                                           : limit < INT32_MIN ? INT32_MIN
                                                               : limit));
    }
    if (lane() < note.steps()) {
      const float* weight = t.weight + note.first() + lane();
      ptx::st_shared(to + Plan::kChanges + lane() * 4,
                     __float_as_uint(kArgument * (__ldg(weight + 1) - __ldg(weight))));
    }
  }

  __device__ BiasNote fetched(int part) const {
    return {static_cast<unsigned>(ptx::ld_shared_int(scratch(part) + Plan::kNote))};
  }
  __device__ int prepared() const { return ptx::ld_shared_int(scratch(0) + Plan::kTile); }

  __device__ __forceinline__ void add(BwdPart& u, int part, float alpha) const {
    const BiasNote note = fetched(part);
    const uint32_t from = scratch(part);
    const uint32_t strip = from + Plan::kStrip + (col() - row() + 15) * 4;
#pragma unroll
    for (int d = -1; d < 8; ++d)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float b = ptx::ld_shared(strip + (8 * d + c) * 4);
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (d + h >= 0 && d + h < 8) {
            float& x = u.x[0][d + h][2 * h + c];
            x = fmaf(x, alpha, b);
          }
      }
    if (note.elementwise()) add_positions(u, origin(prepared(), part));
    if (note.steps() == 0) return;
    if (few(note)) {
      add_steps(u, from, note.steps());
    } else {
      add_buckets(u, from + Plan::kBuckets + lane() * 16,
                  static_cast<const float*>(params().time_weight) + job.item.head * params().time_head_stride);
    }
  }

 private:
  __device__ __forceinline__ void add_steps(BwdPart& u, uint32_t from, int steps) const {
    const uint32_t query_times = from + Plan::kQueryTimes + col() * 4;
    uint32_t limits = from + Plan::kLimits + row() * 4, changes = from + Plan::kChanges;
#pragma unroll 1
    for (; steps > 0; --steps, limits += 64, changes += 4) {
      const int limit[2] = {ptx::ld_shared_int(limits), ptx::ld_shared_int(limits + 32)};
      const float change = ptx::ld_shared(changes);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int2 times = ptx::ld_shared_int_v2(query_times + n * 32);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if ((e % 2 ? times.y : times.x) >= limit[e / 2]) u.x[0][n][e] += change;
      }
    }
  }
  __device__ __forceinline__ void add_positions(BwdPart& u, TileOrigin at) const {
    const PositionTerm p = position();
    const Mask& mask = job.sequence.mask;
    at.query += col(), at.key += row();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int index =
            position_index(mask.position(at.query + n * 8 + e % 2), mask.position(at.key + e / 2 * 8), p.positions);
        float& s = u.x[0][n][e];
        s = fmaf(kArgument, __ldg(p.weight + index), s);
      }
      __syncwarp();  // bounds the registers
    }
  }
  __device__ __forceinline__ void add_buckets(BwdPart& u, uint32_t buckets, const float* weight) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint32_t word = static_cast<uint32_t>(ptx::ld_shared_int(buckets + n / 4 * 512 + n % 4 * 4));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& s = u.x[0][n][e];
        s = fmaf(kArgument, __ldg(weight + (word >> 8 * e & 255)), s);
      }
      __syncwarp();  // bounds the registers
    }
  }

 public:
  // slots(): 1024 bytes of shared memory nobody else needs until dS' is written.
  template <class Slots>
  __device__ __forceinline__ void sum(const BwdOperand& ds, int part, Slots&& slots) const {
    const BiasNote note = fetched(part);
    if (arguments.time.sums) {
      if (note.steps() == BiasNote::kMany) {
        tables().sum_buckets(ds, scratch(part) + Plan::kBuckets + lane() * 16, slots());
      } else {
        tables().sum_steps(ds, scratch(part) + Plan::kQueryTimes + col() * 4, scratch(part) + Plan::kLimits + row() * 4,
                           note);
      }
    }
    if (arguments.position.sums) {
      if (note.elementwise()) {
        tables().sum_positions(ds, origin(prepared(), part));
      } else {
        tables().sum_diagonals(ds, origin(prepared(), part));
      }
    }
  }
};

}  // namespace hstu_ops::cuda::sm90
