// Products of small float32 matrices in cache: a tile of the result stays in registers while the inner dimension passes. Every
// element is one chain of multiply-adds in the order of the inner dimension, so its bits do not depend on how rows and columns
// are shared out over tiles.
#pragma once

#include "isa.h"

namespace step {
namespace STEP_ISA {

// 6 rows of 4 vectors take 24 of AVX-512's 32 registers, 6 rows of 2 take 12 of AVX2's 16; the rest holds the operands.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kLanes == 8 ? 2 : 4;
constexpr int kPanel = kTileVectors * kLanes;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The left operand: `stride` is the distance between its rows, or between its columns where it is read transposed.
struct Operand {
  const float* data;
  int64_t stride;
};

// The pragmas have the loops unrolled before the compiler gives registers to arrays: else the tile takes the way through memory.
template <int Rows, int Vectors, bool Transposed, bool Add>
static inline __attribute__((always_inline)) void tile(Operand a, const float* b, int64_t b_step, int64_t steps, float* c,
                                                       int64_t c_row) {
  vec total[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) total[r][v] = Add ? load(c + r * c_row + v * kLanes) : vec{};
#pragma GCC unroll 4
  for (int64_t step = 0; step < steps; step++) {
    vec columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) columns[v] = load(b + step * b_step + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      const vec factor = splat(Transposed ? a.data[step * a.stride + r] : a.data[r * a.stride + step]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; v++) total[r][v] += factor * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) store(c + r * c_row + v * kLanes, total[r][v]);
}

// `count` tiles below one another.
template <int Rows, int Vectors, bool Transposed, bool Add>
static void tiles(int64_t count, Operand a, const float* b, int64_t b_step, int64_t steps, float* c, int64_t c_row) {
  for (; count > 0; count--) {
    tile<Rows, Vectors, Transposed, Add>(a, b, b_step, steps, c, c_row);
    a.data += Rows * (Transposed ? 1 : a.stride);
    c += Rows * c_row;
  }
}

template <int Vectors, bool Transposed, bool Add>
static inline void tiles_of(int64_t rows, int64_t count, Operand a, const float* b, int64_t b_step, int64_t steps, float* c,
                            int64_t c_row) {
  switch (rows) {
    case 1: return tiles<1, Vectors, Transposed, Add>(count, a, b, b_step, steps, c, c_row);
    case 2: return tiles<2, Vectors, Transposed, Add>(count, a, b, b_step, steps, c, c_row);
    case 3: return tiles<3, Vectors, Transposed, Add>(count, a, b, b_step, steps, c, c_row);
    case 4: return tiles<4, Vectors, Transposed, Add>(count, a, b, b_step, steps, c, c_row);
    case 5: return tiles<5, Vectors, Transposed, Add>(count, a, b, b_step, steps, c, c_row);
    case 6: return tiles<6, Vectors, Transposed, Add>(count, a, b, b_step, steps, c, c_row);
  }
}

// Rows are shared out evenly over tiles: 7 rows are 4 and 3.
template <int Vectors, bool Transposed, bool Add>
static void all_tiles(int64_t rows, Operand a, const float* b, int64_t b_step, int64_t steps, float* c, int64_t c_row) {
  if (rows <= kTileRows) return tiles_of<Vectors, Transposed, Add>(rows, 1, a, b, b_step, steps, c, c_row);
  // 32 bits: a division of 64 takes as long as several steps of a tile.
  const int32_t count = divided_up(rows, kTileRows), least = static_cast<int32_t>(rows) / count, more = rows - least * count;
  if (more) tiles_of<Vectors, Transposed, Add>(least + 1, more, a, b, b_step, steps, c, c_row);
  const int64_t done = more * (least + 1);
  a.data += done * (Transposed ? 1 : a.stride);
  tiles_of<Vectors, Transposed, Add>(least, count - more, a, b, b_step, steps, c + done * c_row, c_row);
}

// c[rows, vectors] = (c +) a[rows, steps] b[steps, vectors], at most one panel wide: vectors <= 4 (2 with AVX2), rows > 0.
template <bool Transposed, bool Add>
static void multiply_panel(int64_t rows, int64_t vectors, Operand a, const float* b, int64_t b_step, int64_t steps, float* c,
                           int64_t c_row) {
  if (vectors == kTileVectors) return all_tiles<kTileVectors, Transposed, Add>(rows, a, b, b_step, steps, c, c_row);
  if (vectors == 1) return all_tiles<1, Transposed, Add>(rows, a, b, b_step, steps, c, c_row);
  if (kTileVectors > 2 && vectors == 2) return all_tiles<2, Transposed, Add>(rows, a, b, b_step, steps, c, c_row);
  if (kTileVectors > 3 && vectors == 3) return all_tiles<3, Transposed, Add>(rows, a, b, b_step, steps, c, c_row);
}

// Rows of the next tile where `rest` rows are left.
static inline int64_t tile_rows(int64_t rest) {
  const int32_t tiles = divided_up(rest, kTileRows);
  return (static_cast<int32_t>(rest) + tiles - 1) / tiles;
}

// Rows of one head lie far apart, where the processor's own prefetching sees no pattern: what is read or written soon is asked
// for.
template <bool Write = false>
static inline void fetch_row(const float* row, int64_t width) {
  for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(row + i, Write);
}
template <bool Write = false>
static inline void fetch_rows(const float* from, int64_t row, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++) fetch_row<Write>(from + r * row, width);
}
constexpr int64_t kAhead = 16;  // rows

// `rows` rows of `width` values (a multiple of 16) times `factor`, contiguous; fetches what stands `ahead` rows further.
static inline void pack_rows(const float* from, int64_t row, int64_t rows, int64_t width, float factor, float* to,
                             int64_t ahead = kAhead) {
  for (int64_t r = 0; r < rows; r++) {
    fetch_row(from + (r + ahead) * row, width);
    for (int64_t i = 0; i < width; i += kLanes) store(to + r * width + i, load(from + r * row + i) * splat(factor));
  }
}

// Of rows r and r + Half: lanes whose bit `Half` is clear stay in the first and move up from the second, and the reverse.
template <int Half>
static inline void exchange(vec* rows) {
  ivec first_lanes, second_lanes;
  for (int i = 0; i < kLanes; i++) {
    first_lanes[i] = i & Half ? kLanes + i - Half : i;
    second_lanes[i] = i & Half ? kLanes + i : i + Half;
  }
  for (int r = 0; r < kLanes; r++)
    if (!(r & Half)) {
      const vec first = rows[r], second = rows[r + Half];
      rows[r] = shuffled(first, second, first_lanes);
      rows[r + Half] = shuffled(first, second, second_lanes);
    }
}

// A square of kLanes rows: row i holds what was column i.
static inline void transpose(vec* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
  if constexpr (kLanes > 4) exchange<4>(rows);
  if constexpr (kLanes > 8) exchange<8>(rows);
}

// Rows become columns, in panels: to[panel][width][kPanel]. `row_at(i)` is where row i lies, for rows `first` (a multiple of
// kLanes) to `last`. Columns beyond are zero up to a whole vector.
template <class RowAt>
static inline void pack_transposed(RowAt&& row_at, int64_t first, int64_t last, int64_t width, float* to) {
  for (; first < last; first += kLanes) {
    float* target = to + first / kPanel * kPanel * width + first % kPanel;
    const float* rows[kLanes];
    const int64_t count = smaller(kLanes, last - first);
    for (int r = 0; r < count; r++) rows[r] = row_at(first + r);
    for (int64_t r = first + kAhead; r < smaller(last, first + kAhead + kLanes); r++) fetch_row(row_at(r), width);
    for (int64_t column = 0; column < width; column += kLanes) {
      vec block[kLanes];
      for (int r = 0; r < kLanes; r++) block[r] = r < count ? load(rows[r] + column) : vec{};
      transpose(block);
      for (int i = 0; i < kLanes; i++) store(target + (column + i) * kPanel, block[i]);
    }
  }
}

}  // namespace STEP_ISA
}  // namespace step
