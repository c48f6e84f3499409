// Attention within packed segments, without the matrix of scores in memory: a block of queries against a chunk of keys at a time,
// with the softmax carried on from chunk to chunk (FlashAttention). A unit of work is a segment's key-value head with all query
// heads that share it, so keys and values are packed once, and the backward pass needs no atomic sum. A unit's arithmetic depends
// on its own length alone: neither neighbours nor threads change a bit.
#include <cmath>

#include "attention.h"
#include "gemm_tile.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

// Queries of a block and keys of a chunk: a block's scores (120 KB at most) stay in the second-level cache. The result depends on
// kChunk, where the running softmax is rescaled, and, in the backward pass, on the block.
constexpr int64_t kBlock = 48, kChunk = 576;
// Scores are in units of log2, by a factor of the queries: a weight is a power of two, which takes less than one of e.
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
// Rows of the right operand that stay in the first-level cache while the tiles of a block pass.
constexpr int64_t kDepth = 64;

// One (segment, key-value head).
struct Unit {
  const AttentionProblem& problem;
  int64_t start, length, keys, kv_head, group;
  Unit(const AttentionProblem& of, int64_t index)
      : problem(of),
        start(of.cu_seqlens[index / of.kv_heads]),
        length(of.cu_seqlens[index / of.kv_heads + 1] - start),
        keys(of.valid ? of.valid[index / of.kv_heads] : length),
        kv_head(index % of.kv_heads),
        group(of.heads / of.kv_heads) {}
  // Queries of a block: evenly shared out where the segment is short, in whole tiles.
  int64_t block() const {
    const int64_t blocks = larger(1, divided_up(length, kBlock));
    return length > kChunk ? kBlock : divided_up(divided_up(length, blocks), kTileRows) * kTileRows;
  }
  int64_t chunk(int64_t first_key) const { return smaller(kChunk, keys - first_key); }
  // First query that sees a key at or after `first_key` (which begins a chunk, and so a block).
  int64_t first_query(int64_t first_key) const { return problem.causal ? first_key : 0; }
  // How many of a chunk's keys the queries before `end_query` see.
  int64_t seen(int64_t first_key, int64_t end_query) const {
    return problem.causal ? smaller(chunk(first_key), end_query - first_key) : chunk(first_key);
  }
};

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
static inline void for_rows(const Unit& unit, int64_t first_key, int64_t last_key, int64_t query, int64_t rows, Body&& body) {
  const bool cut = unit.seen(first_key, query + 1) < last_key;
  for (int64_t row = 0; row < rows;) {
    const int64_t count = cut ? tile_rows(rows - row) : rows;
    body(row, count);
    row += count;
  }
}

// scores[rows, keys] = a[rows, dim] packed[dim, keys] for the keys that each tile of queries sees, up to a whole vector.
static void score_block(const Unit& unit, int64_t first_key, int64_t query, int64_t rows, const float* a, const float* packed,
                        float* scores, int64_t ld) {
  const int64_t dim = unit.problem.dim, most = unit.seen(first_key, query + rows);
  for (int64_t key = 0; key < most; key += kPanel)
    for_rows(unit, first_key, smaller(most, key + kPanel), query, rows, [&](int64_t row, int64_t count) {
      const int64_t keys = unit.seen(first_key, query + row + count) - key;
      if (keys <= 0) return;
      const int64_t vectors = smaller(kTileVectors, divided_up(keys, kLanes));
      float* c = scores + row * ld + key;
      multiply_panel<false, false>(count, vectors, {a + row * dim, dim}, packed + key * dim, kPanel, dim, c, ld);
    });
}

