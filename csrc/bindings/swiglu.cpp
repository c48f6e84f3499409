#include "native.h"

namespace step {

// `wide` holds gate and up side by side.
static void check_swiglu(const Tensor& wide, const Tensor& narrow) {
  check(wide, "x or grad_x", ScalarType::Float, 2);
  check(narrow, "out or gradient", ScalarType::Float, 2);
  STD_TORCH_CHECK(wide.size(0) == narrow.size(0) && wide.size(1) == 2 * narrow.size(1), "x must be twice as wide as the result");
}

static void swiglu_cpu(const Tensor& x, const Tensor& out) {
  check_swiglu(x, out);
  STEP_CPU(swiglu, floats(x), mutable_floats(out), out.size(0), out.size(1));
}

static void swiglu_backward_cpu(const Tensor& gradient, const Tensor& x, const Tensor& grad_x) {
  check_swiglu(x, gradient);
  check_swiglu(grad_x, gradient);
  STEP_CPU(swiglu_backward, floats(gradient), floats(x), mutable_floats(grad_x), gradient.size(0), gradient.size(1));
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("swiglu(Tensor x, Tensor(a!) out) -> ()");
  m.def("swiglu_backward(Tensor gradient, Tensor x, Tensor(a!) grad_x) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&step::swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&step::swiglu_backward_cpu));
}
