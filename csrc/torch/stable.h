// Owning C++ types over stable_abi.h: whatever is thrown, no handle leaks, and every return code is checked.
// Used by everything in csrc/torch.
#pragma once

#include <dlfcn.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "torch/stable_abi.h"

namespace hstu_ops {

inline void check(abi::Error error, const char* call) {
  if (error == 0) return;
  const char* why = "its log on stderr says why";  // torch < 2.13 tells nobody else
  if (abi::torch_exception_get_what_without_backtrace != nullptr) {
    why = abi::torch_exception_get_what_without_backtrace();
  }
  const std::string function(call, std::strcspn(call, "("));
  throw std::runtime_error("hstu_ops: " + function + " failed in libtorch: " + why);
}
#define HSTU_ABI(call) ::hstu_ops::check(::hstu_ops::abi::call, #call)

struct Device {
  int32_t type = 0, index = 0;

  bool is_cuda() const { return type == abi::aoti_torch_device_type_cuda(); }
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
};

// The sizes of a tensor; of one with more dimensions than any of ours, the first few.
class Shape {
 public:
  static constexpr int kMost = 8;

  Shape(const int64_t* sizes, int64_t dim) : dim_(dim) {
    for (int64_t i = 0; i < dim && i < kMost; ++i) sizes_[i] = sizes[i];
  }
  Shape(std::initializer_list<int64_t> sizes) : Shape(sizes.begin(), static_cast<int64_t>(sizes.size())) {}

  int64_t dim() const { return dim_; }
  int64_t operator[](int64_t i) const { return sizes_[i]; }
  const int64_t* data() const { return sizes_; }
  bool operator==(const Shape& other) const {
    if (dim_ != other.dim_) return false;
    for (int64_t i = 0; i < dim_ && i < kMost; ++i) {
      if (sizes_[i] != other.sizes_[i]) return false;
    }
    return true;
  }
  bool operator!=(const Shape& other) const { return !(*this == other); }

 private:
  int64_t dim_;
  int64_t sizes_[kMost];
};

class Tensor {  // owns one reference
 public:
  explicit Tensor(abi::TensorObject* handle) noexcept : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) abi::aoti_torch_delete_tensor_object(handle_);
  }

  // Uninitialised and contiguous.
  static Tensor empty(const Shape& sizes, int32_t dtype, Device device) {
    if (sizes.dim() > Shape::kMost) throw std::logic_error("hstu_ops: a result of more dimensions than any has");
    int64_t strides[Shape::kMost] = {};
    int64_t stride = 1;
    for (int64_t i = sizes.dim(); i-- > 0;) {
      strides[i] = stride;
      stride *= sizes[i] > 1 ? sizes[i] : 1;
    }
    abi::TensorObject* handle = nullptr;
    HSTU_ABI(aoti_torch_empty_strided(sizes.dim(), sizes.data(), strides, dtype, device.type, device.index, &handle));
    return Tensor(handle);
  }

  // Another shape over the same memory, from `offset` elements behind this tensor's first.
  Tensor view(const Shape& sizes, const Shape& strides, int64_t offset) const {
    abi::TensorObject* handle = nullptr;
    HSTU_ABI(aoti_torch__reinterpret_tensor(handle_, sizes.dim(), sizes.data(), strides.data(), offset, &handle));
    return Tensor(handle);
  }

  int64_t dim() const {
    int64_t dim = 0;
    HSTU_ABI(aoti_torch_get_dim(handle_, &dim));
    return dim;
  }
  int64_t size(int64_t i) const { return sizes()[i]; }
  int64_t stride(int64_t i) const {
    int64_t* strides = nullptr;
    HSTU_ABI(aoti_torch_get_strides(handle_, &strides));
    return strides[i];
  }
  Shape shape() const { return {sizes(), dim()}; }
  int32_t dtype() const {
    int32_t dtype = 0;
    HSTU_ABI(aoti_torch_get_dtype(handle_, &dtype));
    return dtype;
  }
  Device device() const {
    Device device;
    HSTU_ABI(aoti_torch_get_device_type(handle_, &device.type));
    HSTU_ABI(aoti_torch_get_device_index(handle_, &device.index));
    return device;
  }
  void* data() const {
    void* data = nullptr;
    HSTU_ABI(aoti_torch_get_data_ptr(handle_, &data));
    return data;
  }

  abi::TensorObject* release() noexcept { return std::exchange(handle_, nullptr); }

 private:
  const int64_t* sizes() const {
    int64_t* sizes = nullptr;
    HSTU_ABI(aoti_torch_get_sizes(handle_, &sizes));
    return sizes;
  }
  abi::TensorObject* handle_;
};

