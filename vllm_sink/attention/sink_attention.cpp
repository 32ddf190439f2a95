// Attention over sinks and a window of a paged KV cache: the CPU kernel behind attention/cpu.py.
//
// One work item is a tile of queries of one stream under one KV head. It walks the sink blocks with
// the query turned back by E(t), then the window blocks with the query as it is, keeping one running
// softmax. The freed middle of the block table is never touched.
//
// Keys lie transposed in a block, [head_size][block_size], so that both products, query x keys and
// weights x values, are the same small matrix product over contiguous rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/Dispatch.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#define DISPATCH(TYPE, NAME, ...)                                     \
  AT_DISPATCH_SWITCH(TYPE, NAME,                                      \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)        \
                     AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__)     \
                     AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
// Accumulators of one register tile: 24 of 32 registers with AVX-512, 12 of 16 with AVX2.
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileVecs = kLanes == 16 ? 4 : 2;
// Rows (tokens x heads) of a work item: enough to reuse a block of keys, few enough for L1.
constexpr int64_t kItemRows = 48;
// Rows of keys or values that are on their way from memory while one is used: a block's rows are too
// short, and those of keys too far apart, for the CPU to see them coming.
constexpr int64_t kRowsAhead = 8;
template <typename scalar_t>
constexpr int64_t kLine = 64 / sizeof(scalar_t);
constexpr float kNone = -std::numeric_limits<float>::infinity();

template <typename scalar_t>
inline Vec widen(const scalar_t* data) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return Vec::loadu(data);
  } else {
    Vec out;
    at::vec::load_to_float<scalar_t>(data, out);
    return out;
  }
}

// c[rows][vecs * kLanes] += a[rows][depth] x b[depth][...], everything but b in float32.
template <typename scalar_t, int64_t rows, int64_t vecs>
inline void multiply_tile(
    const float* a, int64_t a_stride, const scalar_t* b, int64_t b_stride,
    float* c, int64_t c_stride, int64_t depth) {
  Vec sum[rows][vecs];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < vecs; ++v) sum[r][v] = Vec::loadu(c + r * c_stride + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[vecs];
    if constexpr (rows < kTileRows)  // a full tile is a prefill's, which finds b in L1
      for (int64_t n = 0; n < vecs * kLanes; n += kLine<scalar_t>)
        __builtin_prefetch(b + (k + kRowsAhead) * b_stride + n);
    for (int64_t v = 0; v < vecs; ++v) row[v] = widen(b + k * b_stride + v * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec x(a[r * a_stride + k]);
      for (int64_t v = 0; v < vecs; ++v) sum[r][v] = at::vec::fmadd(x, row[v], sum[r][v]);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < vecs; ++v) sum[r][v].store(c + r * c_stride + v * kLanes);
}

template <typename scalar_t, int64_t vecs>
inline void multiply_rows(
    const float* a, int64_t a_stride, const scalar_t* b, int64_t b_stride,
    float* c, int64_t c_stride, int64_t rows, int64_t depth) {
  for (; rows >= kTileRows; rows -= kTileRows) {
    multiply_tile<scalar_t, kTileRows, vecs>(a, a_stride, b, b_stride, c, c_stride, depth);
    a += kTileRows * a_stride;
    c += kTileRows * c_stride;
  }
  switch (rows) {
    case 5: return multiply_tile<scalar_t, 5, vecs>(a, a_stride, b, b_stride, c, c_stride, depth);
    case 4: return multiply_tile<scalar_t, 4, vecs>(a, a_stride, b, b_stride, c, c_stride, depth);
    case 3: return multiply_tile<scalar_t, 3, vecs>(a, a_stride, b, b_stride, c, c_stride, depth);
    case 2: return multiply_tile<scalar_t, 2, vecs>(a, a_stride, b, b_stride, c, c_stride, depth);
    case 1: return multiply_tile<scalar_t, 1, vecs>(a, a_stride, b, b_stride, c, c_stride, depth);
  }
}