// c[rows, dim] (+)= weights[rows, keys] b[keys, dim] for the keys that each tile of queries sees.
static void weigh_block(const Unit& unit, int64_t first_key, int64_t query, int64_t rows, const float* weights, int64_t ld,
                        const float* b, float* c, bool add) {
  const int64_t dim = unit.problem.dim, most = unit.seen(first_key, query + rows);
  for (int64_t key = 0; key < most; key += kDepth)
    for_rows(unit, first_key, smaller(most, key + kDepth), query, rows, [&](int64_t row, int64_t count) {
      const int64_t keys = smaller(kDepth, unit.seen(first_key, query + row + count) - key);
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

// Scores of a block become weights. `top` and `total` are the largest score and the sum of weights of each row so far; what was
// summed up under a smaller largest score shrinks.
static void soften(const Unit& unit, int64_t first_key, int64_t first_query, int64_t rows, float* scores, int64_t ld, float* sums,
                   float* top, float* total) {
  const int64_t dim = unit.problem.dim;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t seen = unit.seen(first_key, first_query + row + 1);
    const float highest = row_maximum(scores + row * ld, seen), before = first_key ? top[row] : -INFINITY;
    // Not the larger of both where a score is NaN: it has to reach the output.
    top[row] = before > highest ? before : highest;
    const float weights = exponentiate(scores + row * ld, seen, top[row]);
    if (unit.problem.causal) clear_after(scores + row * ld, seen);
    if (first_key) {
      const float shrink = power_of_two(splat(before - top[row]))[0];
      multiply_row(sums + row * dim, dim, shrink, sums + row * dim);
      total[row] = total[row] * shrink + weights;
    } else {
      total[row] = weights;
    }
  }
}

static int64_t packed_floats(int64_t longest, int64_t dim) { return divided_up(longest, kPanel) * kPanel * dim; }

static int64_t forward_scratch(int64_t longest, int64_t dim) {
  return 2 * packed_floats(longest, dim) + kBlock * (score_row(longest) + 2 * dim);
}

static void forward_unit(const Unit& unit, float* out, float* lse, float* scratch, int64_t longest) {
  const AttentionProblem& problem = unit.problem;
  const int64_t dim = problem.dim, ld = score_row(longest), room = packed_floats(unit.keys, dim), block = unit.block();
  float *packed_key = scratch, *packed_value = packed_key + room, *scores = packed_value + room, *queries = scores + kBlock * ld;
  float* sums = queries + kBlock * dim;
  // The softmax of each row so far: its largest score and the sum of its weights.
  float top[kBlock], total[kBlock];
  pack_transposed(problem.key.at(unit.start, unit.kv_head), problem.key.token, unit.keys, dim, packed_key);
  pack_rows(problem.value.at(unit.start, unit.kv_head), problem.value.token, unit.keys, dim, 1.0f, packed_value);
  for (int64_t head = unit.kv_head * unit.group; head < (unit.kv_head + 1) * unit.group; head++)
    for (int64_t query = 0; query < unit.length; query += block) {
      const int64_t rows = smaller(block, unit.length - query), row0 = unit.start + query;
      pack_rows(problem.query.at(row0, head), problem.query.token, rows, dim, problem.scale * kLog2E, queries);
      for (int64_t first_key = 0; first_key < unit.keys && unit.seen(first_key, query + 1) > 0; first_key += kChunk) {
        score_block(unit, first_key, query, rows, queries, packed_key + first_key * dim, scores, ld);
        soften(unit, first_key, query, rows, scores, ld, sums, top, total);
        weigh_block(unit, first_key, query, rows, scores, ld, packed_value + first_key * dim, sums, first_key > 0);
      }
      for (int64_t row = 0; row < rows; row++) {
        const int64_t index = (row0 + row) * problem.heads + head;
        multiply_row(sums + row * dim, dim, 1.0f / total[row], out + index * dim);
        lse[index] = kLn2 * top[row] + std::log(total[row]);
      }
    }
}

// From a row's scores and the products of grad_out and value: its weights, and the gradient of its scores.
static inline void differentiate(float* scores, float* products, int64_t count, float shift, float delta) {
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + kLanes <= count; i += kLanes) {
    const vec weight = power_of_two(load(scores + i) - splat(shift));
    store(scores + i, weight);
    store(products + i, weight * (load(products + i) - splat(delta)));
  }
  if (i < count) {
    const vec weight = power_of_two(load(scores + i) - splat(shift));
    store(scores + i, first_lanes(weight, count - i, vec{}));
    store(products + i, first_lanes(weight * (load(products + i) - splat(delta)), count - i, vec{}));
  }
}

static inline float dot(const float* a, const float* b, int64_t width) {
  vec total{};
  for (int64_t i = 0; i < width; i += kLanes) total += load(a + i) * load(b + i);
  return sum(total);
}

// A block's scores and products become weights and gradients of scores.
static void differentiate_block(const Unit& unit, const AttentionGradients& gradients, int64_t first_key, int64_t query,
                                int64_t rows, int64_t head, const float* grads, float* scores, float* products, int64_t ld) {
  const int64_t dim = unit.problem.dim;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = unit.start + query + row, index = token * unit.problem.heads + head;
    float delta = dot(grads + row * dim, gradients.out.at(token, head), dim);
    if (gradients.grad_lse) delta -= gradients.grad_lse[index];
    const int64_t seen = unit.seen(first_key, query + row + 1);
    differentiate(scores + row * ld, products + row * ld, seen, gradients.lse[index] * kLog2E, delta);
    if (!unit.problem.causal) continue;
    clear_after(scores + row * ld, seen);
    clear_after(products + row * ld, seen);
  }
}

// grad[keys, dim] += the transpose of a block's `weights[rows, keys]` times b[rows, dim]. The rows of the result are keys, the
// inner dimension is the queries that see them.
static void accumulate(const Unit& unit, int64_t first_key, int64_t query, int64_t rows, const float* weights, int64_t ld,
                       const float* b, float* grad) {
  const int64_t dim = unit.problem.dim, seen = unit.seen(first_key, query + rows), by_all = unit.seen(first_key, query + 1);
  multiply<true>(by_all, {weights, ld}, b, dim, rows, grad, true);
  for (int64_t key = by_all; key < seen;) {
    const int64_t count = tile_rows(seen - key), from = first_key + key - query;
    multiply<true>(count, {weights + from * ld + key, ld}, b + from * dim, dim, rows - from, grad + key * dim, true);
    key += count;
  }
}

static int64_t backward_scratch(int64_t longest, int64_t dim) {
  return 5 * packed_floats(smaller(kChunk, longest), dim) + kBlock * (2 * score_row(longest) + 3 * dim);
}

