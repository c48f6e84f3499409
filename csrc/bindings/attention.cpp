#include <algorithm>
#include <numeric>
#include <vector>

#include "native.h"

namespace step {

static HeadsView heads_view(const Tensor& tensor, const char* name, int64_t tokens, int64_t heads, int64_t dim) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == tokens && tensor.size(1) == heads && tensor.size(2) == dim, name,
                  " must be [", tokens, ", ", heads, ", ", dim, "]");
  STD_TORCH_CHECK(tokens == 0 || tensor.stride(2) == 1, name, ": the values of a head must lie side by side");
  return {floats(tensor), tensor.stride(0), tensor.stride(1)};
}

// `valid` is empty where every key may be attended to.
static AttentionProblem attention_problem(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens,
                                          const Tensor& valid, double scale, bool causal) {
  const int64_t tokens = query.size(0), heads = query.size(1), kv_heads = key.size(1), dim = query.size(2);
  STD_TORCH_CHECK(dim > 0 && dim % 16 == 0 && dim <= 256, "head dimension must be a multiple of 16 up to 256, got ", dim);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "query heads must be a multiple of key-value heads");
  check(cu_seqlens, "cu_seqlens", ScalarType::Int, 1);
  check(valid, "valid", ScalarType::Int, 1);
  const int64_t segments = cu_seqlens.size(0) - 1;
  const bool masked = valid.size(0) > 0;
  STD_TORCH_CHECK(!masked || (!causal && valid.size(0) == segments), "valid describes another number of segments");
  const int32_t *starts = ints(cu_seqlens), *keys = masked ? ints(valid) : nullptr;
  STD_TORCH_CHECK(segments >= 0 && starts[0] == 0 && starts[segments] == tokens, "cu_seqlens does not cover the tokens");
  for (int64_t i = 0; i < segments; i++) {
    const int32_t length = starts[i + 1] - starts[i];
    STD_TORCH_CHECK(length >= 0, "cu_seqlens decreases");
    STD_TORCH_CHECK(!keys || (keys[i] >= (length > 0) && keys[i] <= length), "valid must be in 1..length");
  }
  return {heads_view(query, "query", tokens, heads, dim),
          heads_view(key, "key", tokens, kv_heads, dim),
          heads_view(value, "value", tokens, kv_heads, dim),
          starts, keys, segments, heads, kv_heads, dim, static_cast<float>(scale), causal};
}

// Segments, longest first: the last unit of work that a thread takes is a short one.
static std::vector<int32_t> longest_first(const AttentionProblem& problem) {
  std::vector<int32_t> order(problem.segments);
  std::iota(order.begin(), order.end(), 0);
  const int32_t* starts = problem.cu_seqlens;
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return starts[a + 1] - starts[a] > starts[b + 1] - starts[b]; });
  return order;
}

static void attention_forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens,
                                  const Tensor& valid, double scale, bool causal, const Tensor& out, const Tensor& lse) {
  const AttentionProblem problem = attention_problem(query, key, value, cu_seqlens, valid, scale, causal);
  check(out, "out", ScalarType::Float, 3);
  check(lse, "lse", ScalarType::Float, 2);
  STD_TORCH_CHECK(out.numel() == query.numel() && lse.numel() == query.size(0) * query.size(1), "out or lse has the wrong size");
  STEP_CPU(attention_forward, problem, longest_first(problem).data(), mutable_floats(out), mutable_floats(lse));
}

// `grad_lse` is empty where nothing depends on the log-sum-exp.
static void attention_backward_cpu(const Tensor& grad_out, const Tensor& grad_lse, const Tensor& query, const Tensor& key,
                                   const Tensor& value, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
                                   const Tensor& valid, double scale, bool causal, const Tensor& grad_query, const Tensor& grad_key,
                                   const Tensor& grad_value) {
  const AttentionProblem problem = attention_problem(query, key, value, cu_seqlens, valid, scale, causal);
  const int64_t tokens = query.size(0), numel = tokens * problem.heads;
  check(lse, "lse", ScalarType::Float, 2);
  check(grad_lse, "grad_lse", ScalarType::Float, 2);
  for (const Tensor* gradient : {&grad_query, &grad_key, &grad_value}) check(*gradient, "gradient", ScalarType::Float, 3);
  STD_TORCH_CHECK(lse.numel() == numel && (grad_lse.numel() == 0 || grad_lse.numel() == numel), "lse has the wrong size");
  STD_TORCH_CHECK(grad_query.numel() == query.numel() && grad_key.numel() == key.numel() && grad_value.numel() == value.numel(),
                  "a gradient has the wrong size");
  const AttentionGradients gradients{heads_view(grad_out, "grad_out", tokens, problem.heads, problem.dim),
                                     heads_view(out, "out", tokens, problem.heads, problem.dim),
                                     floats(lse),
                                     grad_lse.numel() ? floats(grad_lse) : nullptr,
                                     mutable_floats(grad_query), mutable_floats(grad_key), mutable_floats(grad_value)};
  STEP_CPU(attention_backward, problem, longest_first(problem).data(), gradients);
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor valid, float scale, bool causal, "
      "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "attention_backward(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor cu_seqlens, Tensor valid, float scale, bool causal, Tensor(a!) grad_query, Tensor(b!) grad_key, "
      "Tensor(c!) grad_value) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&step::attention_forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&step::attention_backward_cpu));
}
