// Logits to tokens: a row's likeliest id, or the one at which its cumulative weight passes a random number, and its log-probability.
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

namespace {

constexpr int64_t kBlock = 256;  // weights that are summed up together, before one is looked for among them
constexpr float kLowest = -3.0e38f;

// SplitMix64's number `draw` of the generator `seed`, as a multiple of 2^-24 in [0, 1): `uniform` of the Python file.
static inline float uniform(int64_t seed, int64_t draw) {
  uint64_t mixed = static_cast<uint64_t>(seed) + (static_cast<uint64_t>(draw) + 1) * 0x9E3779B97F4A7C15u;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
  mixed ^= mixed >> 31;
  return static_cast<float>(mixed >> 40) * 0x1p-24f;
}

struct Largest {
  float value = kLowest;
  int64_t block = 0;  // in which it comes first
  vec poison{};       // zero, or NaN where a logit is infinite or NaN: `exponential` and `maximum` would hide it
};

// Logits over the temperature into `values`, filled up to a whole vector with what counts for nothing; the largest of them.
static Largest divide(const float* row, int64_t width, float temperature, float* values) {
  Largest found;
  const vec divisor = splat(temperature);
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t end = width - begin < kBlock ? width : begin + kBlock;
    vec most = splat(kLowest);
    for (int64_t i = begin; i < end; i += kLanes) {
      vec value;
      if (end - i >= kLanes) {
        value = load(row + i) / divisor;
      } else {
        for (int lane = 0; lane < kLanes; lane++) value[lane] = lane < end - i ? row[i + lane] / temperature : kLowest;
      }
      store(values + i, value);
      found.poison += value * splat(0.0f);
      most = maximum(value, most);
    }
    const float here = maximum(most);
    if (here > found.value) found.value = here, found.block = begin;
  }
  return found;
}

static int64_t first_of(const float* values, int64_t width, const Largest& largest) {
  for (int64_t i = largest.block; i < width; i++)
    if (values[i] == largest.value) return i;
  return 0;
}

// Values become weights e^(x - largest), `sums` their sums by block; returns the whole sum, block after block.
static float weigh(float* values, int64_t width, float largest, float* sums) {
  float whole = 0;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t end = width - begin < kBlock ? width : begin + kBlock;
    vec total{};
    for (int64_t i = begin; i < end; i += kLanes) {
      const vec weight = exponential(load(values + i) - splat(largest));
      total += weight;
      store(values + i, weight);
    }
    whole += sums[begin / kBlock] = sum(total);
  }
  return whole;
}

// The first id whose cumulative weight is above `target`; one that has a weight, if rounding leaves none.
static int64_t passed(const float* weights, const float* sums, int64_t width, float target) {
  float before = 0;
  int64_t begin = 0, likely = 0;
  while (begin + kBlock < width && before + sums[begin / kBlock] <= target) before += sums[begin / kBlock], begin += kBlock;
  for (int64_t i = begin; i < width; i++) {
    if (weights[i] > 0) likely = i;
    before += weights[i];
    if (before > target && weights[i] > 0) return i;
  }
  return likely;
}

}  // namespace

void draw_tokens(const float* logits, const float* temperature, const int64_t* seeds, const int64_t* draws, const int64_t* forced,
                 int64_t* tokens, float* logprobs, int64_t rows, int64_t width) {
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  parallel_for(rows, 1 + 16384 / (width + 1), [&](int64_t begin, int64_t end) {
    float* values = thread_scratch(blocks * (kBlock + 1));
    float* sums = values + blocks * kBlock;
    for (int64_t r = begin; r < end; r++) {
      const bool greedy = temperature[r] <= 0;
      const float divisor = greedy ? 1.0f : temperature[r];
      const Largest largest = divide(logits + r * width, width, divisor, values);
      int64_t token = forced[r];
      if (token < 0 && greedy) token = first_of(values, width, largest);
      const float whole = weigh(values, width, largest.value, sums);
      if (token < 0) token = passed(values, sums, width, uniform(seeds[r], draws[r]) * whole);
      tokens[r] = token;
      logprobs[r] = logits[r * width + token] / divisor - (largest.value + __builtin_logf(whole)) + sum(largest.poison);
    }
  });
}

}  // namespace STEP_ISA
}  // namespace step
