// Attention of a tile of query rows over one section, page by page and head by head, in the order of memory. A head's
// keys and values in a page come from memory once and from the first-level cache for all rows but the first few. Rows
// share loads, never sums: which rows go together changes no order of additions.

#include "base/cpu_features.h"

namespace elutq {
namespace {

/// Rows whose sums are kept in registers together.
constexpr int kAttentionRows = 4;

/// Vectors of keys or values whose sums for `rows` rows fit the registers, if there are `most`.
template <int rows, int most>
constexpr int kRuns = kAttentionRuns * kAttentionRows / rows < most ? kAttentionRuns * kAttentionRows / rows : most;
template <int rows>
constexpr int kKeyRuns = kRuns<rows, static_cast<int>(kPagePositions / kLanes)>;
template <int rows>
constexpr int kValueRuns = kRuns<rows, 8>;

template <KvType type>
constexpr int64_t kKvBytes = type == KvType::kFloat16 ? 2 : 1;

template <KvType type>
ELUTQ_INLINE Floats load_kv(const uint8_t* from) {
  if constexpr (type == KvType::kFloat16) {
    return load_half(from);
  } else {
    return load_int8(from);
  }
}

/// A head's keys or values in a page.
struct Block {
  const uint8_t* data;
  const float* scales;  ///< int8 only
  int64_t ahead;        ///< bytes to what is read after them
  bool fetch;           ///< even for one row of fp16
};

/// `count` keys or values at byte `offset` are used by `rows` rows: fetches those in the same place of the next block
/// into the second-level cache. The more there is to compute, the less prefetchers do by themselves. One row reads fp16
/// so fast that some follow best if left alone (CpuFeatures::follows_streams).
template <KvType type, int rows, int64_t count>
ELUTQ_INLINE void look_ahead(const Block& block, int64_t offset) {
  if constexpr (rows == 1 && type == KvType::kFloat16) {
    bool fetch = block.fetch;
    asm("" : "+r"(fetch));  // asked each time, or the compiler makes a loop for each answer
    if (!fetch) return;
  }
  const uint8_t* from = block.data + block.ahead + offset;
  for (int64_t i = 0; i < count * kKvBytes<type>; i += kCacheLine) __builtin_prefetch(from + i, 0, 2);
}

/// Positions of a section, relative to its beginning.
struct Range {
  int64_t begin;
  int64_t end;

  ELUTQ_INLINE Range within(Range other) const { return {max_of(begin, other.begin), min_of(end, other.end)}; }
  ELUTQ_INLINE bool empty() const { return begin >= end; }
};

/// One section as a tile's rows see it.
struct Section {
  const AttentionTile& tile;
  int64_t first_position;

  ELUTQ_INLINE Range visible(int64_t row) const {
    const int64_t end = tile.position + tile.token(row) + 1;
    const int64_t begin = tile.window == 0 ? 0 : max_of(0, end - tile.window);
    return Range{begin - first_position, end - first_position}.within({0, kSectionPositions});
  }
  ELUTQ_INLINE const uint8_t* page(int64_t position) const {
    return tile.pages[(first_position + position) / kPagePositions] + tile.layer_offset;
  }
};

/// body(Constant<rows>, first) for blocks of 4, 2 and 1 of the rows [row, end).
template <typename Body>
ELUTQ_INLINE void for_each_row_block(int64_t row, int64_t end, const Body& body) {
  for (; row + kAttentionRows <= end; row += kAttentionRows) body(Constant<kAttentionRows>{}, row);
  if (row + 2 <= end) {
    body(Constant<2>{}, row);
    row += 2;
  }
  if (row < end) body(Constant<1>{}, row);
}

/// Scores of `rows` rows from `row` on and all positions of a page, seen or not; scores: of the page's first position.
template <KvType type, int rows>
void score_page(const Section& section, int64_t row, const Block& keys, float* scores) {
  constexpr int kVectors = kKeyRuns<rows>;
  const AttentionTile& tile = section.tile;
  const float* q[rows];
  for (int r = 0; r < rows; ++r) q[r] = tile.q + tile.row_offset(row + r);
  for (int64_t first = 0; first < kPagePositions; first += kVectors * kLanes) {
    Floats sums[rows][kVectors] = {};
    int64_t offset = first * kKvBytes<type>;
    for (int64_t d = 0; d < tile.layout.head_dim; ++d, offset += kPagePositions * kKvBytes<type>) {
      Floats k[kVectors];
      look_ahead<type, rows, kVectors * kLanes>(keys, offset);
      unroll<kVectors>([&](auto i)
                           ELUTQ_FLAT { k[i] = load_kv<type>(keys.data + offset + i * kLanes * kKvBytes<type>); });
      unroll<rows>([&](auto r) ELUTQ_FLAT {
        const Floats v = splat(q[r][d]);
        unroll<kVectors>([&](auto i) ELUTQ_FLAT { sums[r][i] = fma(v, k[i], sums[r][i]); });
      });
    }
    unroll<rows>([&](auto r) ELUTQ_FLAT {
      unroll<kVectors>([&](auto i) ELUTQ_FLAT {
        Floats score = splat(tile.scale) * sums[r][i];
        if constexpr (type == KvType::kInt8) score = score * load(keys.scales + first + i * kLanes);
        store(score, scores + r * kScoreStride + first + i * kLanes);
      });
    });
  }
}

/// scores -> exp(scores - the largest), which is returned with their sum.
ELUTQ_INLINE void softmax_weights(float* scores, int64_t count, float& most, float& total) {
  Floats largest = splat(scores[0]);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) largest = max(largest, load(scores + i));
  most = reduce_max(largest);
  for (; i < count; ++i) most = scores[i] > most ? scores[i] : most;

