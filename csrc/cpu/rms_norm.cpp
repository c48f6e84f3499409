// Root-mean-square norm of rows, forward and backward, each row read once from memory.
#include <cmath>
#include <cstring>

#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

namespace {

constexpr int64_t kGrain = 16384;  // floats of a thread's share at least

// Sum of `term(at)` over a row, in whole vectors and a zero-filled last one: `at(row)` loads a row's values at the current place, and
// `term` gives zero for zeros.
template <class Term>
static inline float row_sum(int64_t width, Term&& term) {
  const int64_t whole = width / kLanes * kLanes;
  vec total{};
  for (int64_t i = 0; i < whole; i += kLanes) total += term([&](const float* row) { return load(row + i); });
  if (whole < width) total += term([&](const float* row) { return load_tail(row + whole, width - whole); });
  return sum(total);
}

}  // namespace

void rms_norm(const float* x, const float* weight, float* out, float* scale, int64_t rows, int64_t width, float eps) {
  const int64_t whole = width / kLanes * kLanes;
  parallel_for(rows, 1 + kGrain / (width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const float* in = x + row * width;
      float* to = out + row * width;
      const float square = row_sum(width, [&](auto&& at) { return at(in) * at(in); });
      const float factor = scale[row] = 1.0f / std::sqrt(square / width + eps);
      for (int64_t i = 0; i < whole; i += kLanes) store(to + i, load(in + i) * splat(factor) * load(weight + i));
      for (int64_t i = whole; i < width; i++) to[i] = in[i] * factor * weight[i];
    }
  });
}

// `grad_weight` is null where it is not wanted.
void rms_norm_backward(const float* gradient, const float* x, const float* weight, const float* scale, float* grad_x,
                       float* grad_weight, int64_t rows, int64_t width) {
  const int64_t whole = width / kLanes * kLanes;
  const int64_t blocks = (rows + kNormBlock - 1) / kNormBlock;
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
      float* total = grad_weight ? grad_weight + block * width : nullptr;
      if (total) std::memset(total, 0, sizeof(float) * width);
      for (int64_t row = block * kNormBlock; row < rows && row < (block + 1) * kNormBlock; row++) {
        const float *in = x + row * width, *from = gradient + row * width;
        float* to = grad_x + row * width;
        const float product = row_sum(width, [&](auto&& at) { return at(from) * at(weight) * at(in); });
        const float factor = scale[row], mean = product * factor * factor / width;
        for (int64_t i = 0; i < whole; i += kLanes) {
          const vec g = load(from + i), value = load(in + i);
          store(to + i, (g * load(weight + i) - value * splat(mean)) * splat(factor));
          if (total) store(total + i, load(total + i) + g * value * splat(factor));
        }
        for (int64_t i = whole; i < width; i++) {
          to[i] = (from[i] * weight[i] - in[i] * mean) * factor;
          if (total) total[i] += from[i] * in[i] * factor;
        }
      }
    }
  });
}

}  // namespace STEP_ISA
}  // namespace step
