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

// Queries of a block and keys of a chunk: a block's scores (96 KB at most) stay in the second-level cache. The result depends on
// kChunk, where the running softmax is rescaled, and, in the backward pass, on kBlock.
constexpr int64_t kBlock = 48, kChunk = 576;
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

// c[rows, dim] (+)= a[rows, steps] b[steps, dim]; b contiguous.
static void multiply(int64_t rows, Operand a, const float* b, int64_t dim, int64_t steps, float* c, int64_t c_row, bool add) {
  for (int64_t column = 0; column < dim; column += kPanel) {
    const int64_t vectors = smaller(kPanel, dim - column) / kLanes;
    if (add)
      multiply_tile<true>(rows, vectors, a, b + column, dim, steps, c + column, c_row);
    else
      multiply_tile<false>(rows, vectors, a, b + column, dim, steps, c + column, c_row);
  }
}

// Call `body(row, rows)` for each tile of a block's rows.
template <class Body>
static inline void for_tiles(int64_t rows, Body&& body) {
  for (int64_t row = 0; row < rows;) {
    const int64_t count = tile_rows(rows - row);
    body(row, count);
    row += count;
  }
}

// scores[rows, keys] = a[rows, dim] packed[dim, keys] for the keys that each tile of queries sees, up to a whole vector.
static void score_block(const Unit& unit, int64_t first_key, int64_t first_query, int64_t rows, const float* a, const float* packed,
                        float* scores, int64_t ld) {
  const int64_t dim = unit.problem.dim, most = unit.seen(first_key, first_query + rows);
  for (int64_t key = 0; key < most; key += kPanel)
    for_tiles(rows, [&](int64_t row, int64_t count) {
      const int64_t keys = unit.seen(first_key, first_query + row + count) - key;
      if (keys > 0)
        multiply_tile<false>(count, smaller(kTileVectors, divided_up(keys, kLanes)), {a + row * dim, dim, 1}, packed + key * dim, kPanel,
                             dim, scores + row * ld + key, ld);
    });
}

