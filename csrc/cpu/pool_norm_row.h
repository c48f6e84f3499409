// Average-pool by two and LayerNorm of one row: two rows in, one row out, read once. Mean and variance come from values that stay in
// the row's output buffer (in cache), the second moment about the mean, as LayerNorm defines it.
#pragma once

#include <cmath>

#include "isa.h"

namespace step {
namespace STEP_ISA {

constexpr int kSums = 4;  // side by side: an addition waits four cycles for the one before it

// Call `step(i, sum)` for every whole vector of a row, with the number of the sum that it goes into.
template <class Step>
static inline void in_turns(int64_t whole, Step&& step) {
  int64_t i = 0;
  for (; i + kSums * kLanes <= whole; i += kSums * kLanes) {
    step(i, 0);
    step(i + kLanes, 1);
    step(i + 2 * kLanes, 2);
    step(i + 3 * kLanes, 3);
  }
  for (; i < whole; i += kLanes) step(i, 0);
}
static inline float sum(const vec (&parts)[kSums]) { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }

static void pooled_row(const float* first, const float* second, const float* weight, const float* bias, float* out, int64_t width,
                       float eps) {
  const int64_t whole = width / kLanes * kLanes, rest = width - whole;
  vec totals[kSums] = {}, squares[kSums] = {};
  in_turns(whole, [&](int64_t i, int part) {
    // The next row's frames, which memory would deliver only when this row is done.
    __builtin_prefetch(first + i + 2 * width);
    __builtin_prefetch(second + i + 2 * width);
    const vec pooled = (load(first + i) + load(second + i)) * splat(0.5f);
    store(out + i, pooled);
    totals[part] += pooled;
  });
  if (rest) {
    const vec pooled = (load_tail(first + whole, rest) + load_tail(second + whole, rest)) * splat(0.5f);
    store_tail(out + whole, pooled, rest);
    totals[0] += pooled;
  }
  const float mean = sum(totals) / width;
  in_turns(whole, [&](int64_t i, int part) {
    const vec centred = load(out + i) - splat(mean);
    squares[part] += centred * centred;
  });
  float square = sum(squares);
  for (int64_t i = whole; i < width; i++) square += (out[i] - mean) * (out[i] - mean);
  const float scale = 1.0f / std::sqrt(square / width + eps);
  for (int64_t i = 0; i < whole; i += kLanes)
    store(out + i, (load(out + i) - splat(mean)) * splat(scale) * load(weight + i) + load(bias + i));
  for (int64_t i = whole; i < width; i++) out[i] = (out[i] - mean) * scale * weight[i] + bias[i];
}

}  // namespace STEP_ISA
}  // namespace step
