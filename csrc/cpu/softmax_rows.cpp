// Softmax of rows of logits, for linear_cross_entropy: one pass that reads (maximum, sum, target, sum for the entropy), one that
// replaces the logits by a gradient in place. Between them the caller joins the statistics of all shares of a vocabulary.
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

namespace {

constexpr int64_t kBlock = 1024;        // a block stays in the first-level cache between its maximum and its exponentials
constexpr float kLowest = -3.0e38f;

struct Statistics {
  float largest = kLowest;  // m
  vec total{};              // sum of e^(x - m)
  vec moment{};             // sum of e^(x - m) (x - m)
  vec poison{};             // zero, or NaN where a logit is infinite or NaN: `exponential` and `maximum` would hide it
};

// The last `count` < kLanes values, filled up with what counts for nothing.
static inline vec load_logits(const float* from, int64_t count) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; i++) lanes[i] = i < count ? from[i] : kLowest;
  return load(lanes);
}

static inline void raise(Statistics& so_far, float largest) {
  if (largest <= so_far.largest) return;
  const float change = so_far.largest - largest;
  const vec factor = exponential(splat(change));
  so_far.moment = factor[0] > 0 ? (so_far.moment + splat(change) * so_far.total) * factor : vec{};
  so_far.total *= factor;
  so_far.largest = largest;
}

template <bool kMoment>
static inline void add(Statistics& so_far, vec logits) {
  const vec below = logits - splat(so_far.largest);
  const vec power = exponential(below);
  so_far.total += power;
  so_far.poison += logits * splat(0.0f);
  if (kMoment) so_far.moment += power * below;
}

template <bool kMoment>
static void add_block(Statistics& so_far, const float* row, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  vec largest = splat(kLowest);
  for (int64_t i = 0; i < whole; i += kLanes) largest = maximum(load(row + i), largest);
  const vec rest = load_logits(row + whole, count - whole);
  raise(so_far, maximum(maximum(largest, rest)));
  for (int64_t i = 0; i < whole; i += kLanes) add<kMoment>(so_far, load(row + i));
  if (whole < count) add<kMoment>(so_far, rest);
}

template <bool kMoment>
static Statistics row_statistics(const float* row, int64_t width) {
  Statistics found;
  for (int64_t begin = 0; begin < width; begin += kBlock)
    add_block<kMoment>(found, row + begin, width - begin < kBlock ? width - begin : kBlock);
  return found;
}

static inline vec gradient(vec logits, float lse, float first, float second) {
  const vec log_probability = logits - splat(lse);
  return exponential(log_probability) * (splat(first) + splat(second) * log_probability);
}

}  // namespace

void softmax_statistics(const float* logits, const int64_t* labels, float* out, int64_t rows, int64_t width, int64_t start,
                        bool moments) {
  parallel_for(rows, 1 + 16384 / (width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const float* values = logits + row * width;
      const Statistics found = moments ? row_statistics<true>(values, width) : row_statistics<false>(values, width);
      const int64_t target = labels[row] - start;
      out[row] = found.largest;
      out[rows + row] = sum(found.total) + sum(found.poison);
      out[2 * rows + row] = target >= 0 && target < width ? values[target] : 0.0f;
      out[3 * rows + row] = sum(found.moment);
    }
  });
}

void softmax_gradient(float* logits, const int64_t* labels, const float* lse, const float* first, const float* second,
                      const float* at_target, int64_t rows, int64_t width, int64_t start) {
  parallel_for(rows, 1 + 16384 / (width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      float* values = logits + row * width;
      // NaN where the log-sum-exp is not finite, which `exponential` would hide.
      const float a = first[row] + (lse[row] - lse[row]), b = second[row];
      const int64_t whole = width / kLanes * kLanes, rest = width - whole;
      for (int64_t i = 0; i < whole; i += kLanes) store(values + i, gradient(load(values + i), lse[row], a, b));
      if (rest) store_tail(values + whole, gradient(load_logits(values + whole, rest), lse[row], a, b), rest);
      const int64_t target = labels[row] - start;
      if (target >= 0 && target < width) values[target] += at_target[row];
    }
  });
}

void scale(float* values, const float* factor, int64_t count) {
  if (*factor == 1.0f) return;
  parallel_for(count, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) values[i] *= *factor;
  });
}

}  // namespace STEP_ISA
}  // namespace step