// c[rows, dim] (+)= weights[rows, keys] b[keys, dim] for the keys that each tile of queries sees.
static void weigh_block(const Unit& unit, int64_t first_key, int64_t first_query, int64_t rows, const float* weights, int64_t ld,
                        const float* b, float* c, int64_t c_row, bool add) {
  const int64_t dim = unit.problem.dim, most = unit.seen(first_key, first_query + rows);
  for (int64_t key = 0; key < most; key += kDepth)
    for_tiles(rows, [&](int64_t row, int64_t count) {
      const int64_t keys = smaller(kDepth, unit.seen(first_key, first_query + row + count) - key);
      if (keys > 0)
        multiply(count, {weights + row * ld + key, ld, 1}, b + key * dim, dim, keys, c + row * c_row, c_row, add || key > 0);
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

// row = exp(row - shift) for the first `count` values; returns their sum.
static inline float exponentiate(float* row, int64_t count, float shift) {
  vec total{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vec weight = exponential(load(row + i) - splat(shift));
    store(row + i, weight);
    total += weight;
  }
  if (i < count) {
    const vec weight = first_lanes(exponential(load(row + i) - splat(shift)), count - i, vec{});
    store(row + i, weight);
    total += weight;
  }
  clear_after(row, count);
  return sum(total);
}

static inline void multiply_row(float* row, int64_t width, float factor) {
  for (int64_t i = 0; i < width; i += kLanes) store(row + i, load(row + i) * splat(factor));
}

static int64_t forward_scratch(int64_t longest, int64_t dim, int64_t group) {
  const int64_t room = divided_up(smaller(kChunk, longest), kPanel) * kPanel * dim;
  return 2 * room + kBlock * (score_row(longest) + dim) + 2 * group * longest;
}

static void forward_unit(const Unit& unit, float* out, float* lse, float* scratch, int64_t longest) {
  const AttentionProblem& problem = unit.problem;
  const int64_t dim = problem.dim, ld = score_row(longest), room = divided_up(smaller(kChunk, longest), kPanel) * kPanel * dim;
  float *packed_key = scratch, *packed_value = packed_key + room, *scores = packed_value + room, *queries = scores + kBlock * ld;
  // The softmax so far of each row: its maximum and its sum, two values a row and head of the group.
  float* running = queries + kBlock * dim;
  for (int64_t first_key = 0; first_key < unit.keys; first_key += kChunk) {
    const int64_t chunk = unit.chunk(first_key), token = unit.start + first_key;
    pack_transposed(problem.key.at(token, unit.kv_head), problem.key.token, chunk, dim, packed_key);
    pack_rows(problem.value.at(token, unit.kv_head), problem.value.token, chunk, dim, 1.0f, packed_value);
    for (int64_t member = 0; member < unit.group; member++) {
      const int64_t head = unit.kv_head * unit.group + member, c_row = problem.heads * dim;
      for (int64_t query = unit.first_query(first_key); query < unit.length; query += kBlock) {
        const int64_t rows = smaller(kBlock, unit.length - query), row0 = unit.start + query;
        float* target = out + (row0 * problem.heads + head) * dim;
        pack_rows(problem.query.at(row0, head), problem.query.token, rows, dim, problem.scale, queries);
        score_block(unit, first_key, query, rows, queries, packed_key, scores, ld);
        const bool last = problem.causal ? query < first_key + chunk : first_key + chunk == unit.keys;
        for (int64_t row = 0; row < rows; row++) {
          float* state = running + 2 * (member * unit.length + query + row);
          const int64_t seen = unit.seen(first_key, query + row + 1);
          const float highest = row_maximum(scores + row * ld, seen), before = first_key ? state[0] : -INFINITY;
          // Not the larger of both where a score is NaN: it has to reach the output.
          const float top = before > highest ? before : highest;
          const float total = exponentiate(scores + row * ld, seen, top);
          if (first_key) {
            const float shrink = std::exp(before - top);
            multiply_row(target + row * c_row, dim, shrink);
            state[1] = state[1] * shrink + total;
          } else {
            state[1] = total;
          }
          state[0] = top;
        }
        weigh_block(unit, first_key, query, rows, scores, ld, packed_value, target, c_row, first_key > 0);
        if (!last) continue;
        for (int64_t row = 0; row < rows; row++) {
          const float* state = running + 2 * (member * unit.length + query + row);
          multiply_row(target + row * c_row, dim, 1.0f / state[1]);
          lse[(row0 + row) * problem.heads + head] = state[0] + std::log(state[1]);
        }
      }
    }
  }
}

// From a row's scores and the products of grad_out and value: its weights, and the gradient of its scores.
static inline void differentiate(float* scores, float* products, int64_t count, float lse, float delta) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vec weight = exponential(load(scores + i) - splat(lse));
    store(scores + i, weight);
    store(products + i, weight * (load(products + i) - splat(delta)));
  }
  if (i < count) {
    const vec weight = exponential(load(scores + i) - splat(lse));
    store(scores + i, first_lanes(weight, count - i, vec{}));
    store(products + i, first_lanes(weight * (load(products + i) - splat(delta)), count - i, vec{}));
  }
  clear_after(scores, count);
  clear_after(products, count);
}

static inline float dot(const float* a, const float* b, int64_t width) {
  vec total{};
  for (int64_t i = 0; i < width; i += kLanes) total += load(a + i) * load(b + i);
  return sum(total);
}

static int64_t backward_scratch(int64_t longest, int64_t dim) {
  const int64_t room = divided_up(smaller(kChunk, longest), kPanel) * kPanel * dim;
  return 5 * room + 2 * kBlock * (score_row(longest) + dim);
}

static void backward_unit(const Unit& unit, const AttentionGradients& gradients, float* scratch, int64_t longest) {
  const AttentionProblem& problem = unit.problem;
  const int64_t dim = problem.dim, ld = score_row(longest), room = divided_up(smaller(kChunk, longest), kPanel) * kPanel * dim;
  float *columns_key = scratch, *columns_value = columns_key + room, *rows_key = columns_value + room;
  float *grad_key = rows_key + room, *grad_value = grad_key + room, *scores = grad_value + room, *products = scores + kBlock * ld;
  float *queries = products + kBlock * ld, *grads = queries + kBlock * dim;
  for (int64_t first_key = 0; first_key < unit.keys; first_key += kChunk) {
    const int64_t chunk = unit.chunk(first_key), token = unit.start + first_key;
    const float* key = problem.key.at(token, unit.kv_head);
    pack_transposed(key, problem.key.token, chunk, dim, columns_key);
    pack_rows(key, problem.key.token, chunk, dim, problem.scale, rows_key);
    pack_transposed(problem.value.at(token, unit.kv_head), problem.value.token, chunk, dim, columns_value);
    std::memset(grad_key, 0, sizeof(float) * chunk * dim);
    std::memset(grad_value, 0, sizeof(float) * chunk * dim);
    for (int64_t head = unit.kv_head * unit.group; head < (unit.kv_head + 1) * unit.group; head++)
      for (int64_t query = unit.first_query(first_key); query < unit.length; query += kBlock) {
        const int64_t rows = smaller(kBlock, unit.length - query), row0 = unit.start + query;
        pack_rows(problem.query.at(row0, head), problem.query.token, rows, dim, problem.scale, queries);
        pack_rows(gradients.grad_out.at(row0, head), gradients.grad_out.token, rows, dim, 1.0f, grads);
        score_block(unit, first_key, query, rows, queries, columns_key, scores, ld);
        score_block(unit, first_key, query, rows, grads, columns_value, products, ld);
        for (int64_t row = 0; row < rows; row++) {
          const int64_t index = (row0 + row) * problem.heads + head;
          float delta = dot(gradients.grad_out.at(row0 + row, head), gradients.out.at(row0 + row, head), dim);
          if (gradients.grad_lse) delta -= gradients.grad_lse[index];
          differentiate(scores + row * ld, products + row * ld, unit.seen(first_key, query + row + 1), gradients.lse[index], delta);
        }
        weigh_block(unit, first_key, query, rows, products, ld, rows_key, gradients.query + (row0 * problem.heads + head) * dim,
                    problem.heads * dim, first_key > 0);
        // Transposed: the rows of the result are keys, the inner dimension is the queries of the block that see them.
        for_tiles(unit.seen(first_key, query + rows), [&](int64_t row, int64_t count) {
          const int64_t from = problem.causal ? larger(0, first_key + row - query) : 0;
          const Operand by_key{products + from * ld + row, 1, ld}, by_value{scores + from * ld + row, 1, ld};
          multiply(count, by_key, queries + from * dim, dim, rows - from, grad_key + row * dim, dim, true);
          multiply(count, by_value, grads + from * dim, dim, rows - from, grad_value + row * dim, dim, true);
        });
      }
    for (int64_t row = 0; row < chunk; row++) {
      const int64_t index = ((token + row) * problem.kv_heads + unit.kv_head) * dim;
      std::memcpy(gradients.key + index, grad_key + row * dim, sizeof(float) * dim);
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
  for_units(problem, order, forward_scratch(longest, problem.dim, problem.heads / problem.kv_heads),
            [&](const Unit& unit, float* scratch) { forward_unit(unit, out, lse, scratch, longest); });
}

void attention_backward(const AttentionProblem& problem, const int32_t* order, const AttentionGradients& gradients) {
  const int64_t longest = longest_segment(problem, order);
  for_units(problem, order, backward_scratch(longest, problem.dim),
            [&](const Unit& unit, float* scratch) { backward_unit(unit, gradients, scratch, longest); });
}

}  // namespace STEP_ISA
}  // namespace step
