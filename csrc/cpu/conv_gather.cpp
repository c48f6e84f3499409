// The left operands of the strided convolution's matrix products, for one block of outputs at a time: the frames that an output
// reads side by side, or the sums of frames from which a tile's products are formed (see conv_products.py). Frames are read as they
// are stored, or made from the encoder's hidden rows on the way, a few at a time in the first-level cache.
#include "conv_place.h"
#include "conv_source.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "pool_norm_row.h"

namespace step {
namespace STEP_ISA {

namespace {

static inline float widen(float value) { return value; }
static inline float widen(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

typedef uint16_t halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

static inline vec load_wide(const float* from) { return load(from); }
static inline vec load_wide(const uint16_t* bfloat16) {
  const ivec bits = __builtin_convertvector(*reinterpret_cast<const halves*>(bfloat16), ivec) << 16;
  vec value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t rounded_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return value != value ? 0x7fc00000u : (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
}

// Frames as they are stored.
template <class Value>
struct StoredFrames {
  typedef Value Element;
  static int64_t scratch(int64_t width) { return width; }

  StoredFrames(const ConvSource& source, float* memory, int64_t) : source(source), zeros(reinterpret_cast<Value*>(memory)) {
    std::memset(memory, 0, sizeof(float) * source.width);
  }
  // Frame `frame` of a segment; zeros outside the segment.
  const Value* row(int64_t segment, int64_t frame) {
    const int64_t start = source.cu_seqlens[segment];
    if (frame < 0 || start + frame >= source.cu_seqlens[segment + 1]) return zeros;
    return static_cast<const Value*>(source.x) + (start + frame) * source.width;
  }

  const ConvSource& source;
  const Value* zeros;
};

// Frames made from hidden rows. A tile reads seven that follow each other: the latest eight are kept.
struct PooledFrames {
  typedef float Element;
  static int64_t scratch(int64_t width) { return 9 * width; }

  // Frames from `first` on are this thread's to keep; it makes one before them, too, which another keeps.
  PooledFrames(const ConvSource& source, float* memory, int64_t first) : source(source), zeros(memory), first(first) {
    std::memset(memory, 0, sizeof(float) * source.width);
    for (int slot = 0; slot < 8; slot++) held[slot] = -1;
  }
  const float* row(int64_t segment, int64_t inside) {
    const int64_t frame = source.cu_seqlens[segment] + inside, width = source.width;
    if (inside < 0 || frame >= source.cu_seqlens[segment + 1]) return zeros;
    float* out = zeros + (1 + frame % 8) * width;
    if (held[frame % 8] == frame) return out;
    held[frame % 8] = frame;
    const float* from = source.hidden + (source.hidden_starts[segment] + 2 * inside) * width;
    pooled_row(from, from + width, source.norm_weight, source.norm_bias, out, width, source.eps);
    void* keep = source.keep && frame >= first ? source.keep : nullptr;
    if (!source.round) {
      if (keep) std::memcpy(static_cast<float*>(keep) + frame * width, out, sizeof(float) * width);
      return out;
    }
    uint32_t* bits = reinterpret_cast<uint32_t*>(out);
    uint16_t* narrow = static_cast<uint16_t*>(keep) + (keep ? frame * width : 0);
    for (int64_t i = 0; i < width; i++) {
      const uint32_t rounded = rounded_bits(out[i]);
      std::memcpy(bits + i, &rounded, sizeof(rounded));
    }
    if (keep)
      for (int64_t i = 0; i < width; i++) {
        uint32_t rounded;
        std::memcpy(&rounded, bits + i, sizeof(rounded));
        narrow[i] = rounded >> 16;
      }
    return out;
  }

  const ConvSource& source;
  float* zeros;
  int64_t first, held[8];
};

// Writes three rows as one, element by element: a0 b0 c0 a1 b1 c1 ... A compiler makes single stores of the plain loop.
struct Interleave {
  ivec first[3], second[3];

  Interleave() {
    for (int part = 0; part < 3; part++)
      for (int lane = 0; lane < kLanes; lane++) {
        const int channel = (part * kLanes + lane) / 3, tap = (part * kLanes + lane) % 3;
        first[part][lane] = channel + (tap == 1 ? kLanes : 0);
        second[part][lane] = tap == 2 ? kLanes + channel : lane;
      }
  }

  template <class Value>
  void operator()(const Value* a, const Value* b, const Value* c, float* out, int64_t width) const {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const vec x = load_wide(a + i), y = load_wide(b + i), z = load_wide(c + i);
      for (int part = 0; part < 3; part++)
        store(out + 3 * i + part * kLanes, shuffled(shuffled(x, y, first[part]), z, second[part]));
    }
    for (; i < width; i++) {
      out[3 * i] = widen(a[i]);
      out[3 * i + 1] = widen(b[i]);
      out[3 * i + 2] = widen(c[i]);
    }
  }
};

template <class Frames>
static void gather(Frames*, const ConvSource& source, int64_t first, int64_t rows, float* columns) {
  const Interleave interleave;
  parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
    Place place;
    place.move_to_output(first + begin, source.cu_seqlens);
    float* memory = thread_scratch(Frames::scratch(source.width));
    Frames frames(source, memory, source.cu_seqlens[place.segment] + 2 * (first + begin - place.first_output));
    for (int64_t row = begin; row < end; row++) {
      place.move_to_output(first + row, source.cu_seqlens);
      const int64_t middle = 2 * (first + row - place.first_output);
      const auto *a = frames.row(place.segment, middle - 1), *b = frames.row(place.segment, middle),
                 *c = frames.row(place.segment, middle + 1);
      interleave(a, b, c, columns + row * source.width * 3, source.width);
    }
  });
}

template <class Frames>
static void gather_tiles(Frames*, const ConvSource& source, int64_t first, int64_t tiles, float* planes) {
  const int64_t width = source.width, plane = tiles * width;
  parallel_for(tiles, 8, [&](int64_t begin, int64_t end) {
    Place place;
    place.move_to_tile(first + begin, source.cu_seqlens);
    float* memory = thread_scratch(Frames::scratch(width));
    Frames frames(source, memory, source.cu_seqlens[place.segment] + 2 * kTile * (first + begin - place.first_tile));
    for (int64_t tile = begin; tile < end; tile++) {
      place.move_to_tile(first + tile, source.cu_seqlens);
      const int64_t middle = 2 * kTile * (first + tile - place.first_tile);
      const typename Frames::Element* row[7];
      for (int i = 0; i < 7; i++) row[i] = frames.row(place.segment, middle - 1 + i);
      float* out = planes + tile * width;
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        const vec a = load_wide(row[0] + i), b = load_wide(row[2] + i), c = load_wide(row[4] + i), d = load_wide(row[6] + i);
        for (int even = 0; even < 3; even++) store(out + even * plane + i, load_wide(row[1 + 2 * even] + i));
        store(out + 3 * plane + i, a - c);
        store(out + 4 * plane + i, d - b);
        store(out + 5 * plane + i, b + c);
        store(out + 6 * plane + i, c - b);
      }
      for (; i < width; i++) {
        const float a = widen(row[0][i]), b = widen(row[2][i]), c = widen(row[4][i]), d = widen(row[6][i]);
        for (int even = 0; even < 3; even++) out[even * plane + i] = widen(row[1 + 2 * even][i]);
        out[3 * plane + i] = a - c;
        out[4 * plane + i] = d - b;
        out[5 * plane + i] = b + c;
        out[6 * plane + i] = c - b;
      }
    }
  });
}

// Calls `body` with a value of the class that reads the source's frames; what it points to does not matter.
template <class Body>
static void with_frames(const ConvSource& source, Body&& body) {
  if (source.hidden)
    body(static_cast<PooledFrames*>(nullptr));
  else if (source.bfloat16)
    body(static_cast<StoredFrames<uint16_t>*>(nullptr));
  else
    body(static_cast<StoredFrames<float>*>(nullptr));
}

}  // namespace

void conv_gather(const ConvSource& source, int64_t first, int64_t rows, float* columns) {
  with_frames(source, [&](auto* kind) { gather(kind, source, first, rows, columns); });
}

void conv_gather_tiles(const ConvSource& source, int64_t first, int64_t tiles, float* planes) {
  with_frames(source, [&](auto* kind) { gather_tiles(kind, source, first, tiles, planes); });
}

}  // namespace STEP_ISA
}  // namespace step