// c[rows][columns] += a[rows][depth] x b[depth][columns]; columns is a multiple of kLanes.
template <typename scalar_t>
void multiply(
    const float* a, int64_t a_stride, const scalar_t* b, int64_t b_stride,
    float* c, int64_t c_stride, int64_t rows, int64_t columns, int64_t depth) {
  int64_t n = 0;
  const auto tiles_of = [&]<int64_t vecs>() {
    for (; n + vecs * kLanes <= columns; n += vecs * kLanes)
      multiply_rows<scalar_t, vecs>(a, a_stride, b + n, b_stride, c + n, c_stride, rows, depth);
  };
  // Half the rows leave accumulators for twice the columns, unless b is widened on the way.
  if constexpr (std::is_same_v<scalar_t, float>)
    if (2 * rows <= kTileRows) tiles_of.template operator()<2 * kTileVecs>();
  tiles_of.template operator()<kTileVecs>();
  tiles_of.template operator()<1>();
}

struct Shape {
  int64_t heads, kv_heads, head_size, block_size;
  int64_t group() const { return heads / kv_heads; }
};

struct Mask {
  int64_t sinks, window;
  int64_t window_start(int64_t t) const { return std::max<int64_t>(0, t + 1 - window); }
  int64_t evicted(int64_t t) const { return std::max<int64_t>(0, t + 1 - window - sinks); }
};

struct Score {
  float scale, soft_cap;
  const float* alibi_slopes;  // null: none
  const float* sink_logits;   // null: none; else a term in the denominator of each head
  bool reindex;
};

struct Turn {
  const float* rows;  // [tokens][rotary_dim], cos then sin; null: sinks are scored as they are
  int64_t rotary_dim;
  bool neox;
};

// Running softmax of a work item, one row a (token, head).
struct Rows {
  std::vector<float> query, sink_query, score, out, peak, sum, widened;
  std::vector<int64_t> t;
  Rows(const Shape& s, int64_t rows)
      : query(rows * s.head_size), sink_query(rows * s.head_size), score(rows * s.block_size),
        out(rows * s.head_size), peak(rows), sum(rows), widened(s.block_size * s.head_size),
        t(rows) {}
};

// c[rows][columns] += a x b for a whole work item. With more rows than one register tile, b is read
// several times: it is widened to float32 once, instead of once a tile.
template <typename scalar_t>
void multiply_item(
    const float* a, int64_t a_stride, const scalar_t* b, int64_t b_stride,
    float* c, int64_t c_stride, int64_t rows, int64_t columns, int64_t depth, float* widened) {
  if (rows <= kTileRows)
    return multiply(a, a_stride, b, b_stride, c, c_stride, rows, columns, depth);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < columns; n += kLanes)
      widen(b + k * b_stride + n).store(widened + k * columns + n);
  multiply<float>(a, a_stride, widened, columns, c, c_stride, rows, columns, depth);
}

void rotate(const float* in, float* out, int64_t head_size, const float* cos_sin, const Turn& turn) {
  const int64_t half = turn.rotary_dim / 2;
  std::copy(in, in + head_size, out);
  for (int64_t i = 0; i < half; ++i) {
    const int64_t x = turn.neox ? i : 2 * i, y = turn.neox ? i + half : 2 * i + 1;
    const float cos = cos_sin[i], sin = cos_sin[half + i];
    out[x] = in[x] * cos - in[y] * sin;
    out[y] = in[y] * cos + in[x] * sin;
  }
}

