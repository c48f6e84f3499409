#include "native.h"

namespace step {

// Tokens and heads may lie at any distance, as in a slice of a fused projection.
static void rope_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse, const Tensor& out) {
  check(out, "out", ScalarType::Float, 3);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 3 && (x.stride(2) == 1 || !x.numel()),
                  "x must be float32 [tokens, heads, dim], dense within a head");
  for (int64_t d = 0; d < 3; d++) STD_TORCH_CHECK(x.size(d) == out.size(d), "out must be shaped as x");
  STD_TORCH_CHECK(x.size(2) % 2 == 0, "a head must be of even width");
  for (const Tensor* table : {&cos, &sin}) {
    check(*table, "cos or sin", ScalarType::Float, 2);
    STD_TORCH_CHECK(table->size(0) == x.size(0) && table->size(1) == x.size(2), "cos and sin must be [tokens, dim]");
  }
  STEP_CPU(rope, floats(x), x.stride(0), x.stride(1), floats(cos), floats(sin), mutable_floats(out), x.size(0), x.size(1),
           x.size(2), inverse);
}

static void rope_to_cache_cpu(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& slots, const Tensor& query,
                              const Tensor& keys, const Tensor& values) {
  check(qkv, "qkv", ScalarType::Float, 4);
  const int64_t tokens = qkv.size(0), groups = qkv.size(1), queries = qkv.size(2) - 2, dim = qkv.size(3);
  STD_TORCH_CHECK(queries > 0 && dim % 2 == 0, "qkv must have queries, a key and a value of even width");
  check(query, "query", ScalarType::Float, 3);
  STD_TORCH_CHECK(query.size(0) == tokens && query.size(1) == groups * queries && query.size(2) == dim,
                  "query must be [tokens, groups * queries, dim]");
  for (const Tensor* table : {&cos, &sin}) {
    check(*table, "cos or sin", ScalarType::Float, 2);
    STD_TORCH_CHECK(table->size(0) == tokens && table->size(1) == dim, "cos and sin must be [tokens, dim]");
  }
  for (const Tensor* cache : {&keys, &values}) {
    check(*cache, "a cache", ScalarType::Float, 4);
    STD_TORCH_CHECK(cache->size(2) == groups && cache->size(3) == dim, "a cache must be [pages, page_size, groups, dim]");
  }
  check(slots, "slots", ScalarType::Long, 1);
  STD_TORCH_CHECK(slots.size(0) == tokens && keys.size(0) == values.size(0) && keys.size(1) == values.size(1),
                  "slots must be [tokens], the caches of one size");
  const int64_t* places = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t i = 0; i < tokens; i++)
    STD_TORCH_CHECK(places[i] >= 0 && places[i] < keys.size(0) * keys.size(1), "slot ", places[i], " is not in the cache");
  STEP_CPU(rope_to_cache, floats(qkv), floats(cos), floats(sin), places, mutable_floats(query), mutable_floats(keys),
           mutable_floats(values), tokens, groups, queries, dim);
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse, Tensor(a!) out) -> ()");
  m.def(
      "rope_to_cache(Tensor qkv, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) query, Tensor(b!) keys, Tensor(c!) values) -> "
      "()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) {
  m.impl("rope", TORCH_BOX(&step::rope_cpu));
  m.impl("rope_to_cache", TORCH_BOX(&step::rope_to_cache_cpu));
}
