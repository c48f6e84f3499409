// Attention of a few new tokens over a paged key-value cache, flash-style: keys come in blocks of 32, scores and weights of a
// block stay in cache. A task is (sequence, some key-value heads, tile of rows, split of the keys), where a row is a (new token,
// query head) pair: all query heads of a key-value head share what is read, and neighbouring heads are read together, for they
// lie together (one head alone means a new memory page for every key). Where a sequence has many new tokens, keys and values are
// packed first, as in packed attention, and a task is (sequence, key-value head or query head). How a sequence is cut depends on
// its own lengths alone, so its bits do not depend on its companions or on the number of threads.
#include <cstdlib>

#include "attention_block.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {
namespace {

constexpr int64_t kRows = 16;    // rows of a tile
constexpr int64_t kKeys = 32;    // keys of a block: more would evict each other where heads lie a memory page apart
constexpr int64_t kWidest = 256;  // largest head dimension
constexpr int64_t kMostHeads = 8;  // key-value heads of a task
constexpr int64_t kSplitKeys = 512;  // keys of a split: 32 us at 8 GB/s and dimension 64, worth waking a thread
constexpr int64_t kSplitQueries = 4;  // sequences with more new tokens have tiles enough
constexpr int64_t kPromptQueries = 16;  // so many new tokens pay for packing the keys
constexpr float kNothing = -3.0e38f;

struct Shape {
  int64_t sequences, max_pages, page_size, heads, kv_heads, dim;
  int64_t together = 1;  // key-value heads of a task
  bool alone = false;  // a task of a prompt is one query head, not all that share a key-value head
  int64_t group() const { return heads / kv_heads; }
  int64_t head_blocks() const { return (kv_heads + together - 1) / together; }
  int64_t prompt_tasks() const { return alone ? heads : kv_heads; }
};

struct Sequence {
  int64_t first, queries, length, rows, tiles, splits;
  Sequence(const int32_t* cu_seqlens, const int32_t* lengths, int64_t index, int64_t group) {
    first = cu_seqlens[index];
    queries = cu_seqlens[index + 1] - first;
    length = lengths[index];
    rows = queries * group;
    tiles = (rows + kRows - 1) / kRows;
    splits = queries <= kSplitQueries && length > kSplitKeys ? (length + kSplitKeys - 1) / kSplitKeys : 1;
  }
  int64_t units() const { return tiles * splits; }
  bool prompt() const { return queries >= kPromptQueries; }
};

// Of two vectors, each lane added to that `Step` away: lanes whose bit `Step` is clear are the first one's, the others the
// second's.
template <int Step>
inline vec folded(vec a, vec b) {
  ivec own, other;
  for (int i = 0; i < kLanes; i++) {
    own[i] = i & Step ? kLanes + i : i;
    other[i] = own[i] ^ Step;
  }
  return shuffled(a, b, own) + shuffled(a, b, other);
}

// Lane i of the result is the sum of the lanes of parts[i].
template <int Step = 1>
inline vec lane_sums(vec (&parts)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / (2 * Step); i++) parts[i] = folded<Step>(parts[2 * i], parts[2 * i + 1]);
  if constexpr (2 * Step < kLanes) return lane_sums<2 * Step>(parts);
  return parts[0];
}

// scores[row * kKeys + key] = query[row] . key, for R rows and all keys of the block; the rows of `next`, where
// there are any, are fetched meanwhile.
template <int R>
inline void score_rows(const float* query, const float* const* keys, const float* const* next, float* scores, int64_t count,
                       int64_t dim) {
  constexpr int C = kLanes / R;
  for (int64_t key = 0; key < count; key += C) {
    if (next)
      for (int c = 0; c < C; c++) fetch_row(next[key + c], dim);
    vec parts[kLanes];
    for (int i = 0; i < kLanes; i++) parts[i] = vec{};
    for (int64_t d = 0; d < dim; d += kLanes) {
      vec q[R];
      for (int r = 0; r < R; r++) q[r] = load(query + r * dim + d);
      for (int c = 0; c < C; c++) {
        vec k = load(keys[key + c] + d);
        for (int r = 0; r < R; r++) parts[r * C + c] += q[r] * k;
      }
    }
    float lanes[kLanes];
    store(lanes, lane_sums(parts));
    for (int r = 0; r < R; r++) std::memcpy(scores + r * kKeys + key, lanes + r * C, sizeof(float) * C);
  }
}

