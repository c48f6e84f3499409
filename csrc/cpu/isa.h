// One source, several instruction sets: every file of this folder is compiled once for each, with STEP_ISA as its namespace, and
// the bindings choose at run time. All that a kernel uses must be in that namespace and free of std templates: an inline function
// that two builds share would be merged by the linker, and AVX-512 code would run on a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef STEP_ISA
#error "compile with -DSTEP_ISA=avx2, avx512 or portable (see setup.py)"
#endif

namespace step {
namespace STEP_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Loads and stores through these types may be unaligned.
typedef float vec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

static inline vec load(const float* from) { return *reinterpret_cast<const vec*>(from); }
static inline void store(float* to, vec value) { *reinterpret_cast<vec*>(to) = value; }
static inline vec splat(float value) { return value - vec{}; }

// The first `count` < kLanes values; the rest is zero.
static inline vec load_tail(const float* from, int64_t count) {
  vec value{};
  std::memcpy(&value, from, sizeof(float) * count);
  return value;
}
static inline void store_tail(float* to, vec value, int64_t count) { std::memcpy(to, &value, sizeof(float) * count); }

static inline vec maximum(vec a, vec b) { return a > b ? a : b; }
static inline vec minimum(vec a, vec b) { return a < b ? a : b; }

// Lane i gets lane `lanes[i]` of `a` and `b` one after the other.
static inline vec shuffled(vec a, vec b, ivec lanes) {
#if defined(__clang__)  // whose builtin takes constants only; it makes one shuffle of these where it knows the lanes
  vec out;
  for (int i = 0; i < kLanes; i++) out[i] = lanes[i] < kLanes ? a[lanes[i]] : b[lanes[i] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}
// Lane i gets the value of lane i ^ Distance.
template <int Distance>
static inline vec swapped(vec value) {
  ivec lanes;
  for (int i = 0; i < kLanes; i++) lanes[i] = i ^ Distance;
  return shuffled(value, value, lanes);
}
static inline float sum(vec value) {
  if constexpr (kLanes > 8) value += swapped<8>(value);
  if constexpr (kLanes > 4) value += swapped<4>(value);
  value += swapped<2>(value);
  value += swapped<1>(value);
  return value[0];
}
static inline float maximum(vec value) {
  if constexpr (kLanes > 8) value = maximum(value, swapped<8>(value));
  if constexpr (kLanes > 4) value = maximum(value, swapped<4>(value));
  value = maximum(value, swapped<2>(value));
  value = maximum(value, swapped<1>(value));
  return value[0];
}

// 1.5 * 2^23 + 127: a number that it is added to becomes the nearest integer n, with n + 127, a float's exponent, in the lowest bits.
constexpr float kRounding = 12583039.0f;

// 2^(n + r) for |r| <= 1/2, by a polynomial of least relative error; `shifted` is n + kRounding.
static inline vec power_of_two(vec r, vec shifted) {
  vec p = splat(1.5353362e-4f);
  p = p * r + splat(1.3398874e-3f);
  p = p * r + splat(9.6184374e-3f);
  p = p * r + splat(5.5503325e-2f);
  p = p * r + splat(2.4022648e-1f);
  p = p * r + splat(6.9314720e-1f);
  p = p * r + splat(1.0f);
  ivec bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits <<= 23;
  vec scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

// 2^x for x <= 0 (as far as 127) to two units in the last place, 2^-126 below -126; NaN stays NaN, for maximum gives its second
// argument where the comparison is false.
static inline vec power_of_two(vec x) {
  x = maximum(splat(-126.0f), x);
  const vec shifted = x + splat(kRounding);
  return power_of_two(x - (shifted - splat(kRounding)), shifted);
}

// e^x to two units in the last place, 0 below -87.3, infinity not reached (inputs are clamped at 88); NaN stays NaN. x / ln 2 would
// lose the fraction's last bits, so n ln 2 is taken off x, in two parts of which the first has few bits (Cephes' expf).
static inline vec exponential(vec x) {
  const vec below = splat(-87.33654f), clamped = minimum(splat(88.0f), maximum(below, x));
  const vec shifted = clamped * splat(1.44269504f) + splat(kRounding), n = shifted - splat(kRounding);
  const vec rest = clamped - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
  return x < below ? vec{} : power_of_two(rest * splat(1.44269504f), shifted);
}

}  // namespace STEP_ISA
}  // namespace step
