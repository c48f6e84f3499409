// What the two packed attention ops share: the problem as the bindings describe it.
#pragma once

#include <cstdint>

namespace step {

// `[tokens, heads, dim]` with any distance between tokens and heads; the values of a head lie side by side.
struct HeadsView {
  const float* data;
  int64_t token, head;
  const float* at(int64_t row, int64_t index) const { return data + row * token + index * head; }
};

struct AttentionProblem {
  HeadsView query, key, value;
  const int32_t* cu_seqlens;
  const int32_t* valid;  // leading keys of each segment that may be attended to; null means all
  int64_t segments, heads, kv_heads, dim;
  float scale;
  bool causal;
};

struct AttentionGradients {
  HeadsView grad_out, out;
  const float* lse;       // [tokens, heads]
  const float* grad_lse;  // [tokens, heads] or null
  float *query, *key, *value;  // contiguous, written whole
};

}  // namespace step