// Fold one block's keys `from <= j < to` (per row, positions in the block) into the running softmax.
template <typename scalar_t, typename Range, typename Distance>
void attend_block(
    const scalar_t* keys, const scalar_t* values, const float* query, Rows& rows, int64_t count,
    const Shape& shape, const Score& score, int64_t kv_head, Range range, Distance distance) {
  int64_t low = shape.block_size, high = 0;
  for (int64_t r = 0; r < count; ++r) {
    const auto [from, to] = range(rows.t[r]);
    if (from < to) low = std::min(low, from), high = std::max(high, to);
  }
  if (low >= high) return;
  low -= low % kLanes;
  const int64_t columns = (high - low + kLanes - 1) / kLanes * kLanes;
  const int64_t block_size = shape.block_size, head_size = shape.head_size;

  std::fill_n(rows.score.begin(), count * block_size, 0.f);
  multiply_item(query, head_size, keys + low, block_size, rows.score.data(), block_size, count,
                columns, head_size, rows.widened.data());

  for (int64_t r = 0; r < count; ++r) {
    float* s = rows.score.data() + r * block_size;
    const auto [from, to] = range(rows.t[r]);
    if (from >= to) {
      std::fill_n(s, columns, 0.f);
      continue;
    }
    if (score.soft_cap != 0.f) {
      const Vec cap(score.soft_cap);
      for (int64_t i = 0; i < columns; i += kLanes)
        (cap * (Vec::loadu(s + i) / cap).tanh()).store(s + i);
    }
    if (score.alibi_slopes) {
      const float slope = score.alibi_slopes[kv_head * shape.group() + r % shape.group()];
      for (int64_t i = from - low; i < to - low; ++i)
        s[i] += slope * static_cast<float>(distance(rows.t[r], low + i));
    }
    std::fill(s, s + (from - low), kNone);
    std::fill(s + (to - low), s + columns, kNone);

    Vec top(kNone);
    for (int64_t i = 0; i < columns; i += kLanes) top = at::vec::maximum(top, Vec::loadu(s + i));
    const float peak = std::max(
        rows.peak[r],
        at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return at::vec::maximum(x, y); }, top));
    Vec total(0.f);
    for (int64_t i = 0; i < columns; i += kLanes) {
      const Vec x = Vec::loadu(s + i) - Vec(peak);
      const Vec weight = std::is_same_v<scalar_t, float> ? x.exp() : x.exp_u20();
      weight.store(s + i);
      total = total + weight;
    }
    const float fade = std::exp(rows.peak[r] - peak);
    rows.sum[r] = rows.sum[r] * fade +
        at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, total);
    rows.peak[r] = peak;
    if (fade != 1.f) {
      float* out = rows.out.data() + r * head_size;
      for (int64_t i = 0; i < head_size; i += kLanes)
        (Vec::loadu(out + i) * Vec(fade)).store(out + i);
    }
  }
  // Values past `high` may be stale, and 0 x NaN is NaN: they are not read.
  multiply_item(rows.score.data(), block_size, values + low * head_size, head_size,
                rows.out.data(), head_size, count, head_size, high - low, rows.widened.data());
}

