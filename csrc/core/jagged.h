// Offsets, targets and contextual lengths of one sequence: all reads of them happen here, once per sequence.
//
// No content can lead outside the tensors: bounds are clamped to [0, total], the first sequence starts at 0 and the
// last one ends at total, so that together the sequences also cover every row (no output row stays unwritten).
#pragma once

#include "core/params.h"

namespace hstu_ops {

constexpr int64_t kMaxLength = 1 << 30;  // of a sequence: leaves int arithmetic on rows room

struct Sequence {
  int64_t begin_q = 0, begin_kv = 0;  // first rows in the jagged tensors
  int num_q = 0;                      // query rows; row r of them is row first_row + r of the mask
  int first_row = 0;                  // negative only for wrong content: such rows keep nothing
  Mask mask;                          // mask.len keys
};

struct RowRange {
  int64_t begin = 0;
  int size = 0;
};

// x: offsets[b].
HSTU_HD int64_t clamped_offset(int64_t x, int b, int batch, int64_t total) {
  return b == 0 ? 0 : b == batch ? total : x < 0 ? 0 : x > total ? total : x;
}

HSTU_HD int64_t clamped_offset(const IntArray& offsets, int b, int batch, int64_t total) {
  return clamped_offset(offsets[b], b, batch, total);
}

HSTU_HD RowRange row_range(int64_t begin, int64_t end) {
  const int64_t size = end > begin ? end - begin : 0;
  return {begin, static_cast<int>(size < kMaxLength ? size : kMaxLength)};
}

HSTU_HD RowRange row_range(const IntArray& offsets, int b, int batch, int64_t total) {
  return row_range(clamped_offset(offsets, b, batch, total), clamped_offset(offsets, b + 1, batch, total));
}

HSTU_HD int clamped_length(const IntArray& lengths, int b, int absent, int most) {
  const int64_t x = lengths ? lengths[b] : absent;
  return static_cast<int>(x < 0 ? 0 : x > most ? most : x);
}

HSTU_HD Sequence load_sequence(const JaggedParams& p, const MaskOptions& options, int b) {
  Sequence s;
  const RowRange kv = row_range(p.offsets, b, p.batch, p.total_kv);
  const RowRange q = p.offsets_q ? row_range(p.offsets_q, b, p.batch, p.total_q) : kv;
  s.begin_q = q.begin;
  s.begin_kv = kv.begin;
  s.num_q = q.size;
  s.first_row = kv.size - q.size;
  s.mask = Mask::make(kv.size, clamped_length(p.num_targets, b, 0, kv.size),
                      clamped_length(p.contextual_seq_lens, b, p.contextual_seq_len, kv.size), options);
  return s;
}

}  // namespace hstu_ops