// out[row] = out[row] * decay[row] + sum over keys of weights[row][key] * value, for R rows and D vectors of the dimension from
// `d0` on; the same part of the rows of `next`, where there are any, is fetched meanwhile.
template <int R, int D>
inline void add_values(const float* weights, const float* const* values, const float* const* next, const float* decay, float* out,
                       int64_t count, int64_t dim, int64_t d0) {
  vec total[R][D];
  for (int r = 0; r < R; r++)
    for (int d = 0; d < D; d++) total[r][d] = load(out + r * dim + d0 + d * kLanes) * splat(decay[r]);
  for (int64_t key = 0; key < count; key++) {
    vec value[D];
    if (next) fetch_row(next[key] + d0, D * kLanes);
    for (int d = 0; d < D; d++) value[d] = load(values[key] + d0 + d * kLanes);
    for (int r = 0; r < R; r++) {
      vec weight = splat(weights[r * kKeys + key]);
      for (int d = 0; d < D; d++) total[r][d] += weight * value[d];
    }
  }
  for (int r = 0; r < R; r++)
    for (int d = 0; d < D; d++) store(out + r * dim + d0 + d * kLanes, total[r][d]);
}

template <int R>
inline void add_value_rows(const float* weights, const float* const* values, const float* const* next, const float* decay,
                           float* out, int64_t count, int64_t dim) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) add_values<R, 4>(weights, values, next, decay, out, count, dim, d);
  for (; d < dim; d += kLanes) add_values<R, 1>(weights, values, next, decay, out, count, dim, d);
}

// One tile over one range of keys. `out` gets weighted sums that are not yet divided by `total`.
struct Tile {
  alignas(64) float query[kRows * kWidest];
  alignas(64) float out[kRows * kWidest];
  alignas(64) float scores[kRows * kKeys];
  alignas(64) float largest[kRows], total[kRows], decay[kRows];
  int64_t visible[kRows];  // keys that the row may see
  int64_t rows, held;  // `held` counts rows of zeros too, which fill the last three up to four

  int64_t seen(int64_t row, int64_t first_key, int64_t count) const {
    return larger(0, smaller(count, visible[row] - first_key));
  }

  // Scores to weights; keeps the running maximum and total.
  void weigh(int64_t first_key, int64_t count) {
    alignas(64) float now[kRows];
    for (int64_t row = 0; row < held; row++) {
      vec top = splat(largest[row]);
      const int64_t keys = seen(row, first_key, count);
      for (int64_t key = 0; key < keys; key += kLanes)
        top = maximum(first_lanes(load(scores + row * kKeys + key), keys - key, top), top);
      now[row] = maximum(top);
    }
    for (int64_t row = 0; row < kRows; row += kLanes) {
      store(decay + row, power_of_two(load(largest + row) - load(now + row)));
      store(largest + row, load(now + row));
    }
    for (int64_t row = 0; row < held; row++) {
      float* score = scores + row * kKeys;
      const int64_t keys = seen(row, first_key, count);
      vec sums{};
      for (int64_t key = 0; key < kKeys; key += kLanes) {
        const vec weight = first_lanes(power_of_two(load(score + key) - splat(now[row])), keys - key, vec{});
        store(score + key, weight);
        sums += weight;
      }
      total[row] = total[row] * decay[row] + sum(sums);
    }
  }

  // `next`: keys of the block that comes after this one.
  void block(const float* const* keys, const float* const* values, const float* const* next, int64_t first_key, int64_t count,
             int64_t dim) {
    int64_t row = 0;
    // Values are fetched by the last rows, just before they are read: earlier, keys would evict them where heads lie 4 KB apart.
    const auto wanted = [&] { return row + 4 < held ? nullptr : values; };
    for (; row + 4 <= held; row += 4) score_rows<4>(query + row * dim, keys, wanted(), scores + row * kKeys, count, dim);
    if (held - row == 2) score_rows<2>(query + row * dim, keys, wanted(), scores + row * kKeys, count, dim);
    if (held - row == 1) score_rows<1>(query + row * dim, keys, wanted(), scores + row * kKeys, count, dim);
    weigh(first_key, count);
    row = 0;
    // As many sums as registers: 32 with AVX-512, else 16.
    if (kLanes == 16)
      for (; row + 4 <= held; row += 4)
        add_value_rows<4>(scores + row * kKeys, values, row ? nullptr : next, decay + row, out + row * dim, count, dim);
    for (; row + 2 <= held; row += 2)
      add_value_rows<2>(scores + row * kKeys, values, row ? nullptr : next, decay + row, out + row * dim, count, dim);
    if (row < held)
      add_value_rows<1>(scores + row * kKeys, values, row ? nullptr : next, decay + row, out + row * dim, count, dim);
  }
};

