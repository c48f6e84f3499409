#include "segments.h"

namespace step {

static int64_t outputs_of(int64_t frames) { return (frames + 1) / 2; }
static int64_t tiles_of(int64_t frames) { return (outputs_of(frames) + kTile - 1) / kTile; }

// Outputs `first` and following, or tiles, `count` of them, are among those of the segments, whose bounds have been checked.
static void check_part(const Tensor& cu_seqlens, bool tiles, int64_t first, int64_t count) {
  const int64_t all = total(cu_seqlens, tiles ? tiles_of : outputs_of);
  STD_TORCH_CHECK(first >= 0 && first + count <= all, "the segments have ", all, tiles ? " tiles" : " outputs", ", not ", count,
                  " from ", first, " on");
}

static ConvSource stored(const Tensor& x, const Tensor& cu_seqlens) {
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  check(x, "x", bfloat16 ? ScalarType::BFloat16 : ScalarType::Float, 2);
  check_bounds(cu_seqlens, "cu_seqlens", x);
  ConvSource source{};
  source.cu_seqlens = ints(cu_seqlens);
  source.width = x.size(1);
  source.x = x.const_data_ptr();
  source.bfloat16 = bfloat16;
  return source;
}

// Frames that are made from hidden rows, as bfloat16 where `rounded`; `keep` gets them, or is empty.
static ConvSource pooled(const Tensor& hidden, const Tensor& hidden_starts, const Tensor& weight, const Tensor& bias, double eps,
                         bool rounded, const Tensor& keep, const Tensor& cu_seqlens) {
  check(hidden, "hidden", ScalarType::Float, 2);
  check_bounds(hidden_starts, "hidden_starts", hidden);
  check(weight, "weight", ScalarType::Float, 1);
  check(bias, "bias", ScalarType::Float, 1);
  check_bounds(cu_seqlens, "cu_seqlens");
  const int64_t width = hidden.size(1);
  STD_TORCH_CHECK(weight.size(0) == width && bias.size(0) == width, "hidden, weight and bias must agree in width");
  STD_TORCH_CHECK(hidden_starts.size(0) == cu_seqlens.size(0), "hidden_starts and cu_seqlens must agree in segments");
  for (int64_t i = 0; i + 1 < cu_seqlens.size(0); i++)
    STD_TORCH_CHECK(ints(cu_seqlens)[i + 1] - ints(cu_seqlens)[i] == (ints(hidden_starts)[i + 1] - ints(hidden_starts)[i]) / 2,
                    "segment ", i, " must have a frame for every two hidden rows");
  ConvSource source{};
  source.cu_seqlens = ints(cu_seqlens);
  source.width = width;
  source.hidden = floats(hidden);
  source.hidden_starts = ints(hidden_starts);
  source.norm_weight = floats(weight);
  source.norm_bias = floats(bias);
  source.eps = static_cast<float>(eps);
  source.round = rounded;
  if (keep.numel()) {
    check(keep, "keep", rounded ? ScalarType::BFloat16 : ScalarType::Float, 2);
    STD_TORCH_CHECK(keep.size(1) == width, "keep must be as wide as hidden");
    check_bounds(cu_seqlens, "cu_seqlens", keep);
    source.keep = keep.mutable_data_ptr();
  }
  return source;
}

// Columns `[rows, 3 * width]` of outputs `first` and following, or planes `[7, tiles, width]` of tiles `first` and following.
static void gather(const ConvSource& source, const Tensor& cu_seqlens, int64_t first, const Tensor& out) {
  const bool tiles = out.dim() == 3;
  check(out, "out", ScalarType::Float, tiles ? 3 : 2);
  STD_TORCH_CHECK(tiles ? out.size(0) == 7 && out.size(2) == source.width : out.size(1) == 3 * source.width,
                  "out must be [rows, 3 * width] or [7, tiles, width]");
  check_part(cu_seqlens, tiles, first, out.size(tiles ? 1 : 0));
  if (tiles)
    STEP_CPU(conv_gather_tiles, source, first, out.size(1), mutable_floats(out));
  else
    STEP_CPU(conv_gather, source, first, out.size(0), mutable_floats(out));
}

static void conv_gather_cpu(const Tensor& x, const Tensor& cu_seqlens, int64_t first, const Tensor& out) {
  gather(stored(x, cu_seqlens), cu_seqlens, first, out);
}

static void pool_norm_gather_cpu(const Tensor& hidden, const Tensor& hidden_starts, const Tensor& weight, const Tensor& bias,
                                 double eps, bool rounded, const Tensor& keep, const Tensor& cu_seqlens, int64_t first,
                                 const Tensor& out) {
  gather(pooled(hidden, hidden_starts, weight, bias, eps, rounded, keep, cu_seqlens), cu_seqlens, first, out);
}

static void conv_scatter_cpu(const Tensor& columns, const Tensor& cu_seqlens, int64_t first, const Tensor& x) {
  check(x, "x", ScalarType::Float, 2);
  check_bounds(cu_seqlens, "cu_seqlens", x);
  check(columns, "columns", ScalarType::Float, 2);
  STD_TORCH_CHECK(columns.size(1) == 3 * x.size(1), "columns must have three values for each channel of x");
  check_part(cu_seqlens, false, first, columns.size(0));
  STEP_CPU(conv_scatter, floats(columns), ints(cu_seqlens), mutable_floats(x), first, columns.size(0), x.size(1));
}

static void check_weight(const Tensor& weight, const Tensor& planes) {
  check(weight, "weight", ScalarType::Float, 3);
  check(planes, "planes", ScalarType::Float, 3);
  STD_TORCH_CHECK(weight.size(2) == 3 && planes.size(0) == 5 && planes.size(1) == weight.size(0) && planes.size(2) == weight.size(1),
                  "weight must be [out, in, 3] and planes [5, out, in]");
}

static void conv_split_weight_cpu(const Tensor& weight, const Tensor& planes) {
  check_weight(weight, planes);
  STEP_CPU(conv_split_weight, floats(weight), mutable_floats(planes), weight.size(0), weight.size(1));
}

static void conv_join_weight_cpu(const Tensor& planes, const Tensor& weight) {
  check_weight(weight, planes);
  STEP_CPU(conv_join_weight, floats(planes), mutable_floats(weight), weight.size(0), weight.size(1));
}

static void check_same(const Tensor& one, const Tensor& other, const char* name) {
  check(other, name, ScalarType::Float, 2);
  STD_TORCH_CHECK(one.size(0) == other.size(0) && one.size(1) == other.size(1), name, " has the wrong shape");
}

static void bias_gelu_cpu(const Tensor& hidden, const Tensor& bias, const Tensor& out) {
  check(hidden, "hidden", ScalarType::Float, 2);
  check(bias, "bias", ScalarType::Float, 1);
  check_same(hidden, out, "out");
  STD_TORCH_CHECK(bias.size(0) == hidden.size(1), "hidden and bias must agree");
  STEP_CPU(bias_gelu, mutable_floats(hidden), floats(bias), mutable_floats(out), hidden.size(0), hidden.size(1));
}

// Tiles' planes, and the rows of all outputs.
static void check_tiles(const Tensor& planes, const Tensor& rows, const Tensor& cu_seqlens, int64_t first) {
  check(planes, "planes", ScalarType::Float, 3);
  check(rows, "rows", ScalarType::Float, 2);
  STD_TORCH_CHECK(planes.size(0) == 5 && planes.size(2) == rows.size(1), "planes must be [5, tiles, width]");
  check_bounds(cu_seqlens, "cu_seqlens");
  check_part(cu_seqlens, true, first, planes.size(1));
  const int64_t outputs = total(cu_seqlens, outputs_of);
  STD_TORCH_CHECK(outputs == rows.size(0), "the segments have ", outputs, " outputs, but there are ", rows.size(0), " rows");
}

static void conv_join_tiles_cpu(const Tensor& products, const Tensor& cu_seqlens, const Tensor& bias, int64_t first,
                                const Tensor& before, const Tensor& out) {
  check_tiles(products, before, cu_seqlens, first);
  check(bias, "bias", ScalarType::Float, 1);
  check_same(before, out, "out");
  STD_TORCH_CHECK(bias.size(0) == out.size(1), "out and bias must agree");
  STEP_CPU(conv_join_tiles, floats(products), ints(cu_seqlens), floats(bias), mutable_floats(before), mutable_floats(out), first,
           products.size(1), products.size(2));
}

static void gelu_gradient_cpu(const Tensor& gradient, const Tensor& hidden, const Tensor& out, const Tensor& total) {
  check(gradient, "gradient", ScalarType::Float, 2);
  check_same(gradient, hidden, "hidden");
  check_same(gradient, out, "out");
  check(total, "total", ScalarType::Float, 1);
  STD_TORCH_CHECK(total.size(0) == out.size(1), "out and total must agree");
  STEP_CPU(gelu_gradient, floats(gradient), floats(hidden), mutable_floats(out), mutable_floats(total), out.size(0), out.size(1));
}

static void conv_gradient_tiles_cpu(const Tensor& hidden, const Tensor& cu_seqlens, int64_t first, const Tensor& planes) {
  check_tiles(planes, hidden, cu_seqlens, first);
  STEP_CPU(conv_gradient_tiles, floats(hidden), ints(cu_seqlens), mutable_floats(planes), first, planes.size(1), planes.size(2));
}

}  // namespace step

