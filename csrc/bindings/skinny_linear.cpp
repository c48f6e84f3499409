#include <optional>

#include "native.h"

namespace step {

static void skinny_linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool add,
                              const Tensor& out) {
  check(x, "x", ScalarType::Float, 2);
  check(weight, "weight", ScalarType::Float, 2);
  check(out, "out", ScalarType::Float, 2);
  const int64_t rows = x.size(0), inner = x.size(1), outputs = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == inner && out.size(0) == rows && out.size(1) == outputs, "sizes do not fit together");
  STD_TORCH_CHECK(inner % 16 == 0, "the inner size must be a multiple of 16");
  STD_TORCH_CHECK(!add || !bias, "there is no bias beside what is added to");
  if (bias) {
    check(*bias, "bias", ScalarType::Float, 1);
    STD_TORCH_CHECK(bias->size(0) == outputs, "bias must have a value for each output");
  }
  if (!rows) return;
  STEP_CPU(skinny_linear, floats(x), floats(weight), bias ? floats(*bias) : nullptr, add, mutable_floats(out), rows, inner,
           outputs);
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("skinny_linear(Tensor x, Tensor weight, Tensor? bias, bool add, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) { m.impl("skinny_linear", TORCH_BOX(&step::skinny_linear_cpu)); }
