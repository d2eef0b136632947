// Checks of an op's tensor arguments. A failure names the argument, what was expected and what came; torch turns the
// std::invalid_argument into a Python ValueError.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/params.h"
#include "torch/stable.h"

namespace hstu_ops {

// What an error says. It is spelt only when a check fails: spelling takes longer than all checks of a call.
inline std::string text(std::string words) { return words; }
inline std::string text(int64_t number) { return std::to_string(number); }
inline std::string text(const Shape& shape) {
  std::string words = "[";
  for (int64_t i = 0; i < shape.dim() && i < Shape::kMost; ++i) words += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return words + (shape.dim() > Shape::kMost ? ", ...]" : "]");
}
inline std::string text(Device device) {
  if (device.type == abi::aoti_torch_device_type_cpu()) return "cpu";
  return (device.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(device.index);
}
template <class F>
auto text(const F& spell) -> decltype(text(spell())) {
  return text(spell());
}

// `expected` and `got`: words, numbers, shapes, or functions that return one.
template <class Expected, class Got>
void expect(bool good, const char* argument, const Expected& expected, const Got& got) {
  if (good) return;
  throw std::invalid_argument(std::string("hstu_ops: ") + argument + ": expected " + text(expected) + ", got " +
                              text(got));
}

inline std::string dtype_name(int32_t dtype) {
  const struct {
    int32_t dtype;
    const char* name;
  } names[] = {{abi::aoti_torch_dtype_float64(), "float64"}, {abi::aoti_torch_dtype_float32(), "float32"},
               {abi::aoti_torch_dtype_float16(), "float16"}, {abi::aoti_torch_dtype_bfloat16(), "bfloat16"},
               {abi::aoti_torch_dtype_int64(), "int64"},     {abi::aoti_torch_dtype_int32(), "int32"},
               {abi::aoti_torch_dtype_int16(), "int16"},     {abi::aoti_torch_dtype_int8(), "int8"},
               {abi::aoti_torch_dtype_uint8(), "uint8"},     {abi::aoti_torch_dtype_bool(), "bool"}};
  for (const auto& known : names) {
    if (known.dtype == dtype) return known.name;
  }
  return "another dtype";
}

inline void expect_device(const Tensor& tensor, const char* argument, Device device, const char* like = "q") {
  expect(
      tensor.device() == device, argument, [&] { return "a tensor on " + text(device) + " like " + like; },
      [&] { return "one on " + text(tensor.device()); });
}

inline DType expect_float(const Tensor& tensor, const char* argument) {
  const int32_t dtype = tensor.dtype();
  if (dtype == abi::aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == abi::aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (dtype == abi::aoti_torch_dtype_float16()) return DType::kFloat16;
  expect(dtype == abi::aoti_torch_dtype_float64(), argument, "float64, float32, float16 or bfloat16",
         [=] { return dtype_name(dtype); });
  return DType::kFloat64;
}

// What sums, norms' weights and bias tables are kept in beside a tensor of this type.
inline int32_t accumulation_dtype(int32_t dtype) {
  const int32_t wide = abi::aoti_torch_dtype_float64();
  return dtype == wide ? wide : abi::aoti_torch_dtype_float32();
}

inline int int_size(int64_t size, const char* argument) {
  expect(size <= std::numeric_limits<int>::max(), argument, "fewer than 2^31 entries", size);
  return static_cast<int>(size);
}

inline void expect_dtype(const Tensor& tensor, const char* argument, std::initializer_list<int32_t> allowed) {
  const int32_t dtype = tensor.dtype();
  if (std::find(allowed.begin(), allowed.end(), dtype) != allowed.end()) return;
  std::string names;
  for (int32_t one : allowed) names += (names.empty() ? "" : " or ") + dtype_name(one);
  expect(false, argument, names, dtype_name(dtype));
}

// `shape` and its spelling in the documentation, such as "[total_q, H, Dqk]".
inline void expect_shape(const Tensor& tensor, const char* argument, const Shape& shape, const char* spelling) {
  const Shape got = tensor.shape();
  expect(got == shape, argument, [&] { return std::string("shape ") + spelling + " = " + text(shape); }, got);
}

// The last dimension is contiguous and the others are not reversed; without elements strides may be anything.
inline void expect_rows(const Tensor& tensor, const char* argument) {
  const int64_t last = tensor.dim() - 1;
  for (int64_t i = 0; i <= last; ++i)
    if (tensor.size(i) == 0) return;
  for (int64_t i = 0; i <= last; ++i) {
    const int64_t stride = tensor.stride(i);
    const bool good = i == last ? stride == 1 || tensor.size(i) <= 1 : stride >= 0;
    expect(good, argument, i == last ? "a contiguous last dimension" : "strides of at least 0",
           [=] { return "stride " + text(stride) + " in dimension " + text(i); });
  }
}

// None of the first `dims` dimensions repeats the same memory: a kernel would take it for shared and write one
// gradient.
inline void expect_unexpanded(const Tensor& tensor, const char* argument, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i)
    expect(tensor.size(i) <= 1 || tensor.stride(i) > 0, argument, "size 1 where entries are shared",
           [=] { return "an expanded dimension " + text(i); });
}

}  // namespace hstu_ops
