// Merge rows of audio into rows of tokens, and the way back: bytes are moved, each once, 16 at a time where rows and pointers
// allow. `source[t]` is the audio row that belongs at `t`, -1 where the token's own embedding stays; it is built on the device,
// so that nothing is read back. A warp takes a row.
#include "vectors.h"

namespace step {

constexpr int kWarps = 4;

__global__ void clear_source(int32_t* __restrict__ source, int64_t length) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < length) source[t] = -1;
}

__global__ void mark_source(const int64_t* __restrict__ positions, int64_t count, int32_t* __restrict__ source, int64_t length) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= count) return;
  if (positions[n] < 0 || positions[n] >= length) __trap();
  source[positions[n]] = static_cast<int32_t>(n);
}

template <class Unit>
__global__ void __launch_bounds__(32 * kWarps)
    merge_rows(const Unit* __restrict__ tokens, const Unit* __restrict__ audio, const int32_t* __restrict__ source,
               Unit* __restrict__ out, int64_t length, int64_t units) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (t >= length) return;
  const int32_t row = source[t];
  const Unit* from = row < 0 ? tokens + t * units : audio + row * units;
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < units; i += 32) out[t * units + i] = from[i];
}

template <class Unit>
__global__ void __launch_bounds__(32 * kWarps)
    split_rows(const Unit* __restrict__ gradient, const int32_t* __restrict__ source, Unit* __restrict__ tokens,
               Unit* __restrict__ audio, int64_t length, int64_t units) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (t >= length) return;
  const int32_t row = source[t];
  Unit* to = row < 0 ? tokens : audio;
  if (to) to += (row < 0 ? t : row) * units;
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < units; i += 32) {
    if (to) to[i] = gradient[t * units + i];
    if (row >= 0 && tokens) tokens[t * units + i] = Unit{};
  }
}

inline unsigned blocks(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

inline int build_source(const int64_t* positions, int64_t count, int32_t* source, int64_t length, void* stream) {
  STEP_LAUNCH(clear_source, blocks(length, 256), 256, 0, stream, source, length);
  if (const int status = static_cast<int>(cudaGetLastError())) return status;
  if (count) STEP_LAUNCH(mark_source, blocks(count, 256), 256, 0, stream, positions, count, source, length);
  return static_cast<int>(cudaGetLastError());
}

template <class Unit>
int merge(const void* tokens, const void* audio, const int32_t* source, void* out, int64_t length, int64_t row_bytes,
          void* stream) {
  STEP_LAUNCH((merge_rows<Unit>), blocks(length, kWarps), 32 * kWarps, 0, stream, static_cast<const Unit*>(tokens),
              static_cast<const Unit*>(audio), source, static_cast<Unit*>(out), length, row_bytes / int64_t{sizeof(Unit)});
  return static_cast<int>(cudaGetLastError());
}

template <class Unit>
int split(const void* gradient, const int32_t* source, void* tokens, void* audio, int64_t length, int64_t row_bytes,
          void* stream) {
  STEP_LAUNCH((split_rows<Unit>), blocks(length, kWarps), 32 * kWarps, 0, stream, static_cast<const Unit*>(gradient), source,
              static_cast<Unit*>(tokens), static_cast<Unit*>(audio), length, row_bytes / int64_t{sizeof(Unit)});
  return static_cast<int>(cudaGetLastError());
}

}  // namespace step

extern "C" int step_merge_audio(const void* tokens, const void* audio, const int64_t* positions, int64_t count, int32_t* source,
                                void* out, int64_t length, int64_t row_bytes, void* stream) {
  if (length == 0 || row_bytes == 0) return 0;
  if (row_bytes % 2) return static_cast<int>(cudaErrorInvalidValue);
  if (const int status = step::build_source(positions, count, source, length, stream)) return status;
  if (row_bytes % 16 == 0 && step::aligned(tokens) && step::aligned(audio) && step::aligned(out))
    return step::merge<uint4>(tokens, audio, source, out, length, row_bytes, stream);
  return step::merge<uint16_t>(tokens, audio, source, out, length, row_bytes, stream);
}

// `tokens` is null where its gradient is not wanted.
extern "C" int step_merge_audio_backward(const void* gradient, const int64_t* positions, int64_t count, int32_t* source,
                                         void* tokens, void* audio, int64_t length, int64_t row_bytes, void* stream) {
  if (length == 0 || row_bytes == 0) return 0;
  if (row_bytes % 2) return static_cast<int>(cudaErrorInvalidValue);
  if (const int status = step::build_source(positions, count, source, length, stream)) return status;
  if (row_bytes % 16 == 0 && step::aligned(gradient) && step::aligned(tokens) && step::aligned(audio))
    return step::split<uint4>(gradient, source, tokens, audio, length, row_bytes, stream);
  return step::split<uint16_t>(gradient, source, tokens, audio, length, row_bytes, stream);
}
