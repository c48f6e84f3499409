#include "native.h"

namespace step {

static const int64_t* check_rows(const Tensor& logits, const Tensor& labels) {
  check(logits, "logits", ScalarType::Float, 2);
  check(labels, "labels", ScalarType::Long, 1);
  STD_TORCH_CHECK(labels.size(0) == logits.size(0), "logits and labels must agree in rows");
  return static_cast<const int64_t*>(labels.const_data_ptr());
}

static const float* check_per_row(const Tensor& values, const char* name, const Tensor& logits) {
  check(values, name, ScalarType::Float, 1);
  STD_TORCH_CHECK(values.size(0) == logits.size(0), name, " must have one value for each row of logits");
  return floats(values);
}

static void softmax_statistics_cpu(const Tensor& logits, const Tensor& labels, int64_t start, bool moments, const Tensor& out) {
  const int64_t* targets = check_rows(logits, labels);
  check(out, "out", ScalarType::Float, 2);
  STD_TORCH_CHECK(out.size(0) == 4 && out.size(1) == logits.size(0), "out must be [4, rows]");
  STEP_CPU(softmax_statistics, floats(logits), targets, mutable_floats(out), logits.size(0), logits.size(1), start, moments);
}

static void softmax_gradient_cpu(const Tensor& logits, const Tensor& labels, int64_t start, const Tensor& lse, const Tensor& first,
                                 const Tensor& second, const Tensor& at_target) {
  const int64_t* targets = check_rows(logits, labels);
  STEP_CPU(softmax_gradient, mutable_floats(logits), targets, check_per_row(lse, "lse", logits),
           check_per_row(first, "first", logits), check_per_row(second, "second", logits),
           check_per_row(at_target, "at_target", logits), logits.size(0), logits.size(1), start);
}

static void scale_cpu(const Tensor& values, const Tensor& factor) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous(), "values must be contiguous float32");
  check(factor, "factor", ScalarType::Float, 0);
  STEP_CPU(scale, mutable_floats(values), floats(factor), values.numel());
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("softmax_statistics(Tensor logits, Tensor labels, int start, bool moments, Tensor(a!) out) -> ()");
  m.def(
      "softmax_gradient(Tensor(a!) logits, Tensor labels, int start, Tensor lse, Tensor first, Tensor second, Tensor at_target) -> "
      "()");
  m.def("scale(Tensor(a!) values, Tensor factor) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) {
  m.impl("softmax_statistics", TORCH_BOX(&step::softmax_statistics_cpu));
  m.impl("softmax_gradient", TORCH_BOX(&step::softmax_gradient_cpu));
  m.impl("scale", TORCH_BOX(&step::scale_cpu));
}
