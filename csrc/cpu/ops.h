// What the CPU kernels offer to the bindings, once for every instruction set. Tensors are contiguous float32 unless said otherwise;
// shapes and meaning are those of the Python file of the op's name.
#pragma once

#include <cstdint>

#include "attention.h"
#include "conv_source.h"

namespace step {
// Rows whose part of a norm's weight gradient is summed together: the same for any number of threads.
constexpr int64_t kNormBlock = 64;
}  // namespace step

#define STEP_DECLARE_OPS(isa)                                                                                                     \
  namespace isa {                                                                                                                 \
  void attention_forward(const AttentionProblem& problem, const int32_t* order, float* out, float* lse);                         \
  void attention_backward(const AttentionProblem& problem, const int32_t* order, const AttentionGradients& gradients);           \
  void paged_attention(const float* query, const float* key, const float* value, const int32_t* block_table,                      \
                       const int32_t* lengths, const int32_t* cu_seqlens, float* out, int64_t sequences, int64_t max_pages,       \
                       int64_t page_size, int64_t heads, int64_t kv_heads, int64_t dim, float scale);                             \
  bool merge_audio_source(const int64_t* positions, int64_t count, int32_t* source, int64_t length);                             \
  bool merge_audio(const char* audio, const int64_t* positions, int64_t count, char* tokens, int64_t length, int64_t row_bytes); \
  void merge_audio_backward(const char* gradient, const int32_t* source, char* tokens, char* audio, int64_t length,              \
                            int64_t row_bytes);                                                                                  \
  void gae_varlen(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap, int64_t segments,\
                  float gamma, float decay, float* advantages, float* returns);                                                  \
  void pool_norm_downsample(const float* hidden, const int32_t* cu_seqlens, int64_t segments, const float* weight,                \
                            const float* bias, float* out, int64_t rows, int64_t width, float eps);                               \
  void rms_norm(const float* x, const float* weight, float* out, float* scale, int64_t rows, int64_t width, float eps);           \
  void rms_norm_backward(const float* gradient, const float* x, const float* weight, const float* scale, float* grad_x,           \
                         float* grad_weight, int64_t rows, int64_t width);                                                        \
  void swiglu(const float* x, float* out, int64_t rows, int64_t width);                                                           \
  void swiglu_backward(const float* gradient, const float* x, float* grad_x, int64_t rows, int64_t width);                        \
  void rope(const float* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin, float* out,            \
            int64_t tokens, int64_t heads, int64_t dim, bool inverse);                                                            \
  void rope_to_cache(const float* qkv, const float* cos, const float* sin, const int64_t* slots, float* query, float* keys,       \
                     float* values, int64_t tokens, int64_t groups, int64_t queries, int64_t dim);                                \
  void softmax_statistics(const float* logits, const int64_t* labels, float* out, int64_t rows, int64_t width, int64_t start,     \
                          bool moments);                                                                                          \
  void softmax_gradient(float* logits, const int64_t* labels, const float* lse, const float* first, const float* second,          \
                        const float* at_target, int64_t rows, int64_t width, int64_t start);                                      \
  void skinny_linear(const float* x, const float* weight, const float* bias, bool add, float* y, int64_t rows, int64_t inner,     \
                     int64_t outputs);                                                                                            \
  void draw_tokens(const float* logits, const float* temperature, const int64_t* seeds, const int64_t* draws,                     \
                   const int64_t* forced, int64_t* tokens, float* logprobs, int64_t rows, int64_t width);                         \
  void scale(float* values, const float* factor, int64_t count);                                                                  \
  void conv_gather(const ConvSource& source, int64_t first, int64_t rows, float* columns);                                        \
  void conv_gather_tiles(const ConvSource& source, int64_t first, int64_t tiles, float* planes);                                  \
  void conv_scatter(const float* columns, const int32_t* cu_seqlens, float* x, int64_t first, int64_t rows, int64_t width);       \
  void conv_split_weight(const float* weight, float* planes, int64_t out_width, int64_t width);                                   \
  void conv_join_weight(const float* planes, float* weight, int64_t out_width, int64_t width);                                    \
  void bias_gelu(float* hidden, const float* bias, float* out, int64_t rows, int64_t width);                                      \
  void conv_join_tiles(const float* products, const int32_t* cu_seqlens, const float* bias, float* before, float* out,            \
                       int64_t first, int64_t tiles, int64_t width);                                                              \
  void gelu_gradient(const float* gradient, const float* hidden, float* out, float* total, int64_t rows, int64_t width);          \
  void conv_gradient_tiles(const float* hidden, const int32_t* cu_seqlens, float* planes, int64_t first, int64_t tiles,           \
                           int64_t width);                                                                                        \
  }

namespace step {
STEP_DECLARE_OPS(avx2)
STEP_DECLARE_OPS(avx512)
STEP_DECLARE_OPS(portable)
}  // namespace step
