// What the strided convolution needs after its matrix products: bias with GELU, the two passes of its backward, and the weight's
// planes for products by tiles (see conv_products.py).
#include "conv_place.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

namespace {

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

// What stands in a row as a0 b0 c0 a1 b1 c1 ... becomes three vectors.
struct Deinterleave {
  ivec low[3], high[3];

  Deinterleave() {
    for (int tap = 0; tap < 3; tap++)
      for (int lane = 0; lane < kLanes; lane++) {
        // Of the first two vectors, then of their choice and the third one.
        const int place = 3 * lane + tap;
        low[tap][lane] = place < 2 * kLanes ? place : 0;
        high[tap][lane] = place < 2 * kLanes ? lane : place - kLanes;
      }
  }
  void operator()(const float* from, vec* taps) const {
    const vec x = load(from), y = load(from + kLanes), z = load(from + 2 * kLanes);
    for (int tap = 0; tap < 3; tap++) taps[tap] = shuffled(shuffled(x, y, low[tap]), z, high[tap]);
  }
};

}  // namespace

void conv_scatter(const float* columns, const int32_t* cu_seqlens, float* x, int64_t first, int64_t rows, int64_t width) {
  // Neighbouring outputs share a row of x: threads share out the columns instead, so that every sum has one order.
  parallel_for(width, 64, [&](int64_t begin, int64_t end) {
    Place place;
    for (int64_t row = 0; row < rows; row++) {
      place.move_to_output(first + row, cu_seqlens);
      const int64_t start = cu_seqlens[place.segment], last = cu_seqlens[place.segment + 1];
      for (int tap = 0; tap < 3; tap++) {
        const int64_t frame = start + 2 * (first + row - place.first_output) + tap - 1;
        if (frame < start || frame >= last) continue;
        for (int64_t i = begin; i < end; i++) x[frame * width + i] += columns[(row * width + i) * 3 + tap];
      }
    }
  });
}

// Planes of a weight `[out, in, 3]`, each `[out, in]`: the middle tap, the first, the last, half the sum and half the difference of
// first and last.
void conv_split_weight(const float* weight, float* planes, int64_t out_width, int64_t width) {
  const int64_t plane = out_width * width;
  const vec half = splat(0.5f);
  const Deinterleave deinterleave;
  parallel_for(out_width, 1 + 8192 / (width + 1), [&](int64_t begin, int64_t end) {
    int64_t i = begin * width;
    for (; i + kLanes <= end * width; i += kLanes) {
      vec taps[3];
      deinterleave(weight + 3 * i, taps);
      store(planes + i, taps[1]);
      store(planes + plane + i, taps[0]);
      store(planes + 2 * plane + i, taps[2]);
      store(planes + 3 * plane + i, half * (taps[0] + taps[2]));
      store(planes + 4 * plane + i, half * (taps[0] - taps[2]));
    }
    for (; i < end * width; i++) {
      const float a = weight[3 * i], c = weight[3 * i + 2];
      planes[i] = weight[3 * i + 1];
      planes[plane + i] = a;
      planes[2 * plane + i] = c;
      planes[3 * plane + i] = 0.5f * (a + c);
      planes[4 * plane + i] = 0.5f * (a - c);
    }
  });
}

// The weight's gradient from those of its planes.
void conv_join_weight(const float* planes, float* weight, int64_t out_width, int64_t width) {
  const int64_t plane = out_width * width;
  parallel_for(out_width, 1 + 8192 / (width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * width; i < end * width; i++) {
      const float sum = planes[3 * plane + i], difference = planes[4 * plane + i];
      weight[3 * i] = planes[plane + i] + 0.5f * (sum + difference);
      weight[3 * i + 1] = planes[i];
      weight[3 * i + 2] = planes[2 * plane + i] + 0.5f * (sum - difference);
    }
  });
}

// Adds the bias to `hidden` in place; `out` may be the same memory.
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

