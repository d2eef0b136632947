// Which of a few ways to add the time term does for a warp's tile: worked out by a warp of the loading warpgroup. Used
// by both directions.
#pragma once

#include "cuda/sm90/fwd_bias.h"
#include "cuda/tile/bias.h"

namespace hstu_ops::cuda::sm90 {

// The first and the last time of a tile's columns and of its rows (BiasShape::time).
struct TimeEnds {
  static constexpr long long kFar = 1ll << 61;  // gaps of nearer times do not wrap around

  long long left, right, first, last;

  __device__ long long low() const { return first - right; }  // the gaps
  __device__ long long high() const { return last - left; }
  // Differences do not wrap around, and those between gaps have 32 bits.
  __device__ bool ordinary() const {
    return min(first, left) >= -kFar && max(last, right) <= kFar && high() - low() <= INT32_MAX;
  }
};

// Bits for 16 rows from `row` on and a tile's columns from `col` on whose position term is not one weight a diagonal;
// first_row: of the block's rows.
template <class B>
__device__ __forceinline__ unsigned clamped_bits(const Mask& mask, int first_row, int row, int col) {
  using Window = typename BiasStage<B>::Window;
  const bool inside = Window::holds(mask, Window::distance(first_row, col), row, 16, col, B::kCols);
  return WarpNote::kClamped | (inside ? 0 : WarpNote::kBeyond);
}

template <class B>
class TimeNoter {
 public:
  // Weights are noted times `factor`, as they are in the cells.
  __device__ TimeNoter(const RelativeBiasParams& params, BiasTables<B> tables, float factor)
      : params_(params), tables_(tables), factor_(factor) {}

  // Of gaps low to high of 32-bit differences, if `known`; left: low word of the smallest time of the columns.
  __device__ __forceinline__ void note(const TimeTerm& time, bool known, long long low, long long high, int left,
                                       const WarpNote& note) const {
    unsigned code = WarpNote::kSearch, span = 0;
    int2 range = {0, time.count};
    if (known) {
      const Octave octave = look_up(low, high, code, span);
      if (code & WarpNote::kCells) {
        note.set_words(octave.first, 0);
        note.set(code, 0.f);
        // Weights in the cells are those of the head that is computed now.
        if (params_.time_head_stride == 0) {
          if (span <= kSparse) count(static_cast<int>(low), static_cast<int>(high), left, span / 4, note);
          return;
        }
        if (span > kSparse) return;
      }
      range = time.buckets(low, high);
      const int steps = range.y - range.x;
      if (steps <= WarpNote::kMostSteps) {
        float weight = factor_ * __ldg(time.weight + range.x);
        note.set(static_cast<unsigned>(steps), weight);
#pragma unroll 1
        for (int i = 0; i < steps; ++i) {
          const float next = factor_ * __ldg(time.weight + range.x + i + 1);
          note.set_step(i, static_cast<int>(__ldg(time.boundaries + range.x + i)), left, next - weight);
          weight = next;
        }
        return;
      }
      if (code & WarpNote::kCells) return;
    }
    note.set(WarpNote::kSearch | (known ? 0 : WarpNote::kUnknown), 0.f);
    note.set_words(range.x, range.y - range.x);
  }

 private:
  using Cells = typename BiasTables<B>::Cells;
  static constexpr unsigned kSparse = 4 * 8;  // bytes: more cells hold more boundaries than a note has room for

  // From the cells of the gaps, `more` of them behind the first: the note if there are few buckets; else it stays that
  // of a look-up.
  __device__ __forceinline__ void count(int low, int high, int left, unsigned more, const WarpNote& note) const {
    const Cells cells = tables_.cells();
    const Octave octave = cells.octave(Cells::octave_of(low));
    uint32_t cell = cells.cell(low, octave);
    const float weight = cells.weight(cell + (low >= cells.boundary(cell) ? 4 : 0));
    int steps = 0, next = cells.boundary(cell);
    for (unsigned i = 0; i <= more; ++i, cell += 4) {
      const int boundary = next;
      next = cells.boundary(cell + 4);
      if (boundary <= low || boundary > high) continue;
      if (++steps > WarpNote::kMostSteps) break;
      note.set_step(steps - 1, boundary, left, cells.weight(cell + 4) - cells.weight(cell));
    }
    if (steps <= WarpNote::kMostSteps) {
      note.set(static_cast<unsigned>(steps), weight);
    } else {
      note.set_words(cells.octave(Cells::octave_of(high)).first, 0);
    }
  }
  // Bits of the note of a tile that is looked up in the cells, if they answer for gaps lo to hi; `span`: bytes of those
  // cells.
  __device__ __forceinline__ Octave look_up(long long lo, long long hi, unsigned& code, unsigned& span) const {
    const Cells cells = tables_.cells();
    if (!cells.answer(lo, hi)) return {};
    const int first = Cells::octave_of(static_cast<int>(lo)), last = Cells::octave_of(static_cast<int>(hi));
    const Octave octave = cells.octave(last);
    span = cells.cell(static_cast<int>(hi), octave) - cells.cell(static_cast<int>(lo), cells.octave(first));
    code = WarpNote::kCells;
    if (first == last) code |= WarpNote::kOneOctave | static_cast<unsigned>(octave.shift) * WarpNote::kShift;
    return octave;
  }

  const RelativeBiasParams& params_;
  BiasTables<B> tables_;
  float factor_;
};

}  // namespace hstu_ops::cuda::sm90