struct Cache {
  const float *key, *value;
  const int32_t* pages;  // of one sequence
};

// Where the tokens of a block lie in the caches.
void find_slots(const Cache& cache, const Shape& shape, int64_t first, int64_t count, int64_t* slots) {
  int64_t page = first / shape.page_size, slot = first % shape.page_size;
  for (int64_t i = 0; i < count; i++) {
    slots[i] = (cache.pages[page] * shape.page_size + slot) * shape.kv_heads * shape.dim;
    if (++slot == shape.page_size) page++, slot = 0;
  }
  // Scores come in groups of up to kLanes keys; those beyond the end are read from a key that exists, and masked.
  for (int64_t i = count; i < kKeys; i++) slots[i] = slots[0];
}

// All tiles of a task over one range of keys, block by block.
void attend_tiles(Tile* tiles, int64_t heads, const Cache& cache, const Shape& shape, int64_t first_head, int64_t begin,
                  int64_t end) {
  int64_t slots[kKeys], later[kKeys];
  const float *keys[kKeys], *values[kKeys], *next[kKeys];
  const auto size = [&](int64_t first) { return end - first < kKeys ? end - first : kKeys; };
  if (begin < end) find_slots(cache, shape, begin, size(begin), later);
  for (int64_t first = begin; first < end; first += kKeys) {
    std::memcpy(slots, later, sizeof(slots));
    const bool more = first + kKeys < end;
    if (more) find_slots(cache, shape, first + kKeys, size(first + kKeys), later);
    for (int64_t head = 0; head < heads; head++) {
      const bool last = head + 1 == heads;
      const float* key = cache.key + (first_head + head) * shape.dim;
      const float* following = cache.key + (first_head + (last ? 0 : head + 1)) * shape.dim;
      for (int64_t i = 0; i < kKeys; i++) {
        keys[i] = key + slots[i];
        values[i] = cache.value + (first_head + head) * shape.dim + slots[i];
        next[i] = following + (last ? later[i] : slots[i]);
      }
      tiles[head].block(keys, values, last && !more ? nullptr : next, first, size(first), shape.dim);
    }
  }
}

// Sums, total and maximum of each row and split of a sequence that is split: `[heads][queries][splits][dim + 2]`.
inline float* part(float* parts, const Sequence& sequence, const Shape& shape, int64_t head, int64_t query, int64_t split) {
  return parts + ((head * sequence.queries + query) * sequence.splits + split) * (shape.dim + 2);
}

// A tile of rows `first_row`.. of one key-value head, before any key.
void begin_tile(Tile& tile, const Sequence& sequence, const Shape& shape, const float* query, float scale, int64_t first_row,
                int64_t kv_head) {
  const int64_t dim = shape.dim, group = shape.group();
  tile.rows = sequence.rows - first_row < kRows ? sequence.rows - first_row : kRows;
  tile.held = tile.rows % 4 == 3 ? tile.rows + 1 : tile.rows;
  std::memset(tile.query, 0, sizeof(float) * tile.held * dim);
  std::memset(tile.out, 0, sizeof(float) * tile.held * dim);
  for (int64_t row = 0; row < kRows; row++) {
    tile.largest[row] = kNothing;
    tile.total[row] = tile.visible[row] = 0;
  }
  for (int64_t row = 0; row < tile.rows; row++) {
    const int64_t token = (first_row + row) / group, head = kv_head * group + (first_row + row) % group;
    const float* from = query + ((sequence.first + token) * shape.heads + head) * dim;
    for (int64_t d = 0; d < dim; d += kLanes) store(tile.query + row * dim + d, load(from + d) * splat(scale * kLog2E));
    tile.visible[row] = sequence.length - sequence.queries + token + 1;
  }
}

