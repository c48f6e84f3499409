// What a kernel says in one way for nvcc and for the emulation on the CPU (csrc/emulation, used by the tests).
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define STEP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// Shared memory of a block: `name[count]`, and the array whose size the launch gives.
#define STEP_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define STEP_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(16) unsigned char step_dynamic_shared_[]; \
  type* name = reinterpret_cast<type*>(step_dynamic_shared_)

#else

#include "../emulation/launch.h"

#define STEP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulation::launch((grid), (block), (shared_bytes), [=] { (kernel)(__VA_ARGS__); })
#define STEP_SHARED(type, name, count) \
  static const char name##_key = 0;    \
  type* name = static_cast<type*>(emulation::Block::current()->shared_memory(&name##_key, sizeof(type) * (count)))
#define STEP_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulation::dynamic_shared())

#endif
