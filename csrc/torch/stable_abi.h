// The part of libtorch's stable C ABI that hstu_ops uses, declared by hand so that building needs no torch.
//
// All of it (the one weak function aside) exists in torch 2.10 and later and keeps its meaning there. Functions return
// 0 on success. A boxed kernel finds its arguments in a stack of 64-bit values and owns them: tensors are handles to
// delete, an optional is null or a heap-allocated value (from plain new), a float is the bits of a double, a SymInt
// comes as an int.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hstu_ops::abi {

struct TensorObject;
struct LibraryObject;
struct StringObject;
struct DeviceGuardObject;

using Error = int32_t;
using Value = uint64_t;
using BoxedKernel = void (*)(Value* stack, uint64_t num_inputs, uint64_t num_outputs);

// The lowest version served; libtorch converts arguments as that version did.
constexpr uint64_t kVersion = (2ULL << 56) | (10ULL << 48);
constexpr const char* kVersionText = "2.10";

extern "C" {
Error aoti_torch_library_init_def(const char* name, const char* file, uint32_t line, LibraryObject** out);
Error aoti_torch_library_init_impl(const char* name, const char* key, const char* file, uint32_t line,
                                   LibraryObject** out);
Error aoti_torch_library_def(LibraryObject* library, const char* schema);
Error torch_library_impl(LibraryObject* library, const char* op, BoxedKernel kernel, uint64_t version);

Error aoti_torch_delete_tensor_object(TensorObject* tensor);
Error aoti_torch_get_data_ptr(TensorObject* tensor, void** out);
Error aoti_torch_get_dim(TensorObject* tensor, int64_t* out);
Error aoti_torch_get_sizes(TensorObject* tensor, int64_t** out);    // borrowed
Error aoti_torch_get_strides(TensorObject* tensor, int64_t** out);  // borrowed
Error aoti_torch_get_dtype(TensorObject* tensor, int32_t* out);
Error aoti_torch_get_device_type(TensorObject* tensor, int32_t* out);
Error aoti_torch_get_device_index(TensorObject* tensor, int32_t* out);
Error aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                               int32_t device_type, int32_t device_index, TensorObject** out);
Error aoti_torch__reinterpret_tensor(TensorObject* tensor, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                     int64_t offset_increment, TensorObject** out);

int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int16();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();

Error torch_new_string_handle(const char* data, size_t length, StringObject** out);

Error torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                         void* context);
Error torch_get_num_threads(uint32_t* out);

Error aoti_torch_create_device_guard(int32_t device_index, DeviceGuardObject** out);
Error aoti_torch_delete_device_guard(DeviceGuardObject* guard);

// What the last failed call of this thread said. From torch 2.13 on only, hence weak: null in an older one.
[[gnu::weak]] const char* torch_exception_get_what_without_backtrace();
}

// In libtorch_cuda.so, which a CPU build of torch lacks: looked up at run time (see stable.h).
using GetCurrentCudaStream = Error (*)(int32_t device_index, void** out);
constexpr const char* kGetCurrentCudaStream = "aoti_torch_get_current_cuda_stream";

}  // namespace hstu_ops::abi
