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

static inline float sum(vec value) {
  float lanes[kLanes], total = 0;
  store(lanes, value);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  total = lanes[0];
  return total;
}
static inline float maximum(vec value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}
static inline vec maximum(vec a, vec b) { return a > b ? a : b; }
static inline vec minimum(vec a, vec b) { return a < b ? a : b; }

// e^x to two units in the last place, 0 below -87.3, infinity not reached (inputs are clamped at 88); NaN stays NaN: maximum and
// minimum give their second argument where the comparison is false.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by the polynomial of Cephes' expf.
static inline vec exponential(vec x) {
  const vec below = splat(-87.33654f);
  vec clamped = minimum(splat(88.0f), maximum(below, x));
  vec shifted = clamped * splat(1.44269504f) + splat(12582912.0f);  // 1.5 * 2^23: rounds to the nearest integer
  vec n = shifted - splat(12582912.0f);
  vec r = clamped - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
  vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return x < below ? vec{} : p * scale;
}

}  // namespace STEP_ISA
}  // namespace step
