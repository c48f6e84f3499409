// Rotary embedding of one head, half-rotated.
#pragma once

#include "isa.h"

namespace step {
namespace STEP_ISA {

// Both halves are read once and written once. `inverse` multiplies with the transposed matrix, which is the gradient.
static inline void rotate_head(const float* x, const float* cos, const float* sin, float* out, int64_t half, bool inverse) {
  const float *from_second = inverse ? sin + half : sin, *from_first = inverse ? sin : sin + half;
  const float sign = inverse ? 1.0f : -1.0f;
  const int64_t whole = half / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vec first = load(x + i), second = load(x + half + i);
    store(out + i, first * load(cos + i) + splat(sign) * second * load(from_second + i));
    store(out + half + i, second * load(cos + half + i) - splat(sign) * first * load(from_first + i));
  }
  for (int64_t i = whole; i < half; i++) {
    const float first = x[i], second = x[half + i];
    out[i] = first * cos[i] + sign * second * from_second[i];
    out[half + i] = second * cos[half + i] - sign * first * from_first[i];
  }
}

}  // namespace STEP_ISA
}  // namespace step
