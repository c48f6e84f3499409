#include "native.h"

namespace step {

static const int64_t* longs(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

static void draw_tokens_cpu(const Tensor& logits, const Tensor& temperature, const Tensor& seeds, const Tensor& draws,
                            const Tensor& forced, const Tensor& tokens, const Tensor& logprobs) {
  check(logits, "logits", ScalarType::Float, 2);
  const int64_t rows = logits.size(0), width = logits.size(1);
  const struct {
    const Tensor& tensor;
    const char* name;
    ScalarType type;
  } columns[] = {{temperature, "temperature", ScalarType::Float}, {seeds, "seeds", ScalarType::Long},
                 {draws, "draws", ScalarType::Long},              {forced, "forced", ScalarType::Long},
                 {tokens, "tokens", ScalarType::Long},            {logprobs, "logprobs", ScalarType::Float}};
  for (const auto& column : columns) {
    check(column.tensor, column.name, column.type, 1);
    STD_TORCH_CHECK(column.tensor.size(0) == rows, column.name, " must have a value for each row");
  }
  STD_TORCH_CHECK(width > 0 || !rows, "logits must have a column");
  STEP_CPU(draw_tokens, floats(logits), floats(temperature), longs(seeds), longs(draws), longs(forced),
           static_cast<int64_t*>(tokens.mutable_data_ptr()), mutable_floats(logprobs), rows, width);
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def(
      "draw_tokens(Tensor logits, Tensor temperature, Tensor seeds, Tensor draws, Tensor forced, Tensor(a!) tokens, "
      "Tensor(b!) logprobs) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) { m.impl("draw_tokens", TORCH_BOX(&step::draw_tokens_cpu)); }