// Outputs of tiles `first` and following from their products, `[5, tiles, width]`: what each of the three has of its own, and what
// they share. `before` and `out` are those of all outputs.
void conv_join_tiles(const float* products, const int32_t* cu_seqlens, const float* bias, float* before, float* out, int64_t first,
                     int64_t tiles, int64_t width) {
  const int64_t plane = tiles * width, whole = width / kLanes * kLanes, rest = width - whole;
  parallel_for(tiles, 1 + 2048 / (width + 1), [&](int64_t begin, int64_t end) {
    for_tiles(cu_seqlens, first + begin, first + end, [&](int64_t output, int64_t count, int64_t tile) {
      const float* from = products + (tile - first) * width;
      for (int64_t j = 0; j < count; j++) {
        float *keep = before + (output + j) * width, *to = out + (output + j) * width;
        const vec sign = splat(j == 1 ? -1.0f : 1.0f);
        for (int64_t i = 0; i < whole; i += kLanes) {
          const vec shared = load(from + 3 * plane + i) + sign * load(from + 4 * plane + i);
          const vec sum = load(from + j * plane + i) + shared + load(bias + i);
          store(keep + i, sum);
          store(to + i, gelu(sum));
        }
        if (!rest) continue;
        const vec shared = load_tail(from + 3 * plane + whole, rest) + sign * load_tail(from + 4 * plane + whole, rest);
        const vec sum = load_tail(from + j * plane + whole, rest) + shared + load_tail(bias + whole, rest);
        store_tail(keep + whole, sum, rest);
        store_tail(to + whole, gelu(sum), rest);
      }
    });
  });
}

// The gradient before GELU, and its sum over rows. Threads share out the columns, and rows are summed in runs of 64, so that every
// sum has one order and its error does not grow with the rows.
void gelu_gradient(const float* gradient, const float* hidden, float* out, float* total, int64_t rows, int64_t width) {
  constexpr int64_t kRun = 64;
  parallel_for((width + kLanes - 1) / kLanes, 8, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes, columns = (end * kLanes < width ? end * kLanes : width) - first;
    const int64_t whole = columns / kLanes * kLanes, rest = columns - whole;
    float* run = thread_scratch(columns + kLanes);
    std::memset(total + first, 0, sizeof(float) * columns);
    for (int64_t start = 0; start < rows; start += kRun) {
      std::memset(run, 0, sizeof(float) * (columns + kLanes));
      for (int64_t row = start; row < rows && row < start + kRun; row++) {
        const int64_t at = row * width + first;
        for (int64_t i = 0; i < whole; i += kLanes) {
          const vec value = load(gradient + at + i) * gelu_slope(load(hidden + at + i));
          store(out + at + i, value);
          store(run + i, load(run + i) + value);
        }
        if (!rest) continue;
        const vec value = load_tail(gradient + at + whole, rest) * gelu_slope(load_tail(hidden + at + whole, rest));
        store_tail(out + at + whole, value, rest);
        store(run + whole, load(run + whole) + value);
      }
      for (int64_t i = 0; i < columns; i++) total[first + i] += run[i];
    }
  });
}

// Gradients of tiles' outputs as their products take them, `[5, tiles, width]`: the three, all three added, and the middle one
// subtracted from the others' sum. An output that a tile lacks has none.
void conv_gradient_tiles(const float* hidden, const int32_t* cu_seqlens, float* planes, int64_t first, int64_t tiles,
                         int64_t width) {
  const int64_t plane = tiles * width, whole = width / kLanes * kLanes, rest = width - whole;
  parallel_for(tiles, 1 + 2048 / (width + 1), [&](int64_t begin, int64_t end) {
    for_tiles(cu_seqlens, first + begin, first + end, [&](int64_t output, int64_t count, int64_t tile) {
      const float* from = hidden + output * width;
      float* to = planes + (tile - first) * width;
      for (int64_t i = 0; i < width; i += kLanes) {
        const auto read = [&](int64_t row) {
          const float* place = from + row * width + i;
          return row >= count ? vec{} : i < whole ? load(place) : load_tail(place, rest);
        };
        const auto write = [&](int64_t place, vec value) {
          i < whole ? store(to + place * plane + i, value) : store_tail(to + place * plane + i, value, rest);
        };
        const vec a = read(0), b = read(1), c = read(2);
        write(0, a);
        write(1, b);
        write(2, c);
        write(3, a + c + b);
        write(4, a + c - b);
      }
    });
  });
}

}  // namespace STEP_ISA
}  // namespace step
