// What a launcher takes: plain structs, no ownership. Strides count elements; a null pointer means the argument is
// absent. "accumulation type" is float, or double when dtype is kFloat64.
#pragma once

#include <cstdint>

#include "core/mask.h"

namespace hstu_ops {

enum class DType { kFloat64, kFloat32, kFloat16, kBFloat16 };

// An int32 or int64 array.
struct IntArray {
  const void* data = nullptr;
  bool is_int64 = false;

  HSTU_HD explicit operator bool() const { return data != nullptr; }
  HSTU_HD int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// [rows, heads, dim] of the problem's dtype; the last dimension is contiguous.
struct View {
  void* data = nullptr;
  int64_t row_stride = 0, head_stride = 0;
};

struct JaggedParams {
  int batch = 0;
  int64_t total_q = 0, total_kv = 0;
  IntArray offsets;              // [batch + 1], of keys
  IntArray offsets_q;            // [batch + 1], absent: offsets
  IntArray num_targets;          // [batch], absent: 0
  IntArray contextual_seq_lens;  // [batch], absent: contextual_seq_len
  int contextual_seq_len = 0;
};

// Factor of an output row.
struct ScaleParams {
  double value = 1;
  const void* values = nullptr;  // accumulation type, [batch] or, if per_row, [total_q]; absent: value
  bool per_row = false;
};

struct RelativeBiasParams {
  const void* position_weight = nullptr;  // accumulation type, [2 * positions - 1] or one such row per head
  int64_t position_head_stride = 0;       // 0: shared by all heads
  int positions = 0;
  const void* time_weight = nullptr;  // accumulation type, [num_boundaries + 1] or one such row per head
  int64_t time_head_stride = 0;
  const int64_t* time_boundaries = nullptr;  // [num_boundaries], sorted
  int num_boundaries = 0;
  const int64_t* timestamps = nullptr;        // [total_kv]
  const int64_t* query_timestamps = nullptr;  // [total_q], absent: timestamps of the query's own row

  explicit operator bool() const { return position_weight || time_weight; }
  bool same_for_all_heads() const {
    return (!position_weight || position_head_stride == 0) && (!time_weight || time_head_stride == 0);
  }
};

struct DenseBiasParams {
  const void* data = nullptr;  // accumulation type, [batch or 1, heads or 1, size, size]; beyond size the bias is 0
  int64_t batch_stride = 0, head_stride = 0;  // 0: shared
  int64_t row_stride = 0;
  int size = 0;
};

struct AttentionProblem {
  DType dtype = DType::kFloat32;
  int heads = 0, dim_qk = 0, dim_v = 0;
  View q, k, v;
  double alpha = 1;
  ScaleParams scale;
  JaggedParams jagged;
  MaskOptions mask;
  RelativeBiasParams relative;
  DenseBiasParams dense;
  bool allow_tf32 = false;

  // May a row of some sequence keep columns behind its own?
  bool looks_ahead() const { return !mask.causal || jagged.contextual_seq_len > 0 || jagged.contextual_seq_lens; }
};

struct AttentionFwdParams {
  AttentionProblem problem;
  View out;  // [total_q, heads, dim_v]
};

struct AttentionBwdParams {
  AttentionProblem problem;
  View grad_out;
  View grad_q, grad_k, grad_v;
  // Accumulation type, contiguous, the shapes of the tables and of the dense bias; absent: not wanted. Overwritten.
  void* grad_position_weight = nullptr;
  void* grad_time_weight = nullptr;
  void* grad_bias = nullptr;
  bool deterministic = false;
  bool distances_fit = false;  // into the position table, where no sequence is longer than the call says
};

}  // namespace hstu_ops
