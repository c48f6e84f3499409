#include "native.h"

namespace step {

// `columns` holds the inputs of outputs [first, first + rows), three values (one a tap) for each input channel.
static void check_columns(const Tensor& x, const Tensor& cu_seqlens, const Tensor& columns, int64_t first) {
  check(cu_seqlens, "cu_seqlens", ScalarType::Int, 1);
  check(columns, "columns", ScalarType::Float, 2);
  STD_TORCH_CHECK(columns.size(1) == 3 * x.size(1), "columns must have three values for each channel of x");
  STD_TORCH_CHECK(first >= 0, "first must not be negative");
}

static void conv_gather_cpu(const Tensor& x, const Tensor& cu_seqlens, int64_t first, const Tensor& columns) {
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  check(x, "x", bfloat16 ? ScalarType::BFloat16 : ScalarType::Float, 2);
  check_columns(x, cu_seqlens, columns, first);
  STEP_CPU(conv_gather, x.const_data_ptr(), bfloat16, ints(cu_seqlens), mutable_floats(columns), first, columns.size(0), x.size(1));
}

static void conv_scatter_cpu(const Tensor& columns, const Tensor& cu_seqlens, int64_t first, const Tensor& x) {
  check(x, "x", ScalarType::Float, 2);
  check_columns(x, cu_seqlens, columns, first);
  STEP_CPU(conv_scatter, floats(columns), ints(cu_seqlens), mutable_floats(x), first, columns.size(0), x.size(1));
}

static void bias_gelu_cpu(const Tensor& hidden, const Tensor& bias, const Tensor& out) {
  check(hidden, "hidden", ScalarType::Float, 2);
  check(bias, "bias", ScalarType::Float, 1);
  check(out, "out", ScalarType::Float, 2);
  STD_TORCH_CHECK(out.size(0) == hidden.size(0) && out.size(1) == hidden.size(1) && bias.size(0) == hidden.size(1),
                  "hidden, bias and out must agree");
  STEP_CPU(bias_gelu, mutable_floats(hidden), floats(bias), mutable_floats(out), hidden.size(0), hidden.size(1));
}

static void gelu_gradient_cpu(const Tensor& gradient, const Tensor& hidden, const Tensor& out) {
  check(gradient, "gradient", ScalarType::Float, 2);
  check(hidden, "hidden", ScalarType::Float, 2);
  check(out, "out", ScalarType::Float, 2);
  STD_TORCH_CHECK(gradient.numel() == hidden.numel() && out.numel() == hidden.numel(), "gradient, hidden and out must agree");
  STEP_CPU(gelu_gradient, floats(gradient), floats(hidden), mutable_floats(out), hidden.numel());
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("conv_gather(Tensor x, Tensor cu_seqlens, int first, Tensor(a!) columns) -> ()");
  m.def("conv_scatter(Tensor columns, Tensor cu_seqlens, int first, Tensor(a!) x) -> ()");
  m.def("bias_gelu(Tensor(a!) hidden, Tensor bias, Tensor(b!) out) -> ()");
  m.def("gelu_gradient(Tensor gradient, Tensor hidden, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) {
  m.impl("conv_gather", TORCH_BOX(&step::conv_gather_cpu));
  m.impl("conv_scatter", TORCH_BOX(&step::conv_scatter_cpu));
  m.impl("bias_gelu", TORCH_BOX(&step::bias_gelu_cpu));
  m.impl("gelu_gradient", TORCH_BOX(&step::gelu_gradient_cpu));
}
