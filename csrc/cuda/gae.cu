// Generalised advantage estimation: a block takes a segment and walks it in tiles of 1,024 tokens from its end. In a tile, a
// thread scans four neighbours, a warp joins its lanes, the block its warps; `carry` is the advantage of the token after the
// tile.
//
// Tiles are counted from the segment's end and not from aligned addresses, so loads are of 4 bytes (coalesced): where a segment
// begins in the pack must not change the order of its sums.
#include "vectors.h"

namespace step {

constexpr int kThreads = 256, kItems = 4, kTile = kThreads * kItems, kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads)
    gae_scan(const float* __restrict__ rewards, const float* __restrict__ values, const int32_t* __restrict__ cu_seqlens,
             const float* __restrict__ bootstrap, float gamma, float decay, float* __restrict__ advantages,
             float* __restrict__ returns) {
  STEP_SHARED(float, tile, kTile);
  STEP_SHARED(float, warp_totals, kWarps);
  const int begin = cu_seqlens[blockIdx.x], end = cu_seqlens[blockIdx.x + 1];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const float last_value = bootstrap[blockIdx.x];
  // decay^4, and that to the power of the lane: what lies between this lane's tokens and those after the warp's.
  const float decay4 = decay * decay * decay * decay;
  float reach = 1, power = decay4;
  for (int bit = 0; bit < 5; bit++, power *= power)
    if (lane >> bit & 1) reach *= power;
  const float decay_warp = power;
  float carry = 0;
  for (int top = end; top > begin; top -= kTile) {
#pragma unroll
    for (int k = 0; k < kItems; k++) {
      const int offset = k * kThreads + thread, t = top - 1 - offset;
      float delta = 0;
      if (t >= begin) delta = rewards[t] + gamma * (t + 1 < end ? values[t + 1] : last_value) - values[t];
      tile[offset] = delta;
    }
    __syncthreads();
    float items[kItems], total = 0;
#pragma unroll
    for (int k = 0; k < kItems; k++) items[k] = total = tile[thread * kItems + k] + decay * total;
    float factor = decay4;
    for (int by = 1; by < 32; by *= 2, factor *= factor) {
      const float before = __shfl_up_sync(~0u, total, by);
      if (lane >= by) total += factor * before;
    }
    if (lane == 31) warp_totals[warp] = total;
    __syncthreads();
    float entering = 0;
    for (int w = 0; w < kWarps; w++) {
      if (w == warp) entering = carry;
      carry = warp_totals[w] + decay_warp * carry;
    }
    const float before = __shfl_up_sync(~0u, total, 1);
    entering = reach * entering + (lane ? before : 0.0f);
#pragma unroll
    for (int k = 0; k < kItems; k++) {
      entering *= decay;
      tile[thread * kItems + k] = items[k] + entering;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kItems; k++) {
      const int offset = k * kThreads + thread, t = top - 1 - offset;
      if (t < begin) continue;
      advantages[t] = tile[offset];
      returns[t] = tile[offset] + values[t];
    }
    // No barrier: the next tile is written where the same thread has just read.
  }
}

}  // namespace step

extern "C" int step_gae_varlen(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,
                               int64_t segments, float gamma, float decay, float* advantages, float* returns, void* stream) {
  if (segments == 0) return 0;
  STEP_LAUNCH(step::gae_scan, static_cast<unsigned>(segments), step::kThreads, 0, stream, rewards, values, cu_seqlens, bootstrap,
              gamma, decay, advantages, returns);
  return static_cast<int>(cudaGetLastError());
}
