#include "native.h"

namespace step {

static void check_shapes(const Tensor& hidden, const Tensor& cu_seqlens, const Tensor& weight, const Tensor& bias, const Tensor& out,
                         ScalarType type) {
  check(hidden, "hidden", type, 2);
  check(cu_seqlens, "cu_seqlens", ScalarType::Int, 1);
  check(weight, "weight", type, 1);
  check(bias, "bias", type, 1);
  check(out, "out", type, 2);
  const int64_t width = hidden.size(1);
  STD_TORCH_CHECK(weight.size(0) == width && bias.size(0) == width && out.size(1) == width, "hidden, weight, bias and out must agree in width");
}

static void pool_norm_downsample_cpu(const Tensor& hidden, const Tensor& cu_seqlens, const Tensor& weight, const Tensor& bias, double eps,
                                     const Tensor& out) {
  check_shapes(hidden, cu_seqlens, weight, bias, out, ScalarType::Float);
  STEP_CPU(pool_norm_downsample, floats(hidden), ints(cu_seqlens), cu_seqlens.size(0) - 1, floats(weight), floats(bias),
           mutable_floats(out), out.size(0), hidden.size(1), static_cast<float>(eps));
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("pool_norm_downsample(Tensor hidden, Tensor cu_seqlens, Tensor weight, Tensor bias, float eps, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) { m.impl("pool_norm_downsample", TORCH_BOX(&step::pool_norm_downsample_cpu)); }
