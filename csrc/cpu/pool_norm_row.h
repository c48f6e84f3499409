// Average-pool by two and LayerNorm of one row: two rows in, one row out, read once. Mean and variance come from values that stay in
// the row's output buffer (in cache), the second moment about the mean, as LayerNorm defines it.
#pragma once

#include <cmath>

#include "isa.h"

namespace step {
namespace STEP_ISA {

static void pooled_row(const float* first, const float* second, const float* weight, const float* bias, float* out, int64_t width,
                       float eps) {
  const int64_t whole = width / kLanes * kLanes, rest = width - whole;
  vec total{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    vec pooled = (load(first + i) + load(second + i)) * splat(0.5f);
    store(out + i, pooled);
    total += pooled;
  }
  if (rest) {
    vec pooled = (load_tail(first + whole, rest) + load_tail(second + whole, rest)) * splat(0.5f);
    store_tail(out + whole, pooled, rest);
    total += pooled;
  }
  const float mean = sum(total) / width;
  vec squares{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    vec centred = load(out + i) - splat(mean);
    squares += centred * centred;
  }
  float square = sum(squares);
  for (int64_t i = whole; i < width; i++) square += (out[i] - mean) * (out[i] - mean);
  const float scale = 1.0f / std::sqrt(square / width + eps);
  for (int64_t i = 0; i < whole; i += kLanes)
    store(out + i, (load(out + i) - splat(mean)) * splat(scale) * load(weight + i) + load(bias + i));
  for (int64_t i = whole; i < width; i++) out[i] = (out[i] - mean) * scale * weight[i] + bias[i];
}

}  // namespace STEP_ISA
}  // namespace step
