#include "native.h"

namespace step {

// A wrong table would read foreign memory; checking costs one pass over the entries in use.
static void check_tables(const Tensor& block_table, const Tensor& lengths, const Tensor& cu_seqlens, int64_t tokens, int64_t pages,
                         int64_t page_size) {
  const int64_t sequences = lengths.size(0), max_pages = block_table.size(1);
  const int32_t *table = ints(block_table), *length = ints(lengths), *bounds = ints(cu_seqlens);
  STD_TORCH_CHECK(cu_seqlens.size(0) == sequences + 1 && block_table.size(0) == sequences,
                  "paged_attention: block_table, lengths and cu_seqlens disagree on the number of sequences");
  STD_TORCH_CHECK(bounds[0] == 0 && bounds[sequences] == tokens, "paged_attention: cu_seqlens must run from 0 to ", tokens);
  for (int64_t i = 0; i < sequences; i++) {
    const int64_t queries = bounds[i + 1] - bounds[i];
    STD_TORCH_CHECK(queries >= 0 && queries <= length[i] && length[i] <= max_pages * page_size, "paged_attention: sequence ", i,
                    " has ", length[i], " tokens, ", queries, " of them new, and a table for ", max_pages * page_size);
    for (int64_t page = 0; queries && page * page_size < length[i]; page++)
      STD_TORCH_CHECK(table[i * max_pages + page] >= 0 && table[i * max_pages + page] < pages, "paged_attention: sequence ", i,
                      " names page ", table[i * max_pages + page], " of ", pages);
  }
}

static void paged_attention_cpu(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                                const Tensor& lengths, const Tensor& cu_seqlens, double scale, const Tensor& out) {
  check(query, "query", ScalarType::Float, 3);
  check(key_cache, "key_cache", ScalarType::Float, 4);
  check(value_cache, "value_cache", ScalarType::Float, 4);
  check(block_table, "block_table", ScalarType::Int, 2);
  check(lengths, "lengths", ScalarType::Int, 1);
  check(cu_seqlens, "cu_seqlens", ScalarType::Int, 1);
  check(out, "out", ScalarType::Float, 3);
  const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2);
  const int64_t pages = key_cache.size(0), page_size = key_cache.size(1), kv_heads = key_cache.size(2);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && dim % 16 == 0 && dim <= 256 && key_cache.size(3) == dim,
                  "paged_attention: heads or dimensions do not fit");
  check_tables(block_table, lengths, cu_seqlens, tokens, pages, page_size);
  STEP_CPU(paged_attention, floats(query), floats(key_cache), floats(value_cache), ints(block_table), ints(lengths), ints(cu_seqlens),
           mutable_floats(out), lengths.size(0), block_table.size(1), page_size, heads, kv_heads, dim, static_cast<float>(scale));
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor lengths, Tensor cu_seqlens, "
      "float scale, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) { m.impl("paged_attention", TORCH_BOX(&step::paged_attention_cpu)); }
