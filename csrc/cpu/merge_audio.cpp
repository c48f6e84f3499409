// Put rows of audio into rows of tokens, in place, and the way back: bytes are moved, each once, whatever their type. On the way
// back `source[t]` is the audio row whose gradient lies at `t`, -1 where it is the token's own.
#include <cstring>

#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

// 64 KB pay for waking a thread.
static int64_t grain(int64_t row_bytes) { return 65536 / (row_bytes + 1) + 1; }

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
  parallel_for(length, grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end;) {
      const int64_t run = run_length(source, t, end);
      const char* from = gradient + t * row_bytes;
      if (source[t] < 0) {
        if (tokens) std::memcpy(tokens + t * row_bytes, from, run * row_bytes);
      } else {
        std::memcpy(audio + source[t] * row_bytes, from, run * row_bytes);
        if (tokens) std::memset(tokens + t * row_bytes, 0, run * row_bytes);
      }
      t += run;
    }
  });
}

}  // namespace STEP_ISA
}  // namespace step
