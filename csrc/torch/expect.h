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

inline void expect(bool good, const char* argument, const std::string& expected, const std::string& got) {
  if (good) return;
  throw std::invalid_argument(std::string("hstu_ops: ") + argument + ": expected " + expected + ", got " + got);
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

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline std::string device_text(Device device) {
  if (device.type == abi::aoti_torch_device_type_cpu()) return "cpu";
  return (device.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(device.index);
}

inline void expect_device(const Tensor& tensor, const char* argument, Device device, const char* like = "q") {
  expect(tensor.device() == device, argument, "a tensor on " + device_text(device) + " like " + like,
         "one on " + device_text(tensor.device()));
}

inline DType expect_float(const Tensor& tensor, const char* argument) {
  const int32_t dtype = tensor.dtype();
  if (dtype == abi::aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == abi::aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (dtype == abi::aoti_torch_dtype_float16()) return DType::kFloat16;
  expect(dtype == abi::aoti_torch_dtype_float64(), argument, "float64, float32, float16 or bfloat16",
         dtype_name(dtype));
  return DType::kFloat64;
}

// What sums, norms' weights and bias tables are kept in beside a tensor of this type.
inline int32_t accumulation_dtype(int32_t dtype) {
  const int32_t wide = abi::aoti_torch_dtype_float64();
  return dtype == wide ? wide : abi::aoti_torch_dtype_float32();
}

inline int int_size(int64_t size, const char* argument) {
  expect(size <= std::numeric_limits<int>::max(), argument, "fewer than 2^31 entries", std::to_string(size));
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
inline void expect_shape(const Tensor& tensor, const char* argument, const std::vector<int64_t>& shape,
                         const char* spelling) {
  const std::vector<int64_t> got = tensor.shape();
  expect(got == shape, argument, std::string("shape ") + spelling + " = " + shape_text(shape), shape_text(got));
}

// The last dimension is contiguous and the others are not reversed.
inline void expect_rows(const Tensor& tensor, const char* argument) {
  const int64_t last = tensor.dim() - 1;
  for (int64_t i = 0; i <= last; ++i) {
    const int64_t stride = tensor.stride(i);
    const bool good = i == last ? stride == 1 || tensor.size(i) <= 1 : stride >= 0;
    expect(good, argument, i == last ? "a contiguous last dimension" : "strides of at least 0",
           "stride " + std::to_string(stride) + " in dimension " + std::to_string(i));
  }
}

// None of the first `dims` dimensions repeats the same memory: a kernel would take it for shared and write one
// gradient.
inline void expect_unexpanded(const Tensor& tensor, const char* argument, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i)
    expect(tensor.size(i) <= 1 || tensor.stride(i) > 0, argument, "size 1 where entries are shared",
           "an expanded dimension " + std::to_string(i));
}

}  // namespace hstu_ops
