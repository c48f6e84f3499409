// What every binding needs: the part of torch's stable ABI that the lowest supported release has, checks, and the choice of the
// instruction set. Bindings write into tensors that Python has allocated, so they only look at pointers and sizes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../cpu/ops.h"

#ifdef STEP_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

namespace step {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Chosen once, from what the processor has and STEP_KERNELS_ISA allows.
enum class Isa { portable, avx2, avx512 };
Isa isa();

// Call a CPU kernel in the build for this machine.
#if defined(__x86_64__)
#define STEP_CPU(function, ...)                           \
  (::step::isa() == ::step::Isa::avx512                   \
       ? ::step::avx512::function(__VA_ARGS__)            \
       : ::step::avx2::function(__VA_ARGS__))
#else
#define STEP_CPU(function, ...) (::step::portable::function(__VA_ARGS__))
#endif

inline void check(const Tensor& tensor, const char* name, ScalarType type, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == dimensions, name, " must have ", dimensions, " dimensions, has ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
inline float* mutable_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
inline const int32_t* ints(const Tensor& tensor) { return static_cast<const int32_t*>(tensor.const_data_ptr()); }

#ifdef STEP_WITH_CUDA
// The tensor's device for the scope, and its current stream.
struct CudaScope {
  explicit CudaScope(const Tensor& tensor) : guard(tensor.get_device_index()), index(tensor.get_device_index()) {}
  void* stream() const { return torch::stable::accelerator::getCurrentStream(index).nativeHandle(); }
  torch::stable::accelerator::DeviceGuard guard;
  int32_t index;
};
// The element types of csrc/cuda/vectors.h.
inline int cuda_dtype(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, "wrong dtype");
  return type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2;
}
inline void launched(int status, const char* op) { STD_TORCH_CHECK(status == 0, op, ": CUDA error ", status); }
#endif

}  // namespace step
