// The library's runtime: threads, the instruction set, and what this build holds.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "native.h"

namespace step {

void parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count > 0)
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

float* thread_scratch(int64_t floats) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  constexpr int64_t kKept = 4 << 20;  // floats
  if (floats > capacity || (capacity > kKept && floats <= kKept)) {
    memory.reset();
    capacity = 0;
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    STD_TORCH_CHECK(memory, "no memory for ", bytes, " bytes of scratch");
    capacity = floats;
  }
  return memory.get();
}

Isa isa() {
#if defined(__x86_64__)
  static const Isa chosen = [] {
    const char* allowed = std::getenv("STEP_KERNELS_ISA");
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    STD_TORCH_CHECK(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
                    "step_kernels needs AVX2 and FMA; set STEP_KERNELS_BACKEND=torch on this processor");
    return wide && !(allowed && std::strcmp(allowed, "avx2") == 0) ? Isa::avx512 : Isa::avx2;
  }();
  return chosen;
#else
  return Isa::portable;
#endif
}

static int64_t isa_code() { return static_cast<int64_t>(isa()); }
static bool has_cuda() {
#ifdef STEP_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace step

STABLE_TORCH_LIBRARY(step_native, m) {
  m.def("isa() -> int");
  m.def("has_cuda() -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&step::isa_code));
  m.impl("has_cuda", TORCH_BOX(&step::has_cuda));
}
