// Rows of the caller's tensors into tiles of the accumulation type, and back.
#pragma once

#include "core/params.h"
#include "cpu/simd.h"

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

typedef uint32_t Bits __attribute__((vector_size(HSTU_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(HSTU_VECTOR_BYTES / 2), aligned(2), may_alias));

// One vector of each storage type, as the accumulation type. Loads and stores touch exactly kLanes elements.
struct Float64 {
  using Storage = double;
  static HSTU_INLINE Vec<double> load_vector(const double* p) { return load(p); }
  static HSTU_INLINE void store_vector(double* p, Vec<double> v) { store(p, v); }
};

struct Float32 {
  using Storage = float;
  static HSTU_INLINE Vec<float> load_vector(const float* p) { return load(p); }
  static HSTU_INLINE void store_vector(float* p, Vec<float> v) { store(p, v); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static HSTU_INLINE Vec<float> load_vector(const uint16_t* p) {
    return (Vec<float>)(__builtin_convertvector(*reinterpret_cast<const HalfBits*>(p), Bits) << 16);
  }
  static HSTU_INLINE void store_vector(uint16_t* p, Vec<float> v) {
    const Bits b = (Bits)v;
    const Bits rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;  // to nearest, ties to even
    const Bits quiet_nan = (b >> 16) | 0x40;
    const Bits out = (b & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded;
    *reinterpret_cast<HalfBits*>(p) = __builtin_convertvector(out, HalfBits);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static HSTU_INLINE Vec<float> load_vector(const uint16_t* p) {
    const Bits h = __builtin_convertvector(*reinterpret_cast<const HalfBits*>(p), Bits);
    const Bits magnitude = (h & 0x7fff) << 13;
    const Vec<float> finite = (Vec<float>)magnitude * 0x1p112f;  // rebases the exponent, subnormals included
    const Bits special = magnitude | 0x7f800000;                 // Inf and NaN keep their mantissa
    const Bits value = (h & 0x7c00) == 0x7c00 ? special : (Bits)finite;
    return (Vec<float>)(value | ((h & 0x8000) << 16));
  }
  static HSTU_INLINE void store_vector(uint16_t* p, Vec<float> v) {
    const Bits b = (Bits)v, sign = (b >> 16) & 0x8000, magnitude = b & 0x7fffffff;
    const Bits normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 leaves it, rounded, in the low bits.
    const Bits subnormal = (Bits)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
    Bits out = magnitude < 0x38800000 ? subnormal : normal;
    out = magnitude >= 0x477ff000 ? broadcast_bits(0x7c00) : out;  // rounds past the largest finite number
    out = magnitude > 0x7f800000 ? broadcast_bits(0x7e00) : out;   // NaN
    *reinterpret_cast<HalfBits*>(p) = __builtin_convertvector(out | sign, HalfBits);
  }

 private:
  static HSTU_INLINE Bits broadcast_bits(uint32_t x) { return x - Bits{}; }
};

// dst[0, dim) = factor * src, then zeros up to padded (a multiple of the vector length).
template <class Type, class C>
void load_row(const typename Type::Storage* src, int dim, C factor, C* dst, int padded) {
  constexpr int L = kLanes<C>;
  int d = 0;
  for (; d + L <= dim; d += L) store(dst + d, Type::load_vector(src + d) * factor);
  if (d < dim) {
    typename Type::Storage tail[L] = {};
    for (int i = 0; i < dim - d; ++i) tail[i] = src[d + i];
    store(dst + d, Type::load_vector(tail) * factor);
    d += L;
  }
  for (; d < padded; d += L) store(dst + d, Vec<C>{});
}

template <class Type, class C>
void store_row(const C* src, int dim, C factor, typename Type::Storage* dst) {
  constexpr int L = kLanes<C>;
  int d = 0;
  for (; d + L <= dim; d += L) Type::store_vector(dst + d, load(src + d) * factor);
  if (d < dim) {
    typename Type::Storage tail[L];
    Type::store_vector(tail, load(src + d) * factor);
    for (int i = 0; i < dim - d; ++i) dst[d + i] = tail[i];
  }
}

HSTU_INLINE int64_t row_offset(const View& view, int64_t row, int head) {
  return row * view.row_stride + head * view.head_stride;
}

// Row `row` of head `head` of a tensor of the given type.
HSTU_INLINE void load_row(DType dtype, const View& view, int64_t row, int head, int dim, double factor, double* dst,
                          int padded) {
  (void)dtype;
  load_row<Float64>(static_cast<const double*>(view.data) + row_offset(view, row, head), dim, factor, dst, padded);
}
inline void load_row(DType dtype, const View& view, int64_t row, int head, int dim, float factor, float* dst,
                     int padded) {
  const int64_t at = row_offset(view, row, head);
  if (dtype == DType::kFloat32)
    return load_row<Float32>(static_cast<const float*>(view.data) + at, dim, factor, dst, padded);
  if (dtype == DType::kBFloat16)
    return load_row<BFloat16>(static_cast<const uint16_t*>(view.data) + at, dim, factor, dst, padded);
  load_row<Float16>(static_cast<const uint16_t*>(view.data) + at, dim, factor, dst, padded);
}
inline void store_row(DType dtype, const View& view, int64_t row, int head, int dim, double factor, const double* src) {
  (void)dtype;
  store_row<Float64>(src, dim, factor, static_cast<double*>(view.data) + row_offset(view, row, head));
}
inline void store_row(DType dtype, const View& view, int64_t row, int head, int dim, float factor, const float* src) {
  const int64_t at = row_offset(view, row, head);
  if (dtype == DType::kFloat32) return store_row<Float32>(src, dim, factor, static_cast<float*>(view.data) + at);
  if (dtype == DType::kBFloat16) return store_row<BFloat16>(src, dim, factor, static_cast<uint16_t*>(view.data) + at);
  store_row<Float16>(src, dim, factor, static_cast<uint16_t*>(view.data) + at);
}

// dst[d][r] = src[r][d] for kBlockCols rows.
template <class C>
void transpose(const C* src, int64_t src_ld, int rows, int dims, C* dst, int64_t dst_ld) {
  for (int d = 0; d < dims; ++d)
    for (int r = 0; r < rows; ++r) dst[d * dst_ld + r] = src[r * src_ld + d];
}

}  // namespace
}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
