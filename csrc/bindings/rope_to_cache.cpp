#include "native.h"

namespace step {

static void rope_to_cache_cpu(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& slots, const Tensor& key_cache,
                              const Tensor& value_cache, const Tensor& query) {
  check(qkv, "qkv", ScalarType::Float, 4);
  check(slots, "slots", ScalarType::Long, 1);
  check(query, "query", ScalarType::Float, 4);
  const int64_t tokens = qkv.size(0), groups = qkv.size(1), queries = qkv.size(2) - 2, dim = qkv.size(3);
  STD_TORCH_CHECK(queries > 0 && dim % 2 == 0 && slots.size(0) == tokens, "qkv and slots do not fit");
  STD_TORCH_CHECK(query.size(0) == tokens && query.size(1) == groups && query.size(2) == queries && query.size(3) == dim,
                  "query does not fit qkv");
  for (const Tensor* table : {&cos, &sin}) {
    check(*table, "cos or sin", ScalarType::Float, 2);
    STD_TORCH_CHECK(table->size(0) == tokens && table->size(1) == dim, "cos and sin must be [tokens, dim]");
  }
  for (const Tensor* cache : {&key_cache, &value_cache}) {
    check(*cache, "key_cache or value_cache", ScalarType::Float, 4);
    STD_TORCH_CHECK(cache->size(2) == groups && cache->size(3) == dim, "the caches do not fit qkv");
  }
  const int64_t places = key_cache.size(0) * key_cache.size(1);
  STD_TORCH_CHECK(value_cache.size(0) * value_cache.size(1) == places, "the caches differ in size");
  const int64_t* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t i = 0; i < tokens; i++)
    STD_TORCH_CHECK(slot[i] >= 0 && slot[i] < places, "rope_to_cache: slot ", slot[i], " of ", places);
  STEP_CPU(rope_to_cache, floats(qkv), floats(cos), floats(sin), slot, mutable_floats(key_cache), mutable_floats(value_cache),
           mutable_floats(query), tokens, groups, queries, dim);
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def(
      "rope_to_cache(Tensor qkv, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor(c!) query) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) { m.impl("rope_to_cache", TORCH_BOX(&step::rope_to_cache_cpu)); }
