// Rotary embedding of heads, half-rotated: both halves of a head are read once and written once.
#include <cstring>

#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

namespace {

constexpr int64_t kGrain = 16384;  // floats of a thread's share at least

// `inverse` multiplies with the transposed matrix, which is the gradient.
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

// Of each token and group the queries, the key and the value lie side by side; key and value go to the token's slot.
void rope_to_cache(const float* qkv, const float* cos, const float* sin, const int64_t* slots, float* query, float* keys,
                   float* values, int64_t tokens, int64_t groups, int64_t queries, int64_t dim) {
  parallel_for(tokens, 1 + kGrain / (groups * (queries + 2) * dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      const float *c = cos + token * dim, *s = sin + token * dim;
      for (int64_t group = 0; group < groups; group++) {
        const float* head = qkv + (token * groups + group) * (queries + 2) * dim;
        const int64_t place = (slots[token] * groups + group) * dim;
        for (int64_t i = 0; i < queries; i++, head += dim)
          rotate_head(head, c, s, query + ((token * groups + group) * queries + i) * dim, dim / 2, false);
        rotate_head(head, c, s, keys + place, dim / 2, false);
        std::memcpy(values + place, head + dim, sizeof(float) * dim);
      }
    }
  });
}

}  // namespace STEP_ISA
}  // namespace step
