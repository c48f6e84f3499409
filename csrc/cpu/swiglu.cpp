// Gated SiLU of rows [gate, up], forward and backward in one pass each.
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

namespace {

constexpr int64_t kGrain = 8192;  // gates of a thread's share at least

// 1 / (1 + e^-x), zero where `exponential` does not reach e^-x: a huge gate times what is left of it would not be nothing.
static inline vec sigmoid(vec x) { return x < splat(-88.0f) ? vec{} : splat(1.0f) / (splat(1.0f) + exponential(-x)); }

static inline vec gated(vec gate, vec up) { return gate * sigmoid(gate) * up; }

static inline void gradients(vec gradient, vec gate, vec up, vec& grad_gate, vec& grad_up) {
  const vec open = sigmoid(gate), silu = gate * open;
  grad_up = gradient * silu;
  grad_gate = gradient * up * (open + silu * (splat(1.0f) - open));
}

}  // namespace

void swiglu(const float* x, float* out, int64_t rows, int64_t width) {
  const int64_t whole = width / kLanes * kLanes, rest = width - whole;
  parallel_for(rows, 1 + kGrain / (width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const float *gate = x + 2 * row * width, *up = gate + width;
      float* to = out + row * width;
      for (int64_t i = 0; i < whole; i += kLanes) store(to + i, gated(load(gate + i), load(up + i)));
      if (rest) store_tail(to + whole, gated(load_tail(gate + whole, rest), load_tail(up + whole, rest)), rest);
    }
  });
}

void swiglu_backward(const float* gradient, const float* x, float* grad_x, int64_t rows, int64_t width) {
  const int64_t whole = width / kLanes * kLanes, rest = width - whole;
  parallel_for(rows, 1 + kGrain / (width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const float *gate = x + 2 * row * width, *up = gate + width, *from = gradient + row * width;
      float *to_gate = grad_x + 2 * row * width, *to_up = to_gate + width;
      vec grad_gate, grad_up;
      for (int64_t i = 0; i < whole; i += kLanes) {
        gradients(load(from + i), load(gate + i), load(up + i), grad_gate, grad_up);
        store(to_gate + i, grad_gate);
        store(to_up + i, grad_up);
      }
      if (rest) {
        gradients(load_tail(from + whole, rest), load_tail(gate + whole, rest), load_tail(up + whole, rest), grad_gate, grad_up);
        store_tail(to_gate + whole, grad_gate, rest);
        store_tail(to_up + whole, grad_up, rest);
      }
    }
  });
}

}  // namespace STEP_ISA
}  // namespace step
