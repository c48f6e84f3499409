// Attention of a few new tokens over a paged key-value cache, flash-style: keys come in blocks of 64, scores and weights of a block
// stay in cache. A task is (sequence, key-value head, tile of rows, split of the keys), where a row is a (new token, query head)
// pair: all query heads of a key-value head share what is read. How a sequence is cut depends on its own lengths alone, so its bits
// do not depend on its companions or on the number of threads.
#include <cstdlib>

#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace step {
namespace STEP_ISA {
namespace {

constexpr int64_t kRows = 16;    // rows of a tile
constexpr int64_t kKeys = 64;    // keys of a block
constexpr int64_t kWidest = 256;  // largest head dimension
constexpr int64_t kSplitKeys = 512;  // keys of a split: 32 us at 8 GB/s and dimension 64, worth waking a thread
constexpr int64_t kSplitQueries = 4;  // sequences with more new tokens have tiles enough
constexpr float kNothing = -3.0e38f;

struct Shape {
  int64_t sequences, max_pages, page_size, heads, kv_heads, dim;
  int64_t group() const { return heads / kv_heads; }
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
  int64_t tasks(int64_t kv_heads) const { return tiles * splits * kv_heads; }
};

// Lane i of the result is the sum of the lanes of parts[i]: each round pairs vectors and adds half of their lanes.
inline vec lane_sums(vec (&parts)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    ivec low, high;
    for (int lane = 0; lane < kLanes; lane++) {
      low[lane] = lane & step ? kLanes + lane - step : lane;
      high[lane] = lane & step ? kLanes + lane : lane + step;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / (2 * step); i++)
      parts[i] = __builtin_shuffle(parts[2 * i], parts[2 * i + 1], low) + __builtin_shuffle(parts[2 * i], parts[2 * i + 1], high);
  }
  return parts[0];
}

// scores[row * kKeys + key] = query[row] . key, for R rows and all keys of the block.
template <int R>
inline void score_rows(const float* query, const float* const* keys, float* scores, int64_t count, int64_t dim) {
  constexpr int C = kLanes / R;
  for (int64_t key = 0; key < count; key += C) {
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

// out[row] = out[row] * decay[row] + sum over keys of weights[row][key] * value, for R rows and D vectors of the dimension.
template <int R, int D>
inline void add_values(const float* weights, const float* const* values, const float* decay, float* out, int64_t count,
                              int64_t dim) {
  vec total[R][D];
  for (int r = 0; r < R; r++)
    for (int d = 0; d < D; d++) total[r][d] = load(out + r * dim + d * kLanes) * splat(decay[r]);
  for (int64_t key = 0; key < count; key++) {
    vec value[D];
    for (int d = 0; d < D; d++) value[d] = load(values[key] + d * kLanes);
    for (int r = 0; r < R; r++) {
      vec weight = splat(weights[r * kKeys + key]);
      for (int d = 0; d < D; d++) total[r][d] += weight * value[d];
    }
  }
  for (int r = 0; r < R; r++)
    for (int d = 0; d < D; d++) store(out + r * dim + d * kLanes, total[r][d]);
}

template <int R>
inline void add_value_rows(const float* weights, const float* const* values, const float* decay, float* out, int64_t count,
                                  int64_t dim) {
  const float* shifted[kKeys];
  for (int64_t d = 0; d < dim;) {
    const bool wide = dim - d >= 4 * kLanes;
    for (int64_t key = 0; key < count; key++) shifted[key] = values[key] + d;
    if (wide)
      add_values<R, 4>(weights, shifted, decay, out + d, count, dim);
    else
      add_values<R, 1>(weights, shifted, decay, out + d, count, dim);
    d += wide ? 4 * kLanes : kLanes;
  }
}

// One tile over one range of keys. `out` gets weighted sums that are not yet divided by `total`.
struct Tile {
  alignas(64) float query[kRows * kWidest];
  alignas(64) float out[kRows * kWidest];
  alignas(64) float scores[kRows * kKeys];
  float largest[kRows], total[kRows], decay[kRows];
  int64_t visible[kRows];  // keys that the row may see
  int64_t rows;

  // Scores to weights, row by row; keeps the running maximum and total.
  void weigh(int64_t first_key, int64_t count) {
    for (int64_t row = 0; row < rows; row++) {
      float* score = scores + row * kKeys;
      int64_t seen = visible[row] - first_key;
      seen = seen < 0 ? 0 : seen > count ? count : seen;
      for (int64_t key = seen; key < kKeys; key++) score[key] = kNothing;
      vec top = splat(largest[row]);
      for (int64_t key = 0; key < kKeys; key += kLanes) top = maximum(top, load(score + key));
      const float now = maximum(top);
      vec sums{};
      if (seen)
        for (int64_t key = 0; key < kKeys; key += kLanes) {
          vec weight = exponential(load(score + key) - splat(now));
          store(score + key, weight);
          sums += weight;
        }
      else
        std::memset(score, 0, sizeof(float) * kKeys);
      float gone[kLanes];
      store(gone, exponential(splat(largest[row] - now)));
      decay[row] = gone[0];
      total[row] = total[row] * decay[row] + sum(sums);
      largest[row] = now;
    }
  }

  void block(const float* const* keys, const float* const* values, int64_t first_key, int64_t count, int64_t dim) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) score_rows<4>(query + row * dim, keys, scores + row * kKeys, count, dim);
    for (; row + 2 <= rows; row += 2) score_rows<2>(query + row * dim, keys, scores + row * kKeys, count, dim);
    for (; row < rows; row++) score_rows<1>(query + row * dim, keys, scores + row * kKeys, count, dim);
    weigh(first_key, count);
    row = 0;
    // As many sums as registers: 32 with AVX-512, else 16.
    constexpr int kWide = kLanes == 16 ? 4 : 2;
    for (; row + kWide <= rows; row += kWide)
      add_value_rows<kWide>(scores + row * kKeys, values, decay + row, out + row * dim, count, dim);
    for (; row < rows; row++) add_value_rows<1>(scores + row * kKeys, values, decay + row, out + row * dim, count, dim);
  }
};

struct Cache {
  const float *key, *value;
  const int32_t* pages;  // of one sequence
};

void attend(Tile& tile, const Cache& cache, const Shape& shape, int64_t kv_head, int64_t begin, int64_t end) {
  const float *keys[kKeys], *values[kKeys];
  const int64_t stride = shape.kv_heads * shape.dim;
  for (int64_t first = begin; first < end; first += kKeys) {
    const int64_t count = end - first < kKeys ? end - first : kKeys;
    int64_t page = first / shape.page_size, slot = first % shape.page_size;
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = (cache.pages[page] * shape.page_size + slot) * stride + kv_head * shape.dim;
      keys[i] = cache.key + at;
      values[i] = cache.value + at;
      if (++slot == shape.page_size) page++, slot = 0;
    }
    // Scores come in groups of up to kLanes keys; those beyond the end are read from a key that exists, and masked.
    for (int64_t i = count; i < kKeys; i++) keys[i] = keys[0];
    tile.block(keys, values, first, count, shape.dim);
  }
}

