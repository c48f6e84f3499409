// Rotary embedding of heads, half-rotated: both halves of a head are read once and written once.
#include "ops.h"
#include "parallel.h"
#include "rotate.h"

namespace step {
namespace STEP_ISA {

namespace {

constexpr int64_t kGrain = 16384;  // floats of a thread's share at least

}  // namespace

void rope(const float* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin, float* out,
          int64_t tokens, int64_t heads, int64_t dim, bool inverse) {
  parallel_for(tokens, 1 + kGrain / (heads * dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++)
      for (int64_t head = 0; head < heads; head++)
        rotate_head(x + token * token_stride + head * head_stride, cos + token * dim, sin + token * dim,
                    out + (token * heads + head) * dim, dim / 2, inverse);
  });
}

}  // namespace STEP_ISA
}  // namespace step
