#include "native.h"

#ifdef STEP_WITH_CUDA
extern "C" int step_gae_varlen(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,
                               int64_t segments, float gamma, float decay, float* advantages, float* returns, void* stream);
#endif

namespace step {

static void check_gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, const Tensor& bootstrap,
                      const Tensor& advantages, const Tensor& returns) {
  for (const Tensor* tensor : {&rewards, &values, &advantages, &returns}) {
    check(*tensor, "rewards, values, advantages or returns", ScalarType::Float, 1);
    STD_TORCH_CHECK(tensor->size(0) == values.size(0), "rewards, values, advantages and returns must agree in length");
  }
  check(cu_seqlens, "cu_seqlens", ScalarType::Int, 1);
  check(bootstrap, "bootstrap", ScalarType::Float, 1);
  STD_TORCH_CHECK(bootstrap.size(0) + 1 == cu_seqlens.size(0), "bootstrap and cu_seqlens must agree in segments");
}

static void gae_varlen_cpu(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, const Tensor& bootstrap,
                           double gamma, double lam, const Tensor& advantages, const Tensor& returns) {
  check_gae(rewards, values, cu_seqlens, bootstrap, advantages, returns);
  const int64_t segments = bootstrap.size(0);
  STD_TORCH_CHECK(ints(cu_seqlens)[segments] == values.size(0), "gae_varlen: cu_seqlens ends at ", ints(cu_seqlens)[segments],
                  ", there are ", values.size(0), " tokens");
  STEP_CPU(gae_varlen, floats(rewards), floats(values), ints(cu_seqlens), floats(bootstrap), segments, static_cast<float>(gamma),
           static_cast<float>(gamma * lam), mutable_floats(advantages), mutable_floats(returns));
}

#ifdef STEP_WITH_CUDA
static void gae_varlen_cuda(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, const Tensor& bootstrap,
                            double gamma, double lam, const Tensor& advantages, const Tensor& returns) {
  check_gae(rewards, values, cu_seqlens, bootstrap, advantages, returns);
  CudaScope scope(values);
  launched(step_gae_varlen(floats(rewards), floats(values), ints(cu_seqlens), floats(bootstrap), bootstrap.size(0),
                           static_cast<float>(gamma), static_cast<float>(gamma * lam), mutable_floats(advantages),
                           mutable_floats(returns), scope.stream()),
           "gae_varlen");
}
#endif

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def(
      "gae_varlen(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor bootstrap, float gamma, float lam, "
      "Tensor(a!) advantages, Tensor(b!) returns) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) { m.impl("gae_varlen", TORCH_BOX(&step::gae_varlen_cpu)); }
#ifdef STEP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(step_native, CUDA, m) { m.impl("gae_varlen", TORCH_BOX(&step::gae_varlen_cuda)); }
#endif