// Write a tile's rows, or leave them among the parts of a sequence that is split.
void end_tile(const Tile& tile, const Sequence& sequence, const Shape& shape, int64_t first_row, int64_t kv_head, int64_t split,
              float* out, float* parts) {
  const int64_t dim = shape.dim, group = shape.group();
  for (int64_t row = 0; row < tile.rows; row++) {
    const int64_t token = (first_row + row) / group, head = kv_head * group + (first_row + row) % group;
    const float* sums = tile.out + row * dim;
    if (sequence.splits > 1) {
      float* to = part(parts, sequence, shape, head, token, split);
      std::memcpy(to, sums, sizeof(float) * dim);
      to[dim] = tile.total[row];
      to[dim + 1] = tile.largest[row];
    } else {
      float* to = out + ((sequence.first + token) * shape.heads + head) * dim;
      for (int64_t d = 0; d < dim; d += kLanes) store(to + d, load(sums + d) * splat(1.0f / tile.total[row]));
    }
  }
}

void run_task(Tile* tiles, const Sequence& sequence, const Cache& cache, const Shape& shape, const float* query, float scale,
              int64_t task, float* out, float* parts) {
  const int64_t split = task % sequence.splits, first_row = task / sequence.splits % sequence.tiles * kRows;
  const int64_t first_head = task / sequence.units() * shape.together;
  const int64_t heads = shape.kv_heads - first_head < shape.together ? shape.kv_heads - first_head : shape.together;
  for (int64_t i = 0; i < heads; i++) begin_tile(tiles[i], sequence, shape, query, scale, first_row, first_head + i);
  const int64_t last = tiles[0].visible[tiles[0].rows - 1];
  int64_t begin = 0, end = last;
  if (sequence.splits > 1) {
    begin = split * kSplitKeys;
    end = begin + kSplitKeys < last ? begin + kSplitKeys : last;
  }
  attend_tiles(tiles, heads, cache, shape, first_head, begin, end);
  for (int64_t i = 0; i < heads; i++) end_tile(tiles[i], sequence, shape, first_row, first_head + i, split, out, parts);
}

// A sequence with many new tokens: query heads from `first_head` to `last_head`, which share a key-value head.
void run_prompt(const Sequence& sequence, const Cache& cache, const Shape& shape, const float* query, float scale,
                int64_t first_head, int64_t last_head, float* out) {
  const int64_t dim = shape.dim, room = packed_floats(sequence.length, dim), block = block_of(sequence.queries);
  const int64_t offset = first_head / shape.group() * dim, token = shape.heads * dim;
  float* packed_key = thread_scratch(2 * room + BlockMemory::floats(sequence.length, dim));
  float* packed_value = packed_key + room;
  BlockMemory memory(packed_value + room, sequence.length, dim);
  int64_t slots[kKeys], later[kKeys];
  find_slots(cache, shape, 0, smaller(kKeys, sequence.length), later);
  for (int64_t first = 0; first < sequence.length; first += kKeys) {
    const int64_t last = smaller(first + kKeys, sequence.length), rest = sequence.length - last;
    std::memcpy(slots, later, sizeof(slots));
    if (rest > 0) find_slots(cache, shape, last, smaller(kKeys, rest), later);
    for (int64_t i = 0; rest > 0 && i < kKeys; i++) {
      fetch_row(cache.key + offset + later[i], dim);
      fetch_row(cache.value + offset + later[i], dim);
    }
    pack_transposed([&](int64_t i) { return cache.key + offset + slots[i - first]; }, first, last, dim, packed_key);
    for (int64_t i = first; i < last; i++)
      std::memcpy(packed_value + i * dim, cache.value + offset + slots[i - first], sizeof(float) * dim);
  }
  const Extent extent{dim, sequence.length, sequence.length - sequence.queries, true};
  for (int64_t head = first_head; head < last_head; head++)
    for (int64_t first = 0; first < sequence.queries; first += block) {
      const int64_t rows = smaller(block, sequence.queries - first), place = (sequence.first + first) * token + head * dim;
      pack_rows(query + place, token, rows, dim, scale * kLog2E, memory.queries, block);
      attend(extent, first, rows, packed_key, packed_value, memory);
      for (int64_t row = 0; row < rows; row++)
        multiply_row(memory.sums + row * dim, dim, 1.0f / memory.total[row], out + place + row * token);
    }
}

