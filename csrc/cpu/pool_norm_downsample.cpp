// Average-pool by two and LayerNorm over packed segments; the arithmetic of a row is in pool_norm_row.h.
#include "ops.h"
#include "parallel.h"
#include "pool_norm_row.h"

namespace step {
namespace STEP_ISA {

void pool_norm_downsample(const float* hidden, const int32_t* cu_seqlens, int64_t segments, const float* weight, const float* bias,
                          float* out, int64_t rows, int64_t width, float eps) {
  // A row costs about a microsecond at width 1,280: 32 rows pay for waking a thread.
  parallel_for(rows, 32, [&](int64_t begin, int64_t end) {
    int64_t segment = 0, first_row = 0;
    for (int64_t row = begin; row < end; row++) {
      while (row >= first_row + (cu_seqlens[segment + 1] - cu_seqlens[segment]) / 2) {
        first_row += (cu_seqlens[segment + 1] - cu_seqlens[segment]) / 2;
        segment++;
      }
      const float* source = hidden + (cu_seqlens[segment] + 2 * (row - first_row)) * width;
      pooled_row(source, source + width, weight, bias, out + row * width, width, eps);
    }
  });
}

}  // namespace STEP_ISA
}  // namespace step
