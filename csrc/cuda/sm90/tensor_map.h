// Descriptions of [rows, heads, dim] tensors for the copy engine. Used by the launchers.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "core/params.h"
#include "cuda/errors.h"
#include "cuda/sm90/config.h"

namespace hstu_ops::cuda::sm90 {

// The copy engine wants 16-byte-aligned rows at least a row apart.
inline bool has_tensor_map(const View& view, int dim, int64_t rows) {
  const auto fits = [](int64_t stride) { return stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 38); };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && fits(view.row_stride) && fits(view.head_stride) &&
         dim <= 256 && rows > 0 && rows <= INT32_MAX;
}

// Boxes of `box_rows` rows, one head and one panel; columns past `dim` and rows past `rows` read as zeros.
inline Status make_tensor_map(CUtensorMap& map, DType type, const View& view, int64_t rows, int heads, int dim,
                              int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (!encode) return {"the driver has no cuTensorMapEncodeTiled: update it to one for CUDA 12 or later"};
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(heads),
                              static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(view.head_stride) * 2,
                                static_cast<cuuint64_t>(view.row_stride) * 2};
  const cuuint32_t box[] = {kPanel, 1, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1, 1};
  // It needs a current context, which a new thread (autograd's for one) may not have yet.
  thread_local const cudaError_t context = [] {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error == cudaSuccess ? cudaSetDevice(device) : error;
  }();
  HSTU_TRY(context);
  const CUresult result =
      encode(&map, type == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
             view.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return {"cuTensorMapEncodeTiled: error " + std::to_string(result)};
  return {};
}

// The four of a kernel of the backward: boxes of so many rows of queries and dO, and of keys and values.
template <class Arguments>
Status make_tensor_maps(Arguments& to, const AttentionBwdParams& params, int query_rows, int key_rows) {
  const AttentionProblem& a = params.problem;
  const auto make = [&](CUtensorMap& map, const View& view, int64_t rows, int dim, int box) {
    return make_tensor_map(map, a.dtype, view, rows, a.heads, dim, box);
  };
  if (Status s = make(to.q, a.q, a.jagged.total_q, a.dim_qk, query_rows); !s.ok()) return s;
  if (Status s = make(to.grad_out, params.grad_out, a.jagged.total_q, a.dim_v, query_rows); !s.ok()) return s;
  if (Status s = make(to.k, a.k, a.jagged.total_kv, a.dim_qk, key_rows); !s.ok()) return s;
  return make(to.v, a.v, a.jagged.total_kv, a.dim_v, key_rows);
}

}  // namespace hstu_ops::cuda::sm90