// Join the splits of one row: each is weighted by 2^(its maximum - the row's).
void join(const float* parts, int64_t splits, int64_t dim, float* out) {
  float largest = kNothing, total = 0;
  for (int64_t split = 0; split < splits; split++) {
    const float top = parts[split * (dim + 2) + dim + 1];
    largest = top > largest ? top : largest;
  }
  std::memset(out, 0, sizeof(float) * dim);
  for (int64_t split = 0; split < splits; split++) {
    const float* from = parts + split * (dim + 2);
    float weight[kLanes];
    store(weight, power_of_two(splat(from[dim + 1] - largest)));
    total += from[dim] * weight[0];
    for (int64_t d = 0; d < dim; d += kLanes) store(out + d, load(out + d) + load(from + d) * splat(weight[0]));
  }
  for (int64_t d = 0; d < dim; d += kLanes) store(out + d, load(out + d) * splat(1.0f / total));
}

}  // namespace

void paged_attention(const float* query, const float* key, const float* value, const int32_t* block_table, const int32_t* lengths,
                     const int32_t* cu_seqlens, float* out, int64_t sequences, int64_t max_pages, int64_t page_size,
                     int64_t heads, int64_t kv_heads, int64_t dim, float scale) {
  Shape shape{sequences, max_pages, page_size, heads, kv_heads, dim};
  int64_t units = 0, prompts = 0;
  for (int64_t index = 0; index < sequences; index++) {
    const Sequence sequence(cu_seqlens, lengths, index, shape.group());
    (sequence.prompt() ? prompts : units) += sequence.prompt() ? 1 : sequence.units();
  }
  // Packing the keys once more for every query head pays where threads would have nothing to do.
  shape.alone = thread_count() > 1 && prompts * kv_heads + units < 4 * thread_count();
  // Heads together as long as every thread has several tasks to choose from; the results are the same.
  while (shape.together < kv_heads && shape.together < kMostHeads && units * kv_heads >= 8 * thread_count() * shape.together)
    shape.together *= 2;
  // First task, and first float among the parts, of every sequence.
  int64_t* first_task = static_cast<int64_t*>(std::malloc(sizeof(int64_t) * 2 * (sequences + 1)));
  int64_t* first_part = first_task + sequences + 1;
  first_task[0] = first_part[0] = 0;
  for (int64_t index = 0; index < sequences; index++) {
    const Sequence sequence(cu_seqlens, lengths, index, shape.group());
    const int64_t tasks = sequence.prompt() ? shape.prompt_tasks() : sequence.units() * shape.head_blocks();
    first_task[index + 1] = first_task[index] + tasks;
    const int64_t held = sequence.splits > 1 ? heads * sequence.queries * sequence.splits * (dim + 2) : 0;
    first_part[index + 1] = first_part[index] + held;
  }
  float* parts = static_cast<float*>(std::malloc(sizeof(float) * (first_part[sequences] + 1)));
  parallel_for(first_task[sequences], 1, [&](int64_t begin, int64_t end) {
    Tile* tiles = static_cast<Tile*>(std::aligned_alloc(64, sizeof(Tile) * shape.together));
    int64_t index = 0;
    for (int64_t task = begin; task < end; task++) {
      while (task >= first_task[index + 1]) index++;
      const Sequence sequence(cu_seqlens, lengths, index, shape.group());
      const Cache cache{key, value, block_table + index * max_pages};
      const int64_t number = task - first_task[index], shared = shape.alone ? 1 : shape.group();
      if (sequence.prompt())
        run_prompt(sequence, cache, shape, query, scale, number * shared, (number + 1) * shared, out);
      else
        run_task(tiles, sequence, cache, shape, query, scale, number, out, parts + first_part[index]);
    }
    std::free(tiles);
  });
  if (first_part[sequences]) {
    parallel_for(sequences * heads, 8, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; item++) {
        const int64_t index = item / heads, head = item % heads;
        const Sequence sequence(cu_seqlens, lengths, index, shape.group());
        for (int64_t token = 0; sequence.splits > 1 && token < sequence.queries; token++)
          join(part(parts + first_part[index], sequence, shape, head, token, 0), sequence.splits, dim,
               out + ((sequence.first + token) * heads + head) * dim);
      }
    });
  }
  std::free(parts);
  std::free(first_task);
}

}  // namespace STEP_ISA
}  // namespace step