STABLE_TORCH_LIBRARY_FRAGMENT(step_native, m) {
  m.def("conv_gather(Tensor x, Tensor cu_seqlens, int first, Tensor(a!) out) -> ()");
  m.def(
      "pool_norm_gather(Tensor hidden, Tensor hidden_starts, Tensor weight, Tensor bias, float eps, bool rounded, Tensor(a!) keep, "
      "Tensor cu_seqlens, int first, Tensor(b!) out) -> ()");
  m.def("conv_scatter(Tensor columns, Tensor cu_seqlens, int first, Tensor(a!) x) -> ()");
  m.def("conv_split_weight(Tensor weight, Tensor(a!) planes) -> ()");
  m.def("conv_join_weight(Tensor planes, Tensor(a!) weight) -> ()");
  m.def("bias_gelu(Tensor(a!) hidden, Tensor bias, Tensor(b!) out) -> ()");
  m.def(
      "conv_join_tiles(Tensor products, Tensor cu_seqlens, Tensor bias, int first, Tensor(a!) before, Tensor(b!) out) -> ()");
  m.def("gelu_gradient(Tensor gradient, Tensor hidden, Tensor(a!) out, Tensor(b!) total) -> ()");
  m.def("conv_gradient_tiles(Tensor hidden, Tensor cu_seqlens, int first, Tensor(a!) planes) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(step_native, CPU, m) {
  m.impl("conv_gather", TORCH_BOX(&step::conv_gather_cpu));
  m.impl("pool_norm_gather", TORCH_BOX(&step::pool_norm_gather_cpu));
  m.impl("conv_scatter", TORCH_BOX(&step::conv_scatter_cpu));
  m.impl("conv_split_weight", TORCH_BOX(&step::conv_split_weight_cpu));
  m.impl("conv_join_weight", TORCH_BOX(&step::conv_join_weight_cpu));
  m.impl("bias_gelu", TORCH_BOX(&step::bias_gelu_cpu));
  m.impl("conv_join_tiles", TORCH_BOX(&step::conv_join_tiles_cpu));
  m.impl("gelu_gradient", TORCH_BOX(&step::gelu_gradient_cpu));
  m.impl("conv_gradient_tiles", TORCH_BOX(&step::conv_gradient_tiles_cpu));
}
