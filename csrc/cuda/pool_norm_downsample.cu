// Average-pool by two and LayerNorm: two rows in, one row out, each read once; `source_row[o]` is the first of the two rows of
// `o`.
//
// Width 1,280 fits a warp's registers (40 floats a lane), so a warp takes a row: no shared memory, no barrier, and ten 16-byte
// loads a lane in flight. Other widths, and pointers that are not aligned, take a block and stage the pooled row in shared
// memory.
#include "vectors.h"

namespace step {

constexpr int kWarps = 4, kBlock = 256;

template <class T, int kVectors>
__global__ void __launch_bounds__(32 * kWarps)
    pool_norm_warp(const T* __restrict__ hidden, const int32_t* __restrict__ source_row, const T* __restrict__ weight,
                   const T* __restrict__ bias, T* __restrict__ out, int64_t rows, int width, float eps) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const T* first = hidden + static_cast<int64_t>(source_row[row]) * width;
  float pooled[kVectors][kSize];
  float total = 0;
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    const int column = (v * 32 + lane) * kSize;
    Vector<T> a{}, b{};
    if (column < width) {
      a = load_vector(first + column);
      b = load_vector(first + width + column);
    }
#pragma unroll
    for (int i = 0; i < kSize; i++) {
      pooled[v][i] = 0.5f * (to_float(a.values[i]) + to_float(b.values[i]));
      total += pooled[v][i];
    }
  }
  const float mean = warp_sum(total) / width;
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; v++)
    if ((v * 32 + lane) * kSize < width)
#pragma unroll
      for (int i = 0; i < kSize; i++) squares += (pooled[v][i] - mean) * (pooled[v][i] - mean);
  const float scale = rsqrtf(warp_sum(squares) / width + eps);
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    const int column = (v * 32 + lane) * kSize;
    if (column >= width) continue;
    const Vector<T> w = load_vector(weight + column), b = load_vector(bias + column);
    Vector<T> y;
#pragma unroll
    for (int i = 0; i < kSize; i++)
      from_float((pooled[v][i] - mean) * scale * to_float(w.values[i]) + to_float(b.values[i]), y.values[i]);
    store_vector(out + row * width + column, y);
  }
}

// Sum over the block, the same bits in every thread.
__device__ inline float block_sum(float value) {
  STEP_SHARED(float, sums, kBlock / 32);
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < kBlock / 32; warp++) total += sums[warp];
  __syncthreads();
  return total;
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    pool_norm_block(const T* __restrict__ hidden, const int32_t* __restrict__ source_row, const T* __restrict__ weight,
                    const T* __restrict__ bias, T* __restrict__ out, int width, float eps) {
  STEP_DYNAMIC_SHARED(float, pooled);
  const T* first = hidden + static_cast<int64_t>(source_row[blockIdx.x]) * width;
  float total = 0;
  for (int column = threadIdx.x; column < width; column += kBlock) {
    pooled[column] = 0.5f * (to_float(first[column]) + to_float(first[width + column]));
    total += pooled[column];
  }
  const float mean = block_sum(total) / width;
  float squares = 0;
  for (int column = threadIdx.x; column < width; column += kBlock) squares += (pooled[column] - mean) * (pooled[column] - mean);
  const float scale = rsqrtf(block_sum(squares) / width + eps);
  T* y = out + static_cast<int64_t>(blockIdx.x) * width;
  for (int column = threadIdx.x; column < width; column += kBlock)
    from_float((pooled[column] - mean) * scale * to_float(weight[column]) + to_float(bias[column]), y[column]);
}

template <class T>
int pool_norm(const T* hidden, const int32_t* source_row, const T* weight, const T* bias, T* out, int64_t rows, int width,
              float eps, void* stream) {
  const bool vectors = aligned(hidden) && aligned(weight) && aligned(bias) && aligned(out) && width % Vector<T>::kSize == 0;
  const int needed = (width + 32 * Vector<T>::kSize - 1) / (32 * Vector<T>::kSize);
  constexpr int kMost = 40 / Vector<T>::kSize, kFew = kMost * 2 / 5;  // 1,280 and 512 columns
  const unsigned warps = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  if (vectors && needed <= kFew)
    STEP_LAUNCH((pool_norm_warp<T, kFew>), warps, 32 * kWarps, 0, stream, hidden, source_row, weight, bias, out, rows, width,
                eps);
  else if (vectors && needed <= kMost)
    STEP_LAUNCH((pool_norm_warp<T, kMost>), warps, 32 * kWarps, 0, stream, hidden, source_row, weight, bias, out, rows, width,
                eps);
  else
    STEP_LAUNCH((pool_norm_block<T>), static_cast<unsigned>(rows), kBlock, width * sizeof(float), stream, hidden, source_row,
                weight, bias, out, width, eps);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace step

extern "C" int step_pool_norm_downsample(int dtype, const void* hidden, const int32_t* source_row, const void* weight,
                                         const void* bias, void* out, int64_t rows, int64_t width, float eps, void* stream) {
  // The widest row whose floats fit the 48 KB of shared memory that every GPU gives without being asked.
  if (width > 12000 || rows > 0x7fffffff) return static_cast<int>(cudaErrorInvalidValue);
  if (rows == 0) return 0;
#define STEP_CASE(type)                                                                                  \
  return step::pool_norm(static_cast<const type*>(hidden), source_row, static_cast<const type*>(weight), \
                         static_cast<const type*>(bias), static_cast<type*>(out), rows, static_cast<int>(width), eps, stream)
  switch (dtype) {
    case step::kFloat32:
      STEP_CASE(float);
    case step::kBFloat16:
      STEP_CASE(__nv_bfloat16);
    case step::kFloat16:
      STEP_CASE(__half);
  }
#undef STEP_CASE
  return static_cast<int>(cudaErrorInvalidValue);
}