static void backward_unit(const Unit& unit, const AttentionGradients& gradients, float* scratch, int64_t longest) {
  const AttentionProblem& problem = unit.problem;
  const int64_t dim = problem.dim, ld = score_row(longest), block = unit.block(), token_row = problem.heads * dim;
  const int64_t room = packed_floats(smaller(kChunk, longest), dim);
  float *columns_key = scratch, *columns_value = columns_key + room, *rows_key = columns_value + room;
  float *grad_key = rows_key + room, *grad_value = grad_key + room, *scores = grad_value + room, *products = scores + kBlock * ld;
  float *queries = products + kBlock * ld, *grads = queries + kBlock * dim, *grad_query = grads + kBlock * dim;
  for (int64_t first_key = 0; first_key < unit.keys; first_key += kChunk) {
    const int64_t chunk = unit.chunk(first_key), token = unit.start + first_key;
    const float* key = problem.key.at(token, unit.kv_head);
    pack_transposed(key, problem.key.token, chunk, dim, columns_key);
    pack_rows(key, problem.key.token, chunk, dim, problem.scale, rows_key);
    pack_transposed(problem.value.at(token, unit.kv_head), problem.value.token, chunk, dim, columns_value);
    std::memset(grad_key, 0, sizeof(float) * chunk * dim);
    std::memset(grad_value, 0, sizeof(float) * chunk * dim);
    for (int64_t head = unit.kv_head * unit.group; head < (unit.kv_head + 1) * unit.group; head++)
      for (int64_t query = unit.first_query(first_key); query < unit.length; query += block) {
        const int64_t rows = smaller(block, unit.length - query), row0 = unit.start + query;
        pack_rows(problem.query.at(row0, head), problem.query.token, rows, dim, problem.scale * kLog2E, queries);
        pack_rows(gradients.grad_out.at(row0, head), gradients.grad_out.token, rows, dim, 1.0f, grads);
        score_block(unit, first_key, query, rows, queries, columns_key, scores, ld);
        score_block(unit, first_key, query, rows, grads, columns_value, products, ld);
        differentiate_block(unit, gradients, first_key, query, rows, head, grads, scores, products, ld);
        float* to = gradients.query + (row0 * problem.heads + head) * dim;
        if (first_key) pack_rows(to, token_row, rows, dim, 1.0f, grad_query);
        weigh_block(unit, first_key, query, rows, products, ld, rows_key, grad_query, first_key > 0);
        for (int64_t row = 0; row < rows; row++) std::memcpy(to + row * token_row, grad_query + row * dim, sizeof(float) * dim);
        accumulate(unit, first_key, query, rows, products, ld, queries, grad_key);
        accumulate(unit, first_key, query, rows, scores, ld, grads, grad_value);
      }
    for (int64_t row = 0; row < chunk; row++) {
      const int64_t index = ((token + row) * problem.kv_heads + unit.kv_head) * dim;
      multiply_row(grad_key + row * dim, dim, kLn2, gradients.key + index);  // the queries were in units of log2
      std::memcpy(gradients.value + index, grad_value + row * dim, sizeof(float) * dim);
    }
  }
  for (int64_t row = unit.keys; row < unit.length; row++) {
    const int64_t index = ((unit.start + row) * problem.kv_heads + unit.kv_head) * dim;
    std::memset(gradients.key + index, 0, sizeof(float) * dim);
    std::memset(gradients.value + index, 0, sizeof(float) * dim);
  }
}

// Threads take the next unit of `order` (segments, longest first) until none is left.
template <class Body>
static void for_units(const AttentionProblem& problem, const int32_t* order, int64_t scratch_floats, Body&& body) {
  const int64_t units = problem.segments * problem.kv_heads;
  int64_t next = 0;
  parallel_for(smaller(units, thread_count()), 1, [&](int64_t, int64_t) {
    float* scratch = thread_scratch(scratch_floats);
    while (true) {
      const int64_t taken = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (taken >= units) return;
      body(Unit(problem, order[taken / problem.kv_heads] * problem.kv_heads + taken % problem.kv_heads), scratch);
    }
  });
}

static int64_t longest_segment(const AttentionProblem& problem, const int32_t* order) {
  return problem.segments ? problem.cu_seqlens[order[0] + 1] - problem.cu_seqlens[order[0]] : 0;
}

void attention_forward(const AttentionProblem& problem, const int32_t* order, float* out, float* lse) {
  const int64_t longest = longest_segment(problem, order);
  for_units(problem, order, forward_scratch(longest, problem.dim),
            [&](const Unit& unit, float* scratch) { forward_unit(unit, out, lse, scratch, longest); });
}

void attention_backward(const AttentionProblem& problem, const int32_t* order, const AttentionGradients& gradients) {
  const int64_t longest = longest_segment(problem, order);
  for_units(problem, order, backward_scratch(longest, problem.dim),
            [&](const Unit& unit, float* scratch) { backward_unit(unit, gradients, scratch, longest); });
}

}  // namespace STEP_ISA
}  // namespace step