  const Floats shift = splat(most);
  Floats sum = zeros();
  for (i = 0; i + kLanes <= count; i += kLanes) {
    const Floats e = exp(load(scores + i) - shift);
    store(e, scores + i);
    sum = sum + e;
  }
  if (i < count) {
    store_part(exp(load_part(scores + i, count - i) - shift), scores + i, count - i);
    sum = sum + load_part(scores + i, count - i);
  }
  total = reduce_add(sum);
}

/// sums[r] += weights[r][j] * values[j] for `rows` rows, `runs` vectors of columns from `c` on, and j in the range.
template <KvType type, int rows, int runs>
ELUTQ_INLINE void weigh_columns(const KvLayout& layout, const Block& values, int64_t c, Range range,
                                const float* weights, float* sums) {
  const int64_t stride = partial_floats(layout);
  Floats totals[rows][runs];
  unroll<rows>([&](auto r) ELUTQ_FLAT {
    unroll<runs>([&](auto i) ELUTQ_FLAT { totals[r][i] = load(sums + r * stride + c + i * kLanes); });
  });
  for (int64_t j = range.begin; j < range.end; ++j) {
    const int64_t offset = (j * layout.value_columns() + c) * kKvBytes<type>;
    Floats v[runs];
    look_ahead<type, rows, runs * kLanes>(values, offset);
    unroll<runs>([&](auto i) ELUTQ_FLAT { v[i] = load_kv<type>(values.data + offset + i * kLanes * kKvBytes<type>); });
    unroll<rows>([&](auto r) ELUTQ_FLAT {
      const Floats weight = splat(weights[r * kScoreStride + j]);
      unroll<runs>([&](auto i) ELUTQ_FLAT { totals[r][i] = fma(weight, v[i], totals[r][i]); });
    });
  }
  unroll<rows>([&](auto r) ELUTQ_FLAT {
    unroll<runs>([&](auto i) ELUTQ_FLAT { store(totals[r][i], sums + r * stride + c + i * kLanes); });
  });
}

/// The same of all columns from `c` on: as many at a time as there is room for, then fewer.
template <KvType type, int rows, int runs = kValueRuns<rows>>
void weigh_range(const KvLayout& layout, const Block& values, Range range, const float* weights, float* sums,
                 int64_t c = 0) {
  for (; c + runs * kLanes <= layout.value_columns(); c += runs * kLanes) {
    weigh_columns<type, rows, runs>(layout, values, c, range, weights, sums);
  }
  if constexpr (runs > 1) weigh_range<type, rows, runs / 2>(layout, values, range, weights, sums, c);
}

/// Adds a page's values to the sums of rows from `row` on; first: its first position. Together rows take the positions
/// that all of them see, each by itself those before and after.
template <KvType type, int rows>
void weigh_page(const Section& section, int64_t row, int64_t first, const Block& values, float* weights, float* sums) {
  const KvLayout& layout = section.tile.layout;
  const auto visible = [&](int64_t r) ELUTQ_FLAT {
    const Range range = section.visible(row + r).within({first, first + kPagePositions});
    return Range{range.begin - first, range.end - first};
  };
  if constexpr (type == KvType::kInt8) {
    for (int r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < kPagePositions; j += kLanes) {
        float* run = weights + r * kScoreStride + j;
        store(load(run) * load(values.scales + j), run);
      }
    }
  }
  // Later rows neither begin nor end earlier.
  Range common = {visible(rows - 1).begin, visible(0).end};
  if (common.empty()) common.begin = common.end = kPagePositions;
  const auto alone = [&](int r, Range range) ELUTQ_FLAT {
    range = range.within(visible(r));
    if (range.empty()) return;
    weigh_range<type, 1>(layout, values, range, weights + r * kScoreStride, sums + r * partial_floats(layout));
  };
  for (int r = 0; r < rows; ++r) alone(r, {0, common.begin});
  if (!common.empty()) weigh_range<type, rows>(layout, values, common, weights, sums);
  for (int r = 0; r < rows; ++r) alone(r, {common.end, kPagePositions});
}

