// Rotary embedding of the product of query, key and value, keys and values going straight into the pages of the cache.
#include <cstring>

#include "ops.h"
#include "parallel.h"
#include "rotate.h"

namespace step {
namespace STEP_ISA {

namespace {

constexpr int64_t kGrain = 16384;  // floats of a thread's share at least

}  // namespace

// qkv: [tokens, groups, queries + 2, dim]; the caches: [slots, groups, dim]; query: [tokens, groups, queries, dim].
void rope_to_cache(const float* qkv, const float* cos, const float* sin, const int64_t* slots, float* key_cache, float* value_cache,
                   float* query, int64_t tokens, int64_t groups, int64_t queries, int64_t dim) {
  parallel_for(tokens, 1 + kGrain / (groups * (queries + 2) * dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      const float *c = cos + token * dim, *s = sin + token * dim;
      for (int64_t group = 0; group < groups; group++) {
        const float* from = qkv + (token * groups + group) * (queries + 2) * dim;
        float* to = query + (token * groups + group) * queries * dim;
        const int64_t place = (slots[token] * groups + group) * dim;
        for (int64_t head = 0; head < queries; head++) rotate_head(from + head * dim, c, s, to + head * dim, dim / 2, false);
        rotate_head(from + queries * dim, c, s, key_cache + place, dim / 2, false);
        std::memcpy(value_cache + place, from + (queries + 1) * dim, sizeof(float) * dim);
      }
    }
  });
}

}  // namespace STEP_ISA
}  // namespace step
