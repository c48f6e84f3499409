#include "native.h"

namespace step {

static void check_norm(const Tensor& x, const Tensor& weight, const Tensor& scale) {
  check(x, "x", ScalarType::Float, 2);
  check(weight, "weight", ScalarType::Float, 1);
  check(scale, "scale", ScalarType::Float, 1);
  STD_TORCH_CHECK(weight.size(0) == x.size(1) && scale.size(0) == x.size(0), "x, weight and scale must agree in sizes");
}

static void rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps, const Tensor& out, const Tensor& scale) {
  check_norm(x, weight, scale);
  check(out, "out", ScalarType::Float, 2);
  STD_TORCH_CHECK(out.size(0) == x.size(0) && out.size(1) == x.size(1), "out must be shaped as x");
  STEP_CPU(rms_norm, floats(x), floats(weight), mutable_floats(out), mutable_floats(scale), x.size(0), x.size(1),
           static_cast<float>(eps));
}

static void rms_norm_backward_cpu(const Tensor& gradient, const Tensor& x, const Tensor& weight, const Tensor& scale,
                                  const Tensor& grad_x, const Tensor& grad_weight) {
  check_norm(x, weight, scale);
  for (const Tensor* tensor : {&gradient, &grad_x}) {
    check(*tensor, "gradient or grad_x", ScalarType::Float, 2);
    STD_TORCH_CHECK(tensor->size(0) == x.size(0) && tensor->size(1) == x.size(1), "gradient and grad_x must be shaped as x");
  }
  check(grad_weight, "grad_weight", ScalarType::Float, 2);
  const int64_t blocks = grad_weight.size(0);
  STD_TORCH_CHECK((blocks == 0 || blocks == (x.size(0) + kNormBlock - 1) / kNormBlock) && grad_weight.size(1) == x.size(1),
                  "grad_weight must have a row for every block of x's rows, or none if it is not wanted");
  STEP_CPU(rms_norm_backward, floats(gradient), floats(x), floats(weight), floats(scale), mutable_floats(grad_x),
           blocks ? mutable_floats(grad_weight) : nullptr, x.size(0), x.size(1));
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) scale) -> ()");
  m.def(
      "rms_norm_backward(Tensor gradient, Tensor x, Tensor weight, Tensor scale, Tensor(a!) grad_x, Tensor(b!) grad_weight) -> "
      "()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&step::rms_norm_cpu));
  m.impl("rms_norm_backward", TORCH_BOX(&step::rms_norm_backward_cpu));
}