template <KvType type>
void attend(const Section& section, float* scores, float* partials) {
  const AttentionTile& tile = section.tile;
  const int64_t rows = tile.rows();
  const int64_t stride = partial_floats(tile.layout);
  const KvLayout& layout = tile.layout;
  const Range all = {section.visible(0).begin, section.visible(rows - 1).end};
  const int64_t first_page = all.begin / kPagePositions * kPagePositions;
  const bool fetch = !cpu_features().follows_streams;
  // visit(rows, row, first position, block) for all blocks of rows and the pages they see, page by page. A head's keys
  // or values lie at `offset(head)`, their scales at `scales_offset(head)`; after the last of them `then` is read, if
  // that is known.
  const auto for_each_page = [&](const auto& offset, const auto& scales_offset, const uint8_t* then,
                                 const auto& visit) {
    for (int64_t first = first_page; first < all.end; first += kPagePositions) {
      const uint8_t* page = section.page(first);
      for (int64_t i = 0; i < tile.kv_heads; ++i) {
        const int64_t head = tile.kv_head + i;
        const uint8_t* data = page + offset(head);
        const uint8_t* next = then;
        if (i + 1 < tile.kv_heads) {
          next = page + offset(head + 1);
        } else if (first + kPagePositions < all.end) {
          next = section.page(first + kPagePositions) + offset(tile.kv_head);
        }
        const auto* scales = reinterpret_cast<const float*>(page + scales_offset(head));
        const Block block = {data, scales, next == nullptr ? 0 : next - data, fetch};
        const int64_t begin = i * tile.rows_per_head();
        for_each_row_block(begin, begin + tile.rows_per_head(), [&](auto count, int64_t row) ELUTQ_FLAT {
          const Range seen = {section.visible(row).begin, section.visible(row + count - 1).end};
          if (!seen.within({first, first + kPagePositions}).empty()) visit(count, row, first, block);
        });
      }
    }
  };
  const uint8_t* first_values = section.page(first_page) + layout.values_offset(tile.kv_head);
  for_each_page([&](int64_t head) { return layout.keys_offset(head); },
                [&](int64_t head) { return layout.key_scales_offset(head); }, first_values,
                [&](auto count, int64_t row, int64_t first, const Block& keys)
                    ELUTQ_FLAT { score_page<type, count>(section, row, keys, scores + row * kScoreStride + first); });
  for (int64_t row = 0; row < rows; ++row) {
    const Range range = section.visible(row);
    float* partial = partials + row * stride;
    for (int64_t c = 0; c < stride; ++c) partial[c] = 0.0f;
    if (range.empty()) continue;
    softmax_weights(scores + row * kScoreStride + range.begin, range.end - range.begin, partial[stride - 2],
                    partial[stride - 1]);
  }
  for_each_page([&](int64_t head) { return layout.values_offset(head); },
                [&](int64_t head) { return layout.value_scales_offset(head); }, nullptr,
                [&](auto count, int64_t row, int64_t first, const Block& values) ELUTQ_FLAT {
                  weigh_page<type, count>(section, row, first, values, scores + row * kScoreStride + first,
                                          partials + row * stride);
                });
}

void attention(const AttentionTile& tile, int64_t section, float* scores, float* partials) {
  const auto run = tile.layout.type == KvType::kFloat16 ? attend<KvType::kFloat16> : attend<KvType::kInt8>;
  run({tile, section * kSectionPositions}, scores, partials);
}

