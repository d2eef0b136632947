// C = A B or C += A B on row-major tiles in cache: the one matrix product of the CPU kernels.
//
// A block of MR rows by NV vectors of C stays in registers; each step broadcasts MR numbers of A against NV vectors of
// B. N is a multiple of the vector length (tiles are padded), M and K are free. What is added to C is summed by itself
// first: rounding errors of a long sum grow with the number of its tiles, not of its terms.
#pragma once

#include "cpu/simd.h"

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)  // 32 vector registers
constexpr int kRowsInRegisters = 8, kVectorsInRegisters = 2;
#else  // 16
constexpr int kRowsInRegisters = 6, kVectorsInRegisters = 2;
#endif

enum class Operand { kAsIs, kTransposed };  // kTransposed: A is stored [K][M]
enum class Output { kOverwrite, kAccumulate };

template <class C>
struct Tile {  // row-major, ld elements from row to row
  C* data;
  int64_t ld;

  HSTU_INLINE C* at(int64_t row, int64_t col) const { return data + row * ld + col; }
};

template <Operand kA, Output kOut, int MR, int NV, class C>
HSTU_INLINE void gemm_block(int k_size, const C* a, int64_t lda, const C* b, int64_t ldb, C* c, int64_t ldc) {
  constexpr int L = kLanes<C>;
  Vec<C> acc[MR][NV];
  HSTU_UNROLL
  for (int i = 0; i < MR; ++i) {
    HSTU_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec<C>{};
  }
  for (int k = 0; k < k_size; ++k) {
    Vec<C> row[NV];
    HSTU_UNROLL
    for (int j = 0; j < NV; ++j) row[j] = load(b + k * ldb + j * L);
    HSTU_UNROLL
    for (int i = 0; i < MR; ++i) {
      const Vec<C> x = broadcast(kA == Operand::kTransposed ? a[k * lda + i] : a[i * lda + k]);
      HSTU_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] += x * row[j];
    }
  }
  HSTU_UNROLL
  for (int i = 0; i < MR; ++i) {
    HSTU_UNROLL
    for (int j = 0; j < NV; ++j) {
      C* const to = c + i * ldc + j * L;
      store(to, kOut == Output::kAccumulate ? load(to) + acc[i][j] : acc[i][j]);
    }
  }
}

// The rows of one panel of NV vectors, in blocks of MR and then of halves of it.
template <Operand kA, Output kOut, int MR, int NV, class C>
HSTU_INLINE void gemm_panel(int m, int m_size, int k_size, Tile<const C> a, const C* b, int64_t ldb, C* c,
                            int64_t ldc) {
  for (; m + MR <= m_size; m += MR)
    gemm_block<kA, kOut, MR, NV>(k_size, kA == Operand::kTransposed ? a.at(0, m) : a.at(m, 0), a.ld, b, ldb,
                                 c + m * ldc, ldc);
  if constexpr (MR > 1) {
    if (m < m_size) gemm_panel<kA, kOut, MR / 2, NV>(m, m_size, k_size, a, b, ldb, c, ldc);
  }
}

template <Operand kA, Output kOut, class C>
void gemm(int m_size, int n_size, int k_size, Tile<const C> a, Tile<const C> b, Tile<C> c) {
  constexpr int L = kLanes<C>, NV = kVectorsInRegisters, MR = kRowsInRegisters;
  int n = 0;
  for (; n + NV * L <= n_size; n += NV * L)
    gemm_panel<kA, kOut, MR, NV>(0, m_size, k_size, a, b.at(0, n), b.ld, c.at(0, n), c.ld);
  for (; n < n_size; n += L) gemm_panel<kA, kOut, MR, 1>(0, m_size, k_size, a, b.at(0, n), b.ld, c.at(0, n), c.ld);
}

}  // namespace
}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
