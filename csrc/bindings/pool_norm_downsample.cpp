#include "segments.h"

#ifdef STEP_WITH_CUDA
extern "C" int step_pool_norm_downsample(int dtype, const void* hidden, const int32_t* source_row, const void* weight,
                                         const void* bias, void* out, int64_t rows, int64_t width, float eps, void* stream);
#endif

namespace step {

static void check_shapes(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const Tensor& bias, const Tensor& out,
                         ScalarType type) {
  check(hidden, "hidden", type, 2);
  check(rows, "cu_seqlens or source_row", ScalarType::Int, 1);
  check(weight, "weight", type, 1);
  check(bias, "bias", type, 1);
  check(out, "out", type, 2);
  const int64_t width = hidden.size(1);
  STD_TORCH_CHECK(weight.size(0) == width && bias.size(0) == width && out.size(1) == width,
                  "hidden, weight, bias and out must agree in width");
}

static void pool_norm_downsample_cpu(const Tensor& hidden, const Tensor& cu_seqlens, const Tensor& weight, const Tensor& bias,
                                     double eps, const Tensor& out) {
  check_shapes(hidden, cu_seqlens, weight, bias, out, ScalarType::Float);
  check_bounds(cu_seqlens, "cu_seqlens", hidden);
  const int64_t pooled = total(cu_seqlens, [](int64_t frames) { return frames / 2; });
  STD_TORCH_CHECK(pooled == out.size(0), "the segments have ", pooled, " outputs, but there are ", out.size(0), " rows");
  STEP_CPU(pool_norm_downsample, floats(hidden), ints(cu_seqlens), cu_seqlens.size(0) - 1, floats(weight), floats(bias),
           mutable_floats(out), out.size(0), hidden.size(1), static_cast<float>(eps));
}

#ifdef STEP_WITH_CUDA
static void pool_norm_downsample_cuda(const Tensor& hidden, const Tensor& source_row, const Tensor& weight, const Tensor& bias,
                                      double eps, const Tensor& out) {
  check_shapes(hidden, source_row, weight, bias, out, hidden.scalar_type());
  STD_TORCH_CHECK(source_row.size(0) == out.size(0), "source_row and out must agree in rows");
  CudaScope scope(hidden);
  launched(step_pool_norm_downsample(cuda_dtype(hidden), hidden.const_data_ptr(), ints(source_row), weight.const_data_ptr(),
                                     bias.const_data_ptr(), out.mutable_data_ptr(), out.size(0), hidden.size(1),
                                     static_cast<float>(eps), scope.stream()),
           "pool_norm_downsample");
}
#endif

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("pool_norm_downsample(Tensor hidden, Tensor cu_seqlens, Tensor weight, Tensor bias, float eps, Tensor(a!) out) -> ()");
  m.def(
      "pool_norm_downsample_rows(Tensor hidden, Tensor source_row, Tensor weight, Tensor bias, float eps, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) { m.impl("pool_norm_downsample", TORCH_BOX(&step::pool_norm_downsample_cpu)); }
#ifdef STEP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(step_native, CUDA, m) {
  m.impl("pool_norm_downsample_rows", TORCH_BOX(&step::pool_norm_downsample_cuda));
}
#endif
