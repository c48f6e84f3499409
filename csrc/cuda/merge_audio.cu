// Put rows of audio into rows of tokens, in place, and the way back: bytes are moved, each once, 16 at a time where rows and
// pointers allow. On the way back `source[t]` is the audio row whose gradient lies at `t`, -1 where it is the token's own; it is
// built on the device, so that nothing is read back. A warp takes a row.
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
    place_rows(const Unit* __restrict__ audio, const int64_t* __restrict__ positions, int64_t count, Unit* __restrict__ tokens,
               int64_t length, int64_t units) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (n >= count) return;
  const int64_t t = positions[n];
  if (t < 0 || t >= length) __trap();
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < units; i += 32) tokens[t * units + i] = audio[n * units + i];
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
int place(const void* audio, const int64_t* positions, int64_t count, void* tokens, int64_t length, int64_t row_bytes,
          void* stream) {
  STEP_LAUNCH((place_rows<Unit>), blocks(count, kWarps), 32 * kWarps, 0, stream, static_cast<const Unit*>(audio), positions,
              count, static_cast<Unit*>(tokens), length, row_bytes / int64_t{sizeof(Unit)});
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

extern "C" int step_merge_audio(const void* audio, const int64_t* positions, int64_t count, void* tokens, int64_t length,
                                int64_t row_bytes, void* stream) {
  if (count == 0 || row_bytes == 0) return 0;
  if (row_bytes % 2) return static_cast<int>(cudaErrorInvalidValue);
  if (row_bytes % 16 == 0 && step::aligned(audio) && step::aligned(tokens))
    return step::place<uint4>(audio, positions, count, tokens, length, row_bytes, stream);
  return step::place<uint16_t>(audio, positions, count, tokens, length, row_bytes, stream);
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
