// Included by csrc/cuda/portable.h when g++ compiles a .cu file: CUDA's own headers give vector types, bfloat16 and float16; the
// keywords are made harmless, and a launch runs the blocks of the grid one after the other.
//
// Not emulated: wgmma, TMA, mbarriers, clusters, streams. A kernel that needs these is compiled and inspected, not run, without a
// GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __restrict__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ declare_it_with_STEP_SHARED

#include "intrinsics.h"
#include "memory.h"

namespace emulation {

// Why the last launch failed; empty if it did not.
inline std::string& error() {
  static std::string message;
  return message;
}

template <class Kernel>
void launch(dim3 grid, dim3 size, size_t dynamic_bytes, Kernel kernel) {
  error().clear();
  Block block;
  block.grid = grid;
  block.size = size;
  block.threads.resize(size_t{size.x} * size.y * size.z);
  block.kernel = kernel;
  block.dynamic_bytes = dynamic_bytes;
  Sequence sequence;
  try {
    if (block.threads.empty() || block.threads.size() > 1024) throw std::runtime_error("a block has 1 to 1,024 threads");
    if (!grid.x || !grid.y || !grid.z) throw std::runtime_error("a grid has at least one block");
    for (unsigned number : sequence(grid.x * grid.y * grid.z)) {
      block.index = dim3(number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y));
      block.run(sequence);
    }
  } catch (const std::exception& failure) {
    error() = failure.what();
  }
  Block::current() = nullptr;
}

// The kernel's `extern __shared__` array.
inline void* dynamic_shared() {
  static const char key = 0;
  Block& block = *Block::current();
  return block.shared_memory(&key, block.dynamic_bytes);
}

}  // namespace emulation

// The last error, which is then forgotten.
STEP_EMULATION_API const char* step_emulation_error() {
  static std::string last;
  last = std::move(emulation::error());
  emulation::error().clear();
  return last.c_str();
}
#define cudaGetLastError() (emulation::error().empty() ? cudaSuccess : cudaErrorLaunchFailure)
