// Checks of what offsets and lengths hold, for callers that can read them on the host. Kernels need none of this to
// stay inside their tensors (see jagged.h): it is for the user's sake.
#pragma once

#include "core/jagged.h"
#include "core/launch.h"

namespace hstu_ops {

inline Status wrong_content(const char* argument, const std::string& expected, int64_t got, int64_t sequence) {
  return {std::string(argument) + ": expected " + expected + ", got " + std::to_string(got) + " for sequence " +
          std::to_string(sequence)};
}

inline Status check_offsets(const char* argument, const IntArray& offsets, int batch, int64_t total) {
  if (offsets[0] != 0) return {std::string(argument) + ": expected to start at 0, got " + std::to_string(offsets[0])};
  for (int b = 0; b < batch; ++b) {
    const int64_t length = offsets[b + 1] - offsets[b];
    if (length < 0 || length >= kMaxLength) return wrong_content(argument, "offsets that rise by 0 to 2^30", length, b);
  }
  if (offsets[batch] == total) return {};
  return {std::string(argument) + ": expected to end at the number of rows, " + std::to_string(total) + ", got " +
          std::to_string(offsets[batch])};
}

inline Status check_content(const JaggedParams& p) {
  const Status keys = check_offsets("seq_offsets", p.offsets, p.batch, p.total_kv);
  if (!keys.ok()) return keys;
  if (p.offsets_q) {
    const Status queries = check_offsets("seq_offsets_q", p.offsets_q, p.batch, p.total_q);
    if (!queries.ok()) return queries;
  }
  for (int b = 0; b < p.batch; ++b) {
    const int64_t n = p.offsets[b + 1] - p.offsets[b];
    const int64_t m = p.offsets_q ? p.offsets_q[b + 1] - p.offsets_q[b] : n;
    if (m > n)
      return wrong_content("seq_offsets_q", "at most as many queries as the " + std::to_string(n) + " keys", m, b);
    const int64_t targets = p.num_targets ? p.num_targets[b] : 0;
    if (targets < 0 || targets > n)
      return wrong_content("num_targets", "0 to the length " + std::to_string(n), targets, b);
    const int64_t contextual = p.contextual_seq_lens ? p.contextual_seq_lens[b] : 0;
    if (contextual < 0) return wrong_content("contextual_seq_len", "at least 0", contextual, b);
  }
  return {};
}

}  // namespace hstu_ops