template <typename scalar_t>
void attend_item(
    const scalar_t* query, int64_t query_stride, const scalar_t* keys, const scalar_t* values,
    const int32_t* block_row,
    int64_t token, int64_t tokens, int64_t t, int64_t kv_head, const Shape& shape,
    int64_t block_stride, const Mask& mask, const Score& score, const Turn& turn, Rows& rows,
    scalar_t* out) {
  const int64_t group = shape.group(), head_size = shape.head_size, block_size = shape.block_size;
  const int64_t count = tokens * group, last = t + tokens - 1;
  const bool turned = turn.rows && mask.sinks && mask.evicted(last);

  for (int64_t r = 0; r < count; ++r) {
    const int64_t row_token = token + r / group, head = kv_head * group + r % group;
    const scalar_t* q = query + row_token * query_stride + head * head_size;
    float* scaled = rows.query.data() + r * head_size;
    for (int64_t i = 0; i < head_size; ++i) scaled[i] = static_cast<float>(q[i]) * score.scale;
    if (turned)
      rotate(scaled, rows.sink_query.data() + r * head_size, head_size,
             turn.rows + row_token * turn.rotary_dim, turn);
    rows.t[r] = t + r / group;
    rows.peak[r] =
        score.sink_logits ? score.sink_logits[head] : std::numeric_limits<float>::lowest();
    rows.sum[r] = score.sink_logits ? 1.f : 0.f;
  }
  std::fill_n(rows.out.begin(), count * head_size, 0.f);

  const auto attend = [&](int64_t block, const float* from_query, auto range, auto distance) {
    const int64_t offset = block_row[block] * block_stride + kv_head * block_size * head_size * 2;
    attend_block<scalar_t>(keys + offset, values + offset, from_query, rows, count, shape, score,
                           kv_head, range, distance);
  };
  const int64_t sinks = std::min(mask.sinks, mask.window_start(last));
  for (int64_t block = 0; block * block_size < sinks; ++block) {
    const int64_t base = block * block_size;
    attend(
        block, turned ? rows.sink_query.data() : rows.query.data(),
        [&](int64_t row_t) {
          const int64_t to = std::min(mask.sinks, mask.window_start(row_t)) - base;
          return std::pair<int64_t, int64_t>(0, std::min(to, block_size));
        },
        [&](int64_t row_t, int64_t j) {
          return base + j - (score.reindex ? row_t - mask.evicted(row_t) : row_t);
        });
  }
  for (int64_t block = mask.window_start(t) / block_size; block * block_size <= last; ++block) {
    const int64_t base = block * block_size;
    attend(
        block, rows.query.data(),
        [&](int64_t row_t) {
          return std::pair<int64_t, int64_t>(
              std::max<int64_t>(mask.window_start(row_t) - base, 0),
              std::min(row_t + 1 - base, block_size));
        },
        [&](int64_t row_t, int64_t j) { return base + j - row_t; });
  }

  for (int64_t r = 0; r < count; ++r) {
    const int64_t row_token = token + r / group, head = kv_head * group + r % group;
    scalar_t* o = out + (row_token * shape.heads + head) * head_size;
    const float* sum = rows.out.data() + r * head_size;
    for (int64_t i = 0; i < head_size; ++i) o[i] = static_cast<scalar_t>(sum[i] / rows.sum[r]);
  }
}

struct Item {
  int64_t request, token, tokens, t;
};

std::vector<Item> split(const int32_t* starts, const int32_t* seq_lens, int64_t requests,
                        int64_t tokens_an_item) {
  std::vector<Item> items;
  for (int64_t request = 0; request < requests; ++request) {
    const int64_t stop = starts[request + 1];
    for (int64_t token = starts[request]; token < stop; token += tokens_an_item)
      items.push_back({request, token, std::min(tokens_an_item, stop - token),
                       seq_lens[request] - (stop - token)});
  }
  return items;
}

// [tokens][heads][head_size], the tokens any distance apart: a slice of a fused projection will do.
bool heads_lie_together(const at::Tensor& x) {
  return x.stride(2) == 1 && x.stride(1) == x.size(2);
}

