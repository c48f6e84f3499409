// What the CPU kernels offer to the bindings, once for every instruction set. Tensors are contiguous float32 unless said otherwise;
// shapes and meaning are those of the Python file of the op's name.
#pragma once

#include <cstdint>

#define STEP_DECLARE_OPS(isa)                                                                                                     \
  namespace isa {                                                                                                                 \
  void paged_attention(const float* query, const float* key, const float* value, const int32_t* block_table,                      \
                       const int32_t* lengths, const int32_t* cu_seqlens, float* out, int64_t sequences, int64_t max_pages,       \
                       int64_t page_size, int64_t heads, int64_t kv_heads, int64_t dim, float scale);                             \
  void pool_norm_downsample(const float* hidden, const int32_t* cu_seqlens, int64_t segments, const float* weight,                \
                            const float* bias, float* out, int64_t rows, int64_t width, float eps);                               \
  }

namespace step {
STEP_DECLARE_OPS(avx2)
STEP_DECLARE_OPS(avx512)
STEP_DECLARE_OPS(portable)
}  // namespace step
