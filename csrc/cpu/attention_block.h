// Attention of a block of queries to packed keys and values, without the matrix of scores in memory: a chunk of keys at a time,
// with the softmax carried on from chunk to chunk (FlashAttention). A row's arithmetic depends on the keys that it sees alone.
#pragma once

#include <cmath>

#include "gemm_tile.h"

namespace step {
namespace STEP_ISA {

// Queries of a block and keys of a chunk: a block's scores (120 KB at most) stay in the second-level cache. The result depends on
// kChunk, where the running softmax is rescaled, and, in the backward pass, on the block.
constexpr int64_t kBlock = 48, kChunk = 576;
// Scores are in units of log2, by a factor of the queries: a weight is a power of two, which takes less than one of e.
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
// Rows of the right operand that stay in the first-level cache while the tiles of a block pass.
constexpr int64_t kDepth = 64;

// Which keys the queries see: all, or, where the mask is causal, query i the first `before` + i + 1.
struct Extent {
  int64_t dim, keys, before;
  bool causal;
  int64_t chunk(int64_t first_key) const { return smaller(kChunk, keys - first_key); }
  // How many of a chunk's keys the queries before `end_query` see.
  int64_t seen(int64_t first_key, int64_t end_query) const {
    const int64_t most = chunk(first_key);
    return causal ? larger(0, smaller(most, before + end_query - first_key)) : most;
  }
};

// Queries of a block out of `queries`: evenly shared out, in whole tiles.
static inline int64_t block_of(int64_t queries) {
  return divided_up(divided_up(queries, larger(1, divided_up(queries, kBlock))), kTileRows) * kTileRows;
}

// Distance between rows of scores: an odd number of cache lines, so that columns spread over all sets of the cache, and room to
// round a row's keys up to a vector and then to the next tile of keys.
static int64_t score_row(int64_t longest) { return (divided_up(smaller(kChunk, longest), 16) / 2 * 2 + 3) * 16; }

// c[rows, dim] (+)= a[rows, steps] b[steps, dim]; b and c contiguous.
template <bool Transposed>
static void multiply(int64_t rows, Operand a, const float* b, int64_t dim, int64_t steps, float* c, bool add) {
  for (int64_t column = 0; column < dim; column += kPanel) {
    const int64_t vectors = smaller(kPanel, dim - column) / kLanes;
    if (add)
      multiply_panel<Transposed, true>(rows, vectors, a, b + column, dim, steps, c + column, dim);
    else
      multiply_panel<Transposed, false>(rows, vectors, a, b + column, dim, steps, c + column, dim);
  }
}

// Call `body(row, rows)` for a block's rows: all at once where they all see the chunk's keys up to `last_key`, tile by tile where
// the mask cuts them.
template <class Body>
static inline void for_rows(const Extent& extent, int64_t first_key, int64_t last_key, int64_t query, int64_t rows, Body&& body) {
  const bool cut = extent.seen(first_key, query + 1) < last_key;
  for (int64_t row = 0; row < rows;) {
    const int64_t count = cut ? tile_rows(rows - row) : rows;
    body(row, count);
    row += count;
  }
}

// scores[rows, keys] = a[rows, dim] packed[dim, keys] for the keys that each tile of queries sees, up to a whole vector.
static void score_block(const Extent& extent, int64_t first_key, int64_t query, int64_t rows, const float* a, const float* packed,
                        float* scores, int64_t ld) {
  const int64_t dim = extent.dim, most = extent.seen(first_key, query + rows);
  for (int64_t key = 0; key < most; key += kPanel)
    for_rows(extent, first_key, smaller(most, key + kPanel), query, rows, [&](int64_t row, int64_t count) {
      const int64_t keys = extent.seen(first_key, query + row + count) - key;
      if (keys <= 0) return;
      const int64_t vectors = smaller(kTileVectors, divided_up(keys, kLanes));
      float* c = scores + row * ld + key;
      multiply_panel<false, false>(count, vectors, {a + row * dim, dim}, packed + key * dim, kPanel, dim, c, ld);
    });
}

// c[rows, dim] (+)= weights[rows, keys] b[keys, dim] for the keys that each tile of queries sees.
static void weigh_block(const Extent& extent, int64_t first_key, int64_t query, int64_t rows, const float* weights, int64_t ld,
                        const float* b, float* c, bool add) {
  const int64_t dim = extent.dim, most = extent.seen(first_key, query + rows);
  for (int64_t key = 0; key < most; key += kDepth)
    for_rows(extent, first_key, smaller(most, key + kDepth), query, rows, [&](int64_t row, int64_t count) {
      const int64_t keys = smaller(kDepth, extent.seen(first_key, query + row + count) - key);
      const Operand a{weights + row * ld + key, ld};
      if (keys > 0) multiply<false>(count, a, b + key * dim, dim, keys, c + row * dim, add || key > 0);
    });
}

static inline ivec lane_numbers() {
  ivec lanes;
  for (int i = 0; i < kLanes; i++) lanes[i] = i;
  return lanes;
}
static inline vec first_lanes(vec value, int64_t count, vec others) {
  return lane_numbers() < static_cast<int32_t>(count) ? value : others;
}

static inline float row_maximum(const float* row, int64_t count) {
  vec even = splat(-INFINITY), odd = even;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    even = maximum(even, load(row + i));
    odd = maximum(odd, load(row + i + kLanes));
  }
  for (; i < count; i += kLanes) even = maximum(even, first_lanes(load(row + i), count - i, splat(-INFINITY)));
  return maximum(maximum(even, odd));
}

// The next keys, which other rows of the same tile see, count as zero for this one; whole vectors.
static inline void clear_after(float* row, int64_t count) {
  for (int64_t i = divided_up(count, kLanes) * kLanes; i < count + kTileRows; i += kLanes) store(row + i, vec{});
}

// row = 2^(row - shift) for the first `count` values; returns their sum.
static inline float exponentiate(float* row, int64_t count, float shift) {
  vec total{}, other{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const vec weight = power_of_two(load(row + i) - splat(shift)), next = power_of_two(load(row + i + kLanes) - splat(shift));
    store(row + i, weight);
    store(row + i + kLanes, next);
    total += weight;
    other += next;
  }
  for (; i < count; i += kLanes) {
    const vec weight = first_lanes(power_of_two(load(row + i) - splat(shift)), count - i, vec{});
    store(row + i, weight);
    total += weight;
  }
  return sum(total + other);
}

static inline void multiply_row(const float* row, int64_t width, float factor, float* to) {
  for (int64_t i = 0; i < width; i += kLanes) store(to + i, load(row + i) * splat(factor));
}

// Memory for one block, and what it holds after `attend`: unnormalised sums of values, the largest score and the sum of weights
// of each row.
struct BlockMemory {
  float *scores, *queries, *sums, *part;
  int64_t ld;
  float top[kBlock], total[kBlock], shrink[kBlock];
  static int64_t floats(int64_t keys, int64_t dim) { return kBlock * (score_row(keys) + 3 * dim); }
  BlockMemory(float* scratch, int64_t keys, int64_t dim)
      : scores(scratch), queries(scores + kBlock * score_row(keys)), sums(queries + kBlock * dim), part(sums + kBlock * dim),
        ld(score_row(keys)) {}
};

// Scores of a block become weights; largest scores and sums of weights are carried on, and what was summed up under a smaller
// largest score shrinks.
static void soften(const Extent& extent, int64_t first_key, int64_t first_query, int64_t rows, BlockMemory& memory) {
  for (int64_t row = 0; row < rows; row++) {
    float *scores = memory.scores + row * memory.ld, &top = memory.top[row], &total = memory.total[row];
    const int64_t seen = extent.seen(first_key, first_query + row + 1);
    if (seen) {
      const float highest = row_maximum(scores, seen), before = first_key ? top : -INFINITY;
      // Not the larger of both where a score is NaN: it has to reach the output.
      top = before > highest ? before : highest;
      const float weights = exponentiate(scores, seen, top);
      memory.shrink[row] = power_of_two(splat(before - top))[0];
      total = first_key ? total * memory.shrink[row] + weights : weights;
    }
    if (extent.causal) clear_after(scores, seen);
  }
}

// Floats that `rows` keys or values take when they are packed.
static inline int64_t packed_floats(int64_t rows, int64_t dim) { return divided_up(rows, kPanel) * kPanel * dim; }

// `memory.queries` hold the block's queries, times scale and kLog2E. Every query sees at least one key.
static void attend(const Extent& extent, int64_t query, int64_t rows, const float* packed_key, const float* packed_value,
                   BlockMemory& memory) {
  const int64_t dim = extent.dim;
  for (int64_t key = 0; key < extent.keys && extent.seen(key, query + rows) > 0; key += kChunk) {
    score_block(extent, key, query, rows, memory.queries, packed_key + key * dim, memory.scores, memory.ld);
    soften(extent, key, query, rows, memory);
    // A chunk's values are summed up alone: one sum over all keys would lose more bits the longer it gets.
    float* target = key ? memory.part : memory.sums;
    weigh_block(extent, key, query, rows, memory.scores, memory.ld, packed_value + key * dim, target, false);
    for (int64_t row = 0; key && row < rows; row++)
      if (extent.seen(key, query + row + 1))
        for (int64_t i = row * dim; i < (row + 1) * dim; i += kLanes)
          store(memory.sums + i, load(memory.sums + i) * splat(memory.shrink[row]) + load(memory.part + i));
  }
}

}  // namespace STEP_ISA
}  // namespace step
