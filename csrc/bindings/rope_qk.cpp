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

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) { m.impl("rope", TORCH_BOX(&step::rope_cpu)); }