// Takes the arguments of a boxed kernel off its stack, in the order of the schema. Nothing here throws, so a struct
// whose members are initialised from it owns either all arguments or, before its first member, none.
class Arguments {
 public:
  explicit Arguments(const abi::Value* stack) noexcept : next_(stack) {}

  Tensor tensor() noexcept { return Tensor(as_tensor(*next_++)); }
  int64_t integer() noexcept { return static_cast<int64_t>(*next_++); }
  bool boolean() noexcept { return (*next_++ & 0xff) != 0; }
  double number() noexcept { return as_number(*next_++); }
  std::optional<Tensor> optional_tensor() noexcept {
    const std::optional<abi::Value> value = unwrap();
    return value ? std::optional<Tensor>(as_tensor(*value)) : std::nullopt;
  }
  std::optional<double> optional_number() noexcept {
    const std::optional<abi::Value> value = unwrap();
    return value ? std::optional<double>(as_number(*value)) : std::nullopt;
  }

 private:
  static abi::TensorObject* as_tensor(abi::Value value) noexcept {
    return reinterpret_cast<abi::TensorObject*>(static_cast<uintptr_t>(value));
  }
  static double as_number(abi::Value value) noexcept {
    double number = 0;
    std::memcpy(&number, &value, sizeof(number));
    return number;
  }
  std::optional<abi::Value> unwrap() noexcept {
    auto* box = reinterpret_cast<abi::Value*>(static_cast<uintptr_t>(*next_++));
    if (box == nullptr) return std::nullopt;
    const abi::Value value = *box;
    delete box;
    return value;
  }
  const abi::Value* next_;
};

// Results go back only after nothing can throw any more.
inline void give_back(abi::Value* stack, std::initializer_list<Tensor*> results) noexcept {
  for (Tensor* result : results) *stack++ = static_cast<abi::Value>(reinterpret_cast<uintptr_t>(result->release()));
}

inline void give_back(abi::Value* stack, const std::string& result) {
  abi::StringObject* handle = nullptr;
  HSTU_ABI(torch_new_string_handle(result.data(), result.size(), &handle));
  *stack = static_cast<abi::Value>(reinterpret_cast<uintptr_t>(handle));
}

// Makes a CUDA device current for the life of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index) { HSTU_ABI(aoti_torch_create_device_guard(index, &guard_)); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { abi::aoti_torch_delete_device_guard(guard_); }

 private:
  abi::DeviceGuardObject* guard_ = nullptr;
};

// torch's current cudaStream_t. A torch that made a CUDA tensor has libtorch_cuda.so loaded already.
inline void* current_cuda_stream(int32_t device_index) {
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<abi::GetCurrentCudaStream>(library ? dlsym(library, abi::kGetCurrentCudaStream) : nullptr);
  }();
  if (get == nullptr) throw std::runtime_error("hstu_ops: CUDA tensors need a CUDA build of torch");
  void* stream = nullptr;
  check(get(device_index, &stream), abi::kGetCurrentCudaStream);
  return stream;
}

// Definitions or kernels of the torch library "hstu_ops"; they stay registered for the life of the process, since
// torch never unloads an ops library.
class Library {
 public:
  static Library definitions() {
    Library library;
    HSTU_ABI(aoti_torch_library_init_def("hstu_ops", __FILE__, __LINE__, &library.handle_));
    return library;
  }
  static Library kernels(const char* dispatch_key) {
    Library library;
    HSTU_ABI(aoti_torch_library_init_impl("hstu_ops", dispatch_key, __FILE__, __LINE__, &library.handle_));
    return library;
  }
  Library& def(const char* schema) {
    HSTU_ABI(aoti_torch_library_def(handle_, schema));
    return *this;
  }
  Library& impl(const char* op, abi::BoxedKernel kernel) {
    HSTU_ABI(torch_library_impl(handle_, op, kernel, abi::kVersion));
    return *this;
  }

 private:
  abi::LibraryObject* handle_ = nullptr;
};

}  // namespace hstu_ops