// Sums, total and maximum of each row and split of a sequence that is split: `[heads][queries][splits][dim + 2]`.
inline float* part(float* parts, const Sequence& sequence, const Shape& shape, int64_t head, int64_t query, int64_t split) {
  return parts + ((head * sequence.queries + query) * sequence.splits + split) * (shape.dim + 2);
}

void run_task(Tile& tile, const Sequence& sequence, const Cache& cache, const Shape& shape, const float* query, float scale,
                     int64_t task, float* out, float* parts) {
  const int64_t split = task % sequence.splits, dim = shape.dim, group = shape.group();
  const int64_t first_row = task / sequence.splits % sequence.tiles * kRows, kv_head = task / sequence.splits / sequence.tiles;
  tile.rows = sequence.rows - first_row < kRows ? sequence.rows - first_row : kRows;
  for (int64_t row = 0; row < tile.rows; row++) {
    const int64_t token = (first_row + row) / group, head = kv_head * group + (first_row + row) % group;
    const float* from = query + ((sequence.first + token) * shape.heads + head) * dim;
    for (int64_t d = 0; d < dim; d += kLanes) store(tile.query + row * dim + d, load(from + d) * splat(scale));
    tile.largest[row] = kNothing;
    tile.total[row] = 0;
    tile.visible[row] = sequence.length - sequence.queries + token + 1;
  }
  std::memset(tile.out, 0, sizeof(float) * tile.rows * dim);
  const int64_t last = tile.visible[tile.rows - 1];
  int64_t begin = 0, end = last;
  if (sequence.splits > 1) {
    begin = split * kSplitKeys;
    end = begin + kSplitKeys < last ? begin + kSplitKeys : last;
  }
  attend(tile, cache, shape, kv_head, begin, end);
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

// Join the splits of one row: each is weighted by e^(its maximum - the row's).
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
    store(weight, exponential(splat(from[dim + 1] - largest)));
    total += from[dim] * weight[0];
    for (int64_t d = 0; d < dim; d += kLanes) store(out + d, load(out + d) + load(from + d) * splat(weight[0]));
  }
  for (int64_t d = 0; d < dim; d += kLanes) store(out + d, load(out + d) * splat(1.0f / total));
}

}  // namespace

void paged_attention(const float* query, const float* key, const float* value, const int32_t* block_table, const int32_t* lengths,
                     const int32_t* cu_seqlens, float* out, int64_t sequences, int64_t max_pages, int64_t page_size, int64_t heads,
                     int64_t kv_heads, int64_t dim, float scale) {
  const Shape shape{sequences, max_pages, page_size, heads, kv_heads, dim};
  // First task, and first float among the parts, of every sequence.
  int64_t* first_task = static_cast<int64_t*>(std::malloc(sizeof(int64_t) * 2 * (sequences + 1)));
  int64_t* first_part = first_task + sequences + 1;
  first_task[0] = first_part[0] = 0;
  for (int64_t index = 0; index < sequences; index++) {
    const Sequence sequence(cu_seqlens, lengths, index, shape.group());
    first_task[index + 1] = first_task[index] + sequence.tasks(kv_heads);
    const int64_t held = sequence.splits > 1 ? heads * sequence.queries * sequence.splits * (dim + 2) : 0;
    first_part[index + 1] = first_part[index] + held;
  }
  float* parts = static_cast<float*>(std::malloc(sizeof(float) * (first_part[sequences] + 1)));
  parallel_for(first_task[sequences], 1, [&](int64_t begin, int64_t end) {
    Tile* tile = static_cast<Tile*>(std::aligned_alloc(64, (sizeof(Tile) + 63) / 64 * 64));
    int64_t index = 0;
    for (int64_t task = begin; task < end; task++) {
      while (task >= first_task[index + 1]) index++;
      const Sequence sequence(cu_seqlens, lengths, index, shape.group());
      const Cache cache{key, value, block_table + index * max_pages};
      run_task(*tile, sequence, cache, shape, query, scale, task - first_task[index], out, parts + first_part[index]);
    }
    std::free(tile);
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
