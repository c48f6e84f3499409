// Where the strided convolution reads its frames: packed segments, 25 frames a second.
#pragma once

#include <cstdint>

namespace step {

// Outputs of a segment that follow each other and share products; the last tile of a segment may have one or two.
constexpr int kTile = 3;

struct ConvSource {
  const int32_t* cu_seqlens;  // bounds of the segments, in frames
  int64_t width;
  const void* x;  // the frames, float32 or bfloat16; null where they are made from `hidden`
  bool bfloat16;
  // Rows at twice the rate, two of which make a frame (average, layer norm), and the bounds of their segments.
  const float* hidden;
  const int32_t* hidden_starts;
  const float *norm_weight, *norm_bias;
  float eps;
  bool round;  // to bfloat16, as features are stored
  void* keep;  // gets every frame that is made, in bfloat16 if rounded; null for nothing
};

}  // namespace step
