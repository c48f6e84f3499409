// What the strided convolution needs around its matrix products: rows of inputs side by side for one block of outputs at a time (in
// the weight's own order, so that the weight is never copied), bias with GELU, and the two passes of its backward.
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

namespace {

static inline float widen(float value) { return value; }
static inline float widen(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

typedef uint16_t halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

static inline vec load_wide(const float* from) { return load(from); }
static inline vec load_wide(const uint16_t* bfloat16) {
  const ivec bits = __builtin_convertvector(*reinterpret_cast<const halves*>(bfloat16), ivec) << 16;
  vec value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Writes three rows as one, element by element: a0 b0 c0 a1 b1 c1 ... A compiler makes single stores of the plain loop.
struct Interleave {
  ivec first[3], second[3];

  Interleave() {
    for (int part = 0; part < 3; part++)
      for (int lane = 0; lane < kLanes; lane++) {
        const int channel = (part * kLanes + lane) / 3, tap = (part * kLanes + lane) % 3;
        first[part][lane] = channel + (tap == 1 ? kLanes : 0);
        second[part][lane] = tap == 2 ? kLanes + channel : lane;
      }
  }

  template <class Value>
  void operator()(const Value* a, const Value* b, const Value* c, float* out, int64_t width) const {
    int64_t i = 0;
#if !defined(__clang__)  // which shuffles by constants only
    for (; i + kLanes <= width; i += kLanes) {
      const vec x = load_wide(a + i), y = load_wide(b + i), z = load_wide(c + i);
      for (int part = 0; part < 3; part++)
        store(out + 3 * i + part * kLanes, __builtin_shuffle(__builtin_shuffle(x, y, first[part]), z, second[part]));
    }
#endif
    for (; i < width; i++) {
      out[3 * i] = widen(a[i]);
      out[3 * i + 1] = widen(b[i]);
      out[3 * i + 2] = widen(c[i]);
    }
  }
};

// Where an output row stands: its segment, and the first output of that segment.
struct Place {
  int64_t segment = 0, first_output = 0;

  void move_to(int64_t output, const int32_t* cu_seqlens) {
    while (output >= first_output + (cu_seqlens[segment + 1] - cu_seqlens[segment] + 1) / 2) {
      first_output += (cu_seqlens[segment + 1] - cu_seqlens[segment] + 1) / 2;
      segment++;
    }
  }
};

// The rows that an output reads; null outside its segment.
template <class Value>
struct Taps {
  Value* row[3];

  Taps(Value* x, const int32_t* cu_seqlens, const Place& place, int64_t output, int64_t width) {
    const int64_t start = cu_seqlens[place.segment], end = cu_seqlens[place.segment + 1];
    for (int tap = 0; tap < 3; tap++) {
      const int64_t frame = start + 2 * (output - place.first_output) + tap - 1;
      row[tap] = frame >= start && frame < end ? x + frame * width : nullptr;
    }
  }
};

// Standard normal distribution function and density. Abramowitz and Stegun 7.1.26 (1.5e-7), on the side where nothing cancels.
static inline vec normal(vec x, vec& density) {
  const vec magnitude = maximum(x, -x);
  const vec power = exponential(splat(-0.5f) * x * x);
  const vec t = splat(1.0f) / (splat(1.0f) + splat(0.3275911f * 0.70710678f) * magnitude);
  vec p = splat(1.061405429f);
  p = p * t - splat(1.453152027f);
  p = p * t + splat(1.421413741f);
  p = p * t - splat(0.284496736f);
  p = p * t + splat(0.254829592f);
  const vec beyond = splat(0.5f) * p * t * power;
  density = power * splat(0.39894228f);
  return x < vec{} ? beyond : splat(1.0f) - beyond;
}

static inline vec gelu(vec x) {
  vec density;
  return x * normal(x, density);
}

static inline vec gelu_slope(vec x) {
  vec density;
  const vec below = normal(x, density);
  return below + x * density;
}

template <class Value>
static void gather(const Value* x, const int32_t* cu_seqlens, float* columns, int64_t first, int64_t rows, int64_t width) {
  const Interleave interleave;
  parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
    Place place;
    for (int64_t row = begin; row < end; row++) {
      place.move_to(first + row, cu_seqlens);
      const Taps<const Value> taps(x, cu_seqlens, place, first + row, width);
      float* out = columns + row * width * 3;
      if (taps.row[0] && taps.row[2])
        interleave(taps.row[0], taps.row[1], taps.row[2], out, width);
      else
        for (int tap = 0; tap < 3; tap++)
          for (int64_t i = 0; i < width; i++) out[3 * i + tap] = taps.row[tap] ? widen(taps.row[tap][i]) : 0.0f;
    }
  });
}

}  // namespace

void conv_gather(const void* x, bool bfloat16, const int32_t* cu_seqlens, float* columns, int64_t first, int64_t rows,
                 int64_t width) {
  if (bfloat16)
    gather(static_cast<const uint16_t*>(x), cu_seqlens, columns, first, rows, width);
  else
    gather(static_cast<const float*>(x), cu_seqlens, columns, first, rows, width);
}

void conv_scatter(const float* columns, const int32_t* cu_seqlens, float* x, int64_t first, int64_t rows, int64_t width) {
  // Neighbouring outputs share a row of x: threads share out the columns instead, so that every sum has one order.
  parallel_for(width, 64, [&](int64_t begin, int64_t end) {
    Place place;
    for (int64_t row = 0; row < rows; row++) {
      place.move_to(first + row, cu_seqlens);
      const Taps<float> taps(x, cu_seqlens, place, first + row, width);
      const float* from = columns + row * width * 3;
      for (int tap = 0; tap < 3; tap++)
        if (taps.row[tap])
          for (int64_t i = begin; i < end; i++) taps.row[tap][i] += from[3 * i + tap];
    }
  });
}

// `hidden` gets the bias added in place; `out` may be the same memory.
void bias_gelu(float* hidden, const float* bias, float* out, int64_t rows, int64_t width) {
  parallel_for(rows, 1 + 4096 / (width + 1), [&](int64_t begin, int64_t end) {
    const int64_t whole = width / kLanes * kLanes, rest = width - whole;
    for (int64_t row = begin; row < end; row++) {
      float *from = hidden + row * width, *to = out + row * width;
      for (int64_t i = 0; i < whole; i += kLanes) {
        const vec sum = load(from + i) + load(bias + i);
        store(from + i, sum);
        store(to + i, gelu(sum));
      }
      if (rest) {
        const vec sum = load_tail(from + whole, rest) + load_tail(bias + whole, rest);
        store_tail(from + whole, sum, rest);
        store_tail(to + whole, gelu(sum), rest);
      }
    }
  });
}

void gelu_gradient(const float* gradient, const float* hidden, float* out, int64_t count) {
  parallel_for(count, 4096, [&](int64_t begin, int64_t end) {
    const int64_t whole = begin + (end - begin) / kLanes * kLanes, rest = end - whole;
    for (int64_t i = begin; i < whole; i += kLanes) store(out + i, load(gradient + i) * gelu_slope(load(hidden + i)));
    if (rest) store_tail(out + whole, load_tail(gradient + whole, rest) * gelu_slope(load_tail(hidden + whole, rest)), rest);
  });
}

}  // namespace STEP_ISA
}  // namespace step
