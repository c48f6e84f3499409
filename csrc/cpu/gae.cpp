// Generalised advantage estimation: a segment is one chain of fused multiply-adds from its last token to its first (4 cycles a
// token), so threads take segments. Memory is read and written once.
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

void gae_varlen(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap, int64_t segments,
                float gamma, float decay, float* advantages, float* returns) {
  // 8,192 tokens pay for waking a thread.
  const int64_t tokens = segments ? cu_seqlens[segments] : 0, grain = tokens ? (8192 * segments + tokens - 1) / tokens : 1;
  parallel_for(segments, grain, [&](int64_t begin, int64_t end) {
    for (int64_t segment = begin; segment < end; segment++) {
      float next_value = bootstrap[segment], advantage = 0;
      for (int64_t t = cu_seqlens[segment + 1] - 1; t >= cu_seqlens[segment]; t--) {
        const float value = values[t];
        advantage = rewards[t] + gamma * next_value - value + decay * advantage;
        advantages[t] = advantage;
        returns[t] = advantage + value;
        next_value = value;
      }
    }
  });
}

}  // namespace STEP_ISA
}  // namespace step
