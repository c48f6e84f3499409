// Values of a row as float, 16 bytes at a time.
#pragma once

#include "portable.h"

namespace step {

// How the bindings name element types.
enum DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float x, float& to) { to = x; }
__device__ inline void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half& to) { to = __float2half_rn(x); }

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <class T>
__device__ inline Vector<T> load_vector(const T* from) {
  Vector<T> vector;
  *reinterpret_cast<uint4*>(&vector) = *reinterpret_cast<const uint4*>(from);
  return vector;
}
template <class T>
__device__ inline void store_vector(T* to, const Vector<T>& vector) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&vector);
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

__device__ inline float warp_sum(float value) {
  for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

}  // namespace step