// storage: [blocks, kv_heads, 2 * head_size * block_size], keys transposed first, then values.
void attend(
    const at::Tensor& query, const at::Tensor& storage, const at::Tensor& query_start_loc,
    const at::Tensor& seq_lens, const at::Tensor& block_table, int64_t block_size, int64_t sinks,
    int64_t window, double scale, double soft_cap, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& sink_logits, bool reindex,
    const std::optional<at::Tensor>& turn_rows, bool neox, const at::Tensor& out) {
  const Shape shape{query.size(1), storage.size(1), query.size(2), block_size};
  TORCH_CHECK(block_size % kLanes == 0 && shape.head_size % kLanes == 0,
              "block size ", block_size, ", head size ", shape.head_size,
              ": each must be a multiple of ", kLanes);
  TORCH_CHECK(heads_lie_together(query) && out.is_contiguous(), "query or out: unexpected strides");
  TORCH_CHECK(block_table.stride(1) == 1, "block_table: rows must be contiguous");
  const Mask mask{sinks, window};
  const Score score{static_cast<float>(scale), static_cast<float>(soft_cap),
                    alibi_slopes ? alibi_slopes->const_data_ptr<float>() : nullptr,
                    sink_logits ? sink_logits->const_data_ptr<float>() : nullptr, reindex};
  const Turn turn{turn_rows ? turn_rows->const_data_ptr<float>() : nullptr,
                  turn_rows ? turn_rows->size(1) : 0, neox};
  const int64_t tokens_an_item = std::max<int64_t>(1, kItemRows / shape.group());
  const auto items = split(query_start_loc.const_data_ptr<int32_t>(),
                           seq_lens.const_data_ptr<int32_t>(), seq_lens.size(0), tokens_an_item);
  const int64_t work = static_cast<int64_t>(items.size()) * shape.kv_heads;
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  const int64_t table_stride = block_table.stride(0);

  DISPATCH(query.scalar_type(), "sink_attend", [&] {
    const scalar_t* keys = storage.const_data_ptr<scalar_t>();
    at::parallel_for(0, work, 1, [&](int64_t begin, int64_t end) {
      Rows rows(shape, tokens_an_item * shape.group());
      for (int64_t i = begin; i < end; ++i) {
        const Item& item = items[i / shape.kv_heads];
        attend_item<scalar_t>(
            query.const_data_ptr<scalar_t>(), query.stride(0), keys,
            keys + block_size * shape.head_size, table + item.request * table_stride, item.token, item.tokens, item.t,
            i % shape.kv_heads, shape, storage.stride(0), mask, score, turn, rows,
            out.data_ptr<scalar_t>());
      }
    });
  });
}

void write_slots(const at::Tensor& key, const at::Tensor& value, const at::Tensor& storage, int64_t block_size,
           const at::Tensor& slots) {
  const int64_t kv_heads = key.size(1), head_size = key.size(2);
  const int64_t half = block_size * head_size;
  TORCH_CHECK(heads_lie_together(key) && heads_lie_together(value),
              "key or value: unexpected strides");
  DISPATCH(key.scalar_type(), "sink_write", [&] {
    const scalar_t *k = key.const_data_ptr<scalar_t>(), *v = value.const_data_ptr<scalar_t>();
    scalar_t* cache = storage.data_ptr<scalar_t>();
    const int64_t* slot = slots.const_data_ptr<int64_t>();
    at::parallel_for(0, slots.size(0), 16, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        if (slot[token] < 0) continue;  // vLLM pads with -1
        const int64_t offset = slot[token] % block_size;
        scalar_t* block = cache + slot[token] / block_size * storage.stride(0);
        for (int64_t head = 0; head < kv_heads; ++head) {
          const scalar_t* from = k + token * key.stride(0) + head * head_size;
          scalar_t* keys = block + head * 2 * half;
          for (int64_t i = 0; i < head_size; ++i) keys[i * block_size + offset] = from[i];
          std::copy_n(v + token * value.stride(0) + head * head_size, head_size,
                      keys + half + offset * head_size);
        }
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY(vllm_sink, library) {
  library.def(
      "attend(Tensor query, Tensor storage, Tensor query_start_loc, Tensor seq_lens, "
      "Tensor block_table, int block_size, int sinks, int window, float scale, float soft_cap, "
      "Tensor? alibi_slopes, Tensor? sink_logits, bool reindex, Tensor? turn_rows, bool neox, "
      "Tensor(a!) out) -> ()");
  library.def(
      "write(Tensor key, Tensor value, Tensor(a!) storage, int block_size, Tensor slots) -> ()");
  library.impl("attend", c10::DispatchKey::CPU, &attend);
  library.impl("write", c10::DispatchKey::CPU, &write_slots);
}
