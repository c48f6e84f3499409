// Checks of packed segments' bounds. Kernels walk along them without looking, so each binding looks first.
#pragma once

#include "native.h"

namespace step {

// Bounds from 0 on that never fall.
inline void check_bounds(const Tensor& bounds, const char* name) {
  check(bounds, name, ScalarType::Int, 1);
  STD_TORCH_CHECK(bounds.size(0) > 0 && ints(bounds)[0] == 0, name, " must begin with 0");
  for (int64_t segment = 0; segment + 1 < bounds.size(0); segment++)
    STD_TORCH_CHECK(ints(bounds)[segment] <= ints(bounds)[segment + 1], name, " must not fall");
}

// Bounds that end where `packed` does.
inline void check_bounds(const Tensor& bounds, const char* name, const Tensor& packed) {
  check_bounds(bounds, name);
  const int64_t end = ints(bounds)[bounds.size(0) - 1];
  STD_TORCH_CHECK(end == packed.size(0), name, " ends at ", end, ", but there are ", packed.size(0), " rows");
}

// Sum of `count(length)` over the segments.
template <class Count>
inline int64_t total(const Tensor& bounds, Count&& count) {
  int64_t sum = 0;
  for (int64_t segment = 0; segment + 1 < bounds.size(0); segment++)
    sum += count(int64_t{ints(bounds)[segment + 1]} - ints(bounds)[segment]);
  return sum;
}

}  // namespace step
