// Products of few rows with a weight, y = x W^T + b, or y += x W^T, as decoding makes them: the weight is read once, as it lies, where
// a library copies it into its own order first. The rows of x, which are few, become the columns that a tile multiplies with, and
// the weight's rows pass by.
#include "gemm_tile.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

namespace {

constexpr int64_t kOutputs = 8 * kTileRows;  // rows of the weight at a time: with kDepth columns of it, half of a second-level cache
constexpr int64_t kDepth = 384;              // a panel of x so deep stays in the first-level cache

// Columns [first, last) of y for the panel of x's rows from `row` on; `panel` is [inner][kPanel], `block` [kOutputs][kPanel].
static void multiply_block(const float* panel, const float* weight, const float* bias, bool add, float* y, int64_t row,
                           int64_t rows, int64_t inner, int64_t outputs, int64_t first, int64_t last, float* block) {
  const int64_t here = smaller(kPanel, rows - row), vectors = divided_up(here, kLanes), count = last - first;
  for (int64_t begin = 0; begin < inner; begin += kDepth) {
    const int64_t steps = smaller(kDepth, inner - begin);
    for (int64_t done = 0; done < count; done += kTileRows) {
      const int64_t group = smaller(kTileRows, count - done);
      const Operand a{weight + (first + done) * inner + begin, inner};
      // What the first panel multiplies with comes from memory, row after row; later panels find it in cache.
      if (!row) fetch_rows(a.data + kTileRows * inner, inner, smaller(kTileRows, outputs - first - done - group), steps);
      if (begin)
        multiply_panel<false, true>(group, vectors, a, panel + begin * kPanel, kPanel, steps, block + done * kPanel, kPanel);
      else
        multiply_panel<false, false>(group, vectors, a, panel, kPanel, steps, block + done * kPanel, kPanel);
    }
  }
  for (int64_t r = 0; r < here; r++) {
    float* to = y + (row + r) * outputs + first;
    for (int64_t i = 0; i < count; i++) to[i] = block[i * kPanel + r] + (add ? to[i] : bias ? bias[first + i] : 0.0f);
  }
}

}  // namespace

void skinny_linear(const float* x, const float* weight, const float* bias, bool add, float* y, int64_t rows, int64_t inner,
                   int64_t outputs) {
  const int64_t panels = divided_up(rows, kPanel), blocks = divided_up(outputs, kOutputs);
  // Every thread has a copy of x in its own cache.
  parallel_for(blocks, 1 + 65536 / (rows * inner * kOutputs + 1), [&](int64_t begin, int64_t end) {
    float* packed = thread_scratch(panels * inner * kPanel + kOutputs * kPanel);
    float* block = packed + panels * inner * kPanel;
    pack_transposed([&](int64_t r) { return x + r * inner; }, 0, rows, inner, packed);
    for (int64_t b = begin; b < end; b++)
      for (int64_t p = 0; p < panels; p++)
        multiply_block(packed + p * inner * kPanel, weight, bias, add, y, p * kPanel, rows, inner, outputs, b * kOutputs,
                       smaller(outputs, (b + 1) * kOutputs), block);
  });
}

}  // namespace STEP_ISA
}  // namespace step
