// Attention within packed segments. A unit of work is a segment's key-value head with all query heads that share it, so keys and
// values are packed once, and the backward pass needs no atomic sum. A unit's arithmetic depends on its own length alone: neither
// neighbours nor threads change a bit.
#include "attention.h"

#include "attention_block.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {

// One (segment, key-value head).
struct Unit : Extent {
  const AttentionProblem& problem;
  int64_t start, length, kv_head, group;
  Unit(const AttentionProblem& of, int64_t index)
      : problem(of),
        start(of.cu_seqlens[index / of.kv_heads]),
        length(of.cu_seqlens[index / of.kv_heads + 1] - start),
        kv_head(index % of.kv_heads),
        group(of.heads / of.kv_heads) {
    static_cast<Extent&>(*this) = {of.dim, of.valid ? of.valid[index / of.kv_heads] : length, 0, of.causal};
  }
  // First query that sees a key at or after `first_key`, which begins a chunk, and so a block.
  int64_t first_query(int64_t first_key) const { return causal ? first_key : 0; }
  int64_t block() const { return length > kChunk ? kBlock : block_of(length); }
};

static int64_t forward_scratch(int64_t longest, int64_t dim) {
  return 2 * packed_floats(longest, dim) + BlockMemory::floats(longest, dim);
}

static void forward_unit(const Unit& unit, float* out, float* lse, float* scratch, int64_t longest) {
  const AttentionProblem& problem = unit.problem;
  const int64_t dim = problem.dim, block = unit.block();
  float *packed_key = scratch, *packed_value = packed_key + packed_floats(longest, dim);
  BlockMemory memory(packed_value + packed_floats(longest, dim), longest, dim);
  const HeadsView &key = problem.key, &value = problem.value;
  pack_transposed([&](int64_t row) { return key.at(unit.start + row, unit.kv_head); }, 0, unit.keys, dim, packed_key);
  pack_rows(value.at(unit.start, unit.kv_head), value.token, unit.keys, dim, 1.0f, packed_value);
  for (int64_t head = unit.kv_head * unit.group; head < (unit.kv_head + 1) * unit.group; head++)
    for (int64_t query = 0; query < unit.length; query += block) {
      const int64_t rows = smaller(block, unit.length - query), row0 = unit.start + query;
      pack_rows(problem.query.at(row0, head), problem.query.token, rows, dim, problem.scale * kLog2E, memory.queries, block);
      fetch_rows<true>(out + (row0 * problem.heads + head) * dim, problem.heads * dim, rows, dim);
      attend(unit, query, rows, packed_key, packed_value, memory);
      for (int64_t row = 0; row < rows; row++) {
        const int64_t index = (row0 + row) * problem.heads + head;
        multiply_row(memory.sums + row * dim, dim, 1.0f / memory.total[row], out + index * dim);
        lse[index] = kLn2 * memory.top[row] + std::log(memory.total[row]);
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
    pack_transposed([&](int64_t row) { return problem.key.at(token + row, unit.kv_head); }, 0, chunk, dim, columns_key);
    pack_rows(problem.key.at(token, unit.kv_head), problem.key.token, chunk, dim, problem.scale, rows_key);
    pack_transposed([&](int64_t row) { return problem.value.at(token + row, unit.kv_head); }, 0, chunk, dim, columns_value);
    std::memset(grad_key, 0, sizeof(float) * chunk * dim);
    std::memset(grad_value, 0, sizeof(float) * chunk * dim);
    for (int64_t head = unit.kv_head * unit.group; head < (unit.kv_head + 1) * unit.group; head++)
      for (int64_t query = unit.first_query(first_key); query < unit.length; query += block) {
        const int64_t rows = smaller(block, unit.length - query), row0 = unit.start + query;
        pack_rows(problem.query.at(row0, head), problem.query.token, rows, dim, problem.scale * kLog2E, queries, block);
        pack_rows(gradients.grad_out.at(row0, head), gradients.grad_out.token, rows, dim, 1.0f, grads, block);
        fetch_rows(gradients.out.at(row0, head), gradients.out.token, rows, dim);
        score_block(unit, first_key, query, rows, queries, columns_key, scores, ld);
        float* to = gradients.query + (row0 * problem.heads + head) * dim;
        fetch_rows<true>(to, token_row, rows, dim);
        score_block(unit, first_key, query, rows, grads, columns_value, products, ld);
        differentiate_block(unit, gradients, first_key, query, rows, head, grads, scores, products, ld);
        if (first_key) pack_rows(to, token_row, rows, dim, 1.0f, grad_query);
        weigh_block(unit, first_key, query, rows, products, ld, rows_key, grad_query, first_key > 0);
        for (int64_t row = 0; row < rows; row++) std::memcpy(to + row * token_row, grad_query + row * dim, sizeof(float) * dim);
        accumulate(unit, first_key, query, rows, products, ld, queries, grad_key);
        accumulate(unit, first_key, query, rows, scores, ld, grads, grad_value);
      }
    const int64_t key_row = problem.kv_heads * dim;
    for (int64_t row = 0; row < chunk; row++) {
      const int64_t index = (token + row) * key_row + unit.kv_head * dim;
      fetch_row<true>(gradients.key + index + kAhead * key_row, dim);
      fetch_row<true>(gradients.value + index + kAhead * key_row, dim);
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
