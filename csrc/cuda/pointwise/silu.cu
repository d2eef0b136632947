// SiLU on ranges of columns, forward and backward: blocks are rectangles of pieces of 16 bytes (single elements where
// rows do not start on 16 bytes), threads side by side along the columns, kRows pieces in flight in each.
#include "core/silu.h"
#include "cuda/pointwise/sigmoid.h"
#include "cuda/pointwise/team_launch.h"

namespace hstu_ops::cuda {
namespace {

constexpr int kRows = 4;

// blockIdx.y: the part. blockIdx.x: kRows * rows of threads. Columns beyond the threads': in turn.
struct Rectangle {
  int threads_x[SiluParams::kMaxParts];  // powers of 2
};

template <class T, bool kVector>
struct Piece {
  static constexpr int kElements = kVector ? 16 / static_cast<int>(sizeof(T)) : 1;
  using Word = std::conditional_t<kVector, uint4, T>;
  union {
    Word word;
    T element[kElements];
  };
  __device__ Piece() : word{} {}
};

// f(row, column, exists) by kRows rows.
template <int kElements, class F>
__device__ __forceinline__ void visit(const SiluParams& p, const SiluPart& part, int threads_x, F&& f) {
  const int x = static_cast<int>(threadIdx.x) % threads_x, y = static_cast<int>(threadIdx.x) / threads_x;
  const int threads_y = kThreads / threads_x;
  const int64_t step = int64_t{gridDim.x} * threads_y * kRows;
  for (int64_t row = (int64_t{blockIdx.x} * kRows) * threads_y + y; row < p.rows; row += step)
    for (int64_t column = int64_t{x} * kElements; column < part.columns; column += threads_x * kElements)
      f(row, threads_y, column);
}

template <class Word, class T>
__device__ __forceinline__ Word* word_at(const hstu_ops::Rows& rows, int64_t row, int64_t column, T) {
  return reinterpret_cast<Word*>(static_cast<T*>(rows.data) + row * rows.row_stride + column);
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    silu_fwd_kernel(const __grid_constant__ SiluParams p, const Rectangle rectangle) {
  using P = Piece<T, kVector>;
  const SiluPart& part = p.parts[blockIdx.y];
  visit<P::kElements>(p, part, rectangle.threads_x[blockIdx.y], [&](int64_t row, int step, int64_t column) {
    P x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (row + r * step < p.rows) x[r].word = *word_at<typename P::Word>(part.x, row + r * step, column, T(0.f));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (part.activate) {
#pragma unroll
        for (int e = 0; e < P::kElements; ++e) {
          const float v = static_cast<float>(x[r].element[e]);
          x[r].element[e] = static_cast<T>(silu(v, sigmoid<T>(v)));
        }
      }
      if (row + r * step < p.rows) *word_at<typename P::Word>(part.y, row + r * step, column, T(0.f)) = x[r].word;
    }
  });
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    silu_bwd_kernel(const __grid_constant__ SiluParams p, const Rectangle rectangle) {
  using P = Piece<T, kVector>;
  const SiluPart& part = p.parts[blockIdx.y];
  visit<P::kElements>(p, part, rectangle.threads_x[blockIdx.y], [&](int64_t row, int step, int64_t column) {
    P x[kRows], g[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * step >= p.rows) continue;
      if (part.activate) x[r].word = *word_at<typename P::Word>(part.x, row + r * step, column, T(0.f));
      if (part.grad_out) g[r].word = *word_at<typename P::Word>(part.grad_out, row + r * step, column, T(0.f));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (part.activate && part.grad_out) {
#pragma unroll
        for (int e = 0; e < P::kElements; ++e) {
          const float v = static_cast<float>(x[r].element[e]);
          g[r].element[e] = static_cast<T>(static_cast<float>(g[r].element[e]) * silu_grad(v, sigmoid<T>(v)));
        }
      }
      if (row + r * step < p.rows) *word_at<typename P::Word>(part.grad_x, row + r * step, column, T(0.f)) = g[r].word;
    }
  });
}

// Threads along the columns, such that few are idle.
int threads_along(int64_t pieces) {
  int best = 1;
  int64_t least = pieces;
  for (int threads = 2; threads <= kThreads; threads *= 2) {
    const int64_t padded = (pieces + threads - 1) / threads * threads;
    if (padded <= least || padded <= pieces + pieces / 16) best = threads, least = padded;
  }
  return best;
}

template <class Launch>
Status launch_silu(const SiluParams& p, bool backward, const Launch& launch) {
  if (p.dtype == DType::kFloat64) return {"float64 is not supported on CUDA: convert to float32, or run on the CPU"};
  if (p.rows == 0 || p.count == 0) return {};
  const size_t size = element_size(p.dtype);
  bool vectors = true;
  for (int i = 0; i < p.count; ++i) {
    const SiluPart& part = p.parts[i];
    vectors = vectors && part.columns * size % 16 == 0 && aligned(part.x, p.dtype) &&
              (backward ? aligned(part.grad_out, p.dtype) && aligned(part.grad_x, p.dtype) : aligned(part.y, p.dtype));
  }
  Rectangle rectangle{};
  int64_t blocks = 1;
  for (int i = 0; i < p.count; ++i) {
    const int threads = threads_along(vectors ? p.parts[i].columns * size / 16 : p.parts[i].columns);
    const int64_t rows = int64_t{kRows} * (kThreads / threads);
    rectangle.threads_x[i] = threads;
    if ((p.rows + rows - 1) / rows > blocks) blocks = (p.rows + rows - 1) / rows;
  }
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  const dim3 grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), static_cast<unsigned>(p.count));
  return with_type(p.dtype, [&](auto element) {
    return with_flag(vectors, [&](auto vector) -> Status {
      launch(element, vector, grid, rectangle);
      HSTU_TRY(cudaGetLastError());
      return {};
    });
  });
}

}  // namespace

size_t silu_workspace(const SiluParams&) { return 0; }

Status silu_fwd(const SiluParams& p, void*, void* stream) {
  return launch_silu(p, false, [&](auto element, auto vector, dim3 grid, const Rectangle& rectangle) {
    silu_fwd_kernel<decltype(element), vector.value>
        <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, rectangle);
  });
}

Status silu_bwd(const SiluParams& p, void*, void* stream) {
  return launch_silu(p, true, [&](auto element, auto vector, dim3 grid, const Rectangle& rectangle) {
    silu_bwd_kernel<decltype(element), vector.value>
        <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, rectangle);
  });
}

}  // namespace hstu_ops::cuda