void merge_attention(const AttentionTile& tile, int64_t sections, const float* partials, float* out) {
  const int64_t stride = partial_floats(tile.layout);
  const int64_t head_dim = tile.layout.head_dim;
  for (int64_t row = 0; row < tile.rows(); ++row) {
    float* row_out = out + tile.row_offset(row);
    const auto partial = [&](int64_t s) { return partials + (s * tile.rows() + row) * stride; };
    const auto largest = [&](int64_t s) { return partial(s)[stride - 2]; };
    const auto sum = [&](int64_t s) { return partial(s)[stride - 1]; };
    // A section of which the row saw nothing leaves no trace.
    bool any = false;
    float most = 0.0f;
    for (int64_t s = 0; s < sections; ++s) {
      if (sum(s) == 0.0f) continue;
      most = !any || largest(s) > most ? largest(s) : most;
      any = true;
    }
    const auto weight = [&](int64_t s) { return exp(splat(largest(s) - most)); };
    Floats total = zeros();
    for (int64_t s = 0; s < sections; ++s) {
      if (sum(s) != 0.0f) total = fma(weight(s), splat(sum(s)), total);
    }
    const Floats inverse = splat(1.0f) / total;
    for (int64_t c = 0; c < head_dim; c += kLanes) {
      Floats value = zeros();
      for (int64_t s = 0; s < sections; ++s) {
        if (sum(s) != 0.0f) value = fma(weight(s), load(partial(s) + c), value);
      }
      store_part(value * inverse, row_out + c, min_of(kLanes, head_dim - c));
    }
  }
}

/// Columns of a vector to fp16, or to int8 with a scale of its own; put(column, bytes of the element).
template <KvType type, typename Put>
ELUTQ_INLINE void convert_kv(const float* x, int64_t head_dim, float* scale, const Put& put) {
  Floats inverse = zeros();
  if constexpr (type == KvType::kInt8) {
    Floats largest = zeros();
    for_each_run(head_dim, [&](auto get, auto) { largest = max(abs(get(x)), largest); });
    const float most = reduce_max(largest);
    const bool negligible = most < 0x1p-100f;
    inverse = splat(negligible ? 0.0f : 127.0f / most);
    *scale = negligible ? 0.0f : most / 127.0f;
  }
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    const int64_t count = min_of(kLanes, head_dim - c);
    const Floats v = count == kLanes ? load(x + c) : load_part(x + c, count);
    uint8_t bytes[kLanes * kKvBytes<type>];
    if constexpr (type == KvType::kFloat16) {
      uint16_t halves[kLanes];
      store_half(v, halves);
      std::memcpy(bytes, halves, sizeof bytes);
    } else {
      // Adding 1.5 * 2^23 leaves the rounded product in the low bits of the sum.
      store_low_bytes(fma(v, inverse, splat(0x1.8p23f)), bytes);
    }
    for (int64_t i = 0; i < count; ++i) put(c + i, bytes + i * kKvBytes<type>);
  }
}

template <KvType type>
void store_typed(const KvLayout& layout, const float* keys, const float* values, int64_t slot, uint8_t* page) {
  constexpr int64_t kSize = kKvBytes<type>;
  for (int64_t head = 0; head < layout.heads; ++head) {
    const auto scale = [&](int64_t offset) { return reinterpret_cast<float*>(page + offset) + slot; };
    uint8_t* column = page + layout.keys_offset(head) + slot * kSize;
    uint8_t* row = page + layout.values_offset(head) + slot * layout.value_columns() * kSize;
    convert_kv<type>(keys + head * layout.head_dim, layout.head_dim, scale(layout.key_scales_offset(head)),
                     [&](int64_t c, const uint8_t* element)
                         ELUTQ_FLAT { std::memcpy(column + c * kPagePositions * kSize, element, kSize); });
    convert_kv<type>(values + head * layout.head_dim, layout.head_dim, scale(layout.value_scales_offset(head)),
                     [&](int64_t c, const uint8_t* element)
                         ELUTQ_FLAT { std::memcpy(row + c * kSize, element, kSize); });
  }
}

void store_kv(const KvLayout& layout, const float* keys, const float* values, int64_t slot, uint8_t* page) {
  const auto store_as = layout.type == KvType::kFloat16 ? store_typed<KvType::kFloat16> : store_typed<KvType::kInt8>;
  store_as(layout, keys, values, slot, page);
}

}  // namespace
}  // namespace elutq
