// Put rows of audio into rows of tokens, in place, and the way back: bytes are moved, each once, whatever their type. On the way
// back `source[t]` is the audio row whose gradient lies at `t`, -1 where it is the token's own.
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

// 64 KB pay for waking a thread.
static int64_t grain(int64_t row_bytes) { return 65536 / (row_bytes + 1) + 1; }

// A gradient of this size leaves the second-level cache before anybody reads it: it is written past the caches, which saves reading
// the lines that are overwritten (1.5 to 1.8 times as fast).
constexpr int64_t kStreamBytes = 2 << 20;

// Copy, or clear where there is nothing to copy from.
static void fill(char* to, const char* from, int64_t bytes) { from ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes); }

// The same past the caches, in whole cache lines; `finish_streams` makes it visible to other threads.
static void stream(char* to, const char* from, int64_t bytes) {
#if defined(__AVX2__)
  constexpr int64_t kLine = 64;
  const int64_t head = -reinterpret_cast<uintptr_t>(to) % kLine;
  if (bytes < 2 * kLine) return fill(to, from, bytes);
  fill(to, from, head);
  int64_t at = head;
  for (; at + kLine <= bytes; at += kLine)
    for (int64_t half = at; half < at + kLine; half += kLine / 2) {
      const __m256i value = from ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + half)) : _mm256_setzero_si256();
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + half), value);
    }
  fill(to + at, from ? from + at : nullptr, bytes - at);
#else
  fill(to, from, bytes);
#endif
}
static void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// How many rows from `t` on are all tokens, or rows of audio that follow each other: copied in one go.
static int64_t run_length(const int32_t* source, int64_t t, int64_t end) {
  int64_t run = 1;
  while (t + run < end && source[t + run] == (source[t] < 0 ? -1 : source[t] + run)) run++;
  return run;
}

bool merge_audio_source(const int64_t* positions, int64_t count, int32_t* source, int64_t length) {
  std::memset(source, 0xFF, sizeof(int32_t) * length);
  for (int64_t n = 0; n < count; n++) {
    if (positions[n] < 0 || positions[n] >= length) return false;
    source[positions[n]] = static_cast<int32_t>(n);
  }
  return true;
}

bool merge_audio(const char* audio, const int64_t* positions, int64_t count, char* tokens, int64_t length, int64_t row_bytes) {
  // Nothing is written where anything is wrong.
  for (int64_t n = 0; n < count; n++)
    if (positions[n] < 0 || positions[n] >= length) return false;
  parallel_for(count, grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end;) {
      int64_t run = 1;
      while (n + run < end && positions[n + run] == positions[n] + run) run++;
      std::memcpy(tokens + positions[n] * row_bytes, audio + n * row_bytes, run * row_bytes);
      n += run;
    }
  });
  return true;
}

void merge_audio_backward(const char* gradient, const int32_t* source, char* tokens, char* audio, int64_t length,
                          int64_t row_bytes) {
  const auto write = length * row_bytes < kStreamBytes ? fill : stream;
  parallel_for(length, grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end;) {
      const int64_t run = run_length(source, t, end), bytes = run * row_bytes;
      const char* from = gradient + t * row_bytes;
      if (source[t] >= 0) write(audio + source[t] * row_bytes, from, bytes);
      if (tokens) write(tokens + t * row_bytes, source[t] < 0 ? from : nullptr, bytes);
      t += run;
    }
    finish_streams();
  });
}

}  // namespace STEP_ISA
}  // namespace step
