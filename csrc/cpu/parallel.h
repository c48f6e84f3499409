// Threads for the kernels of this folder: torch's own pool, reached through one function so that no torch header is needed here.
#pragma once

#include <cstdint>

#include "isa.h"

namespace step {

// Defined in bindings/runtime.cpp. `body` gets ranges that cover [0, count), each at least `grain` long where there are several.
void parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);
int64_t thread_count();

// Memory of the calling thread, aligned to a cache line, kept between calls and valid until its next call: fresh pages would cost
// small ops more than their arithmetic. What a huge call took (attention of a segment of 100,000 tokens: 50 MB) is given back at the
// next small one.
float* thread_scratch(int64_t floats);

namespace STEP_ISA {

// Call `body(begin, end)` over ranges that cover [0, count).
template <class Body>
static inline void parallel_for(int64_t count, int64_t grain, Body&& body) {
  parallel_ranges(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace STEP_ISA
}  // namespace step
