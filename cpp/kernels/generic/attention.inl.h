// Attention of a tile of query rows over one section of one key-value head, page by page. A page's keys and values come
// from memory once and from the first-level cache for all rows but the first few. Rows share loads, never sums: which
// rows go together changes no order of additions.

namespace elutq {
namespace {

/// Fetches `bytes` bytes from `from` on into the second-level cache. A page's keys or values are too short for the
/// hardware to learn where it goes on: while they are used, what comes next is fetched by hand.
template <int64_t bytes>
ELUTQ_INLINE void prefetch(const uint8_t* from) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/// Rows whose sums are kept in registers together.
constexpr int kAttentionRows = 4;

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

  ELUTQ_INLINE const float* query(int64_t row) const {
    return tile.q + row / tile.heads * tile.q_stride + row % tile.heads * tile.layout.head_dim;
  }
  ELUTQ_INLINE Range visible(int64_t row) const {
    const int64_t end = tile.position + row / tile.heads + 1;
    const int64_t begin = tile.window == 0 ? 0 : max_of(0, end - tile.window);
    return Range{begin - first_position, end - first_position}.within({0, kSectionPositions});
  }
  ELUTQ_INLINE const uint8_t* page(int64_t position) const {
    return tile.pages[(first_position + position) / kPagePositions] + tile.head_offset;
  }
};

/// body(Constant<rows>, first) for blocks of 4, 2 and 1 of `count` rows.
template <typename Body>
ELUTQ_INLINE void for_each_row_block(int64_t count, const Body& body) {
  int64_t row = 0;
  for (; row + kAttentionRows <= count; row += kAttentionRows) body(Constant<kAttentionRows>{}, row);
  if (row + 2 <= count) {
    body(Constant<2>{}, row);
    row += 2;
  }
  if (row < count) body(Constant<1>{}, row);
}

/// Scores of `rows` rows from `row` on and all positions of a page, seen or not; scores: of the page's first position;
/// ahead: bytes from the keys to what comes after them.
template <KvType type, int rows>
void score_page(const Section& section, int64_t row, const uint8_t* page, int64_t ahead, float* scores) {
  const KvLayout& layout = section.tile.layout;
  const float* q[rows];
  for (int r = 0; r < rows; ++r) q[r] = section.query(row + r);
  for (int64_t first = 0; first < kPagePositions; first += kAttentionRuns * kLanes) {
    Floats sums[rows][kAttentionRuns] = {};
    const uint8_t* keys = page + first * kKvBytes<type>;
    for (int64_t d = 0; d < layout.head_dim; ++d, keys += kPagePositions * kKvBytes<type>) {
      Floats k[kAttentionRuns];
      unroll<kAttentionRuns>([&](auto i) ELUTQ_FLAT { k[i] = load_kv<type>(keys + i * kLanes * kKvBytes<type>); });
      prefetch<kAttentionRuns * kLanes * kKvBytes<type>>(keys + ahead);
      unroll<rows>([&](auto r) ELUTQ_FLAT {
        const Floats v = splat(q[r][d]);
        unroll<kAttentionRuns>([&](auto i) ELUTQ_FLAT { sums[r][i] = fma(v, k[i], sums[r][i]); });
      });
    }
    const auto* scales = reinterpret_cast<const float*>(page + layout.scales_offset()) + first;
    unroll<rows>([&](auto r) ELUTQ_FLAT {
      unroll<kAttentionRuns>([&](auto i) ELUTQ_FLAT {
        Floats score = splat(section.tile.scale) * sums[r][i];
        if constexpr (type == KvType::kInt8) score = score * load(scales + i * kLanes);
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

/// sums[r] += weights[r][j] * values[j] for `rows` rows, `runs` vectors of columns and j in the range.
template <KvType type, int rows, int runs>
void weigh_columns(const uint8_t* values, int64_t row_bytes, int64_t ahead, Range range, const float* weights,
                   float* sums, int64_t sums_stride) {
  Floats totals[rows][runs];
  unroll<rows>([&](auto r) ELUTQ_FLAT {
    unroll<runs>([&](auto i) ELUTQ_FLAT { totals[r][i] = load(sums + r * sums_stride + i * kLanes); });
  });
  for (int64_t j = range.begin; j < range.end; ++j) {
    Floats v[runs];
    prefetch<runs * kLanes * kKvBytes<type>>(values + j * row_bytes + ahead);
    unroll<runs>([&](auto i)
                     ELUTQ_FLAT { v[i] = load_kv<type>(values + j * row_bytes + i * kLanes * kKvBytes<type>); });
    unroll<rows>([&](auto r) ELUTQ_FLAT {
      const Floats weight = splat(weights[r * kScoreStride + j]);
      unroll<runs>([&](auto i) ELUTQ_FLAT { totals[r][i] = fma(weight, v[i], totals[r][i]); });
    });
  }
  unroll<rows>([&](auto r) ELUTQ_FLAT {
    unroll<runs>([&](auto i) ELUTQ_FLAT { store(totals[r][i], sums + r * sums_stride + i * kLanes); });
  });
}

template <KvType type, int rows>
void weigh_range(const KvLayout& layout, const uint8_t* page, int64_t ahead, Range range, const float* weights,
                 float* sums) {
  const int64_t columns = layout.value_columns();
  const uint8_t* values = page + layout.values_offset();
  int64_t c = 0;
  for (; c + kAttentionRuns * kLanes <= columns; c += kAttentionRuns * kLanes) {
    weigh_columns<type, rows, kAttentionRuns>(values + c * kKvBytes<type>, columns * kKvBytes<type>, ahead, range,
                                              weights, sums + c, partial_floats(layout));
  }
  for (; c < columns; c += kLanes) {
    weigh_columns<type, rows, 1>(values + c * kKvBytes<type>, columns * kKvBytes<type>, ahead, range, weights, sums + c,
                                 partial_floats(layout));
  }
}

/// Adds a page's values to the sums of rows from `row` on. Together they take the positions that all of them see, each
/// by itself those before and after.
template <KvType type, int rows>
void weigh_page(const Section& section, int64_t row, int64_t first, const uint8_t* page, int64_t ahead, float* weights,
                float* sums) {
  const KvLayout& layout = section.tile.layout;
  const auto visible = [&](int64_t r) ELUTQ_FLAT {
    const Range range = section.visible(row + r).within({first, first + kPagePositions});
    return Range{range.begin - first, range.end - first};
  };
  if constexpr (type == KvType::kInt8) {
    const auto* scales = reinterpret_cast<const float*>(page + layout.scales_offset()) + kPagePositions;
    for (int r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < kPagePositions; j += kLanes) {
        float* run = weights + r * kScoreStride + j;
        store(load(run) * load(scales + j), run);
      }
    }
  }
  // Later rows neither begin nor end earlier.
  Range common = {visible(rows - 1).begin, visible(0).end};
  if (common.empty()) common.begin = common.end = kPagePositions;
  const auto alone = [&](int r, Range range) ELUTQ_FLAT {
    range = range.within(visible(r));
    if (range.empty()) return;
    weigh_range<type, 1>(layout, page, ahead, range, weights + r * kScoreStride, sums + r * partial_floats(layout));
  };
  for (int r = 0; r < rows; ++r) alone(r, {0, common.begin});
  if (!common.empty()) weigh_range<type, rows>(layout, page, ahead, common, weights, sums);
  for (int r = 0; r < rows; ++r) alone(r, {common.end, kPagePositions});
}

template <KvType type>
void attend(const Section& section, float* scores, float* partials) {
  const AttentionTile& tile = section.tile;
  const int64_t rows = tile.rows();
  const int64_t stride = partial_floats(tile.layout);
  const Range all = {section.visible(0).begin, section.visible(rows - 1).end};
  const int64_t first_page = all.begin / kPagePositions * kPagePositions;
  // page(rows, row, first position, ...) for all blocks of rows and the pages they see, page by page.
  const auto for_each_page = [&](const auto& visit) {
    for (int64_t first = first_page; first < all.end; first += kPagePositions) {
      for_each_row_block(rows, [&](auto count, int64_t row) ELUTQ_FLAT {
        const Range seen = {section.visible(row).begin, section.visible(row + count - 1).end};
        if (!seen.within({first, first + kPagePositions}).empty()) visit(count, row, first, section.page(first));
      });
    }
  };
  // Bytes from what lies at `offset` in a page to the same in the next; in the last, to `then`, or 0 if that is
  // unknown.
  const auto ahead = [&](int64_t first, int64_t offset, const uint8_t* then) {
    const bool last = first + kPagePositions >= all.end;
    const uint8_t* next = last ? then : section.page(first + kPagePositions) + offset;
    return next == nullptr ? 0 : next - (section.page(first) + offset);
  };
  const int64_t values = tile.layout.values_offset();
  const uint8_t* first_values = section.page(first_page) + values;
  const bool more = section.first_position + kSectionPositions < tile.position + tile.tokens;
  const uint8_t* next_keys = more ? section.page(kSectionPositions) : tile.next;
  for_each_page([&](auto count, int64_t row, int64_t first, const uint8_t* page) ELUTQ_FLAT {
    score_page<type, count>(section, row, page, ahead(first, 0, first_values), scores + row * kScoreStride + first);
  });
  for (int64_t row = 0; row < rows; ++row) {
    const Range range = section.visible(row);
    float* partial = partials + row * stride;
    for (int64_t c = 0; c < stride; ++c) partial[c] = 0.0f;
    if (range.empty()) continue;
    softmax_weights(scores + row * kScoreStride + range.begin, range.end - range.begin, partial[stride - 2],
                    partial[stride - 1]);
  }
  for_each_page([&](auto count, int64_t row, int64_t first, const uint8_t* page) ELUTQ_FLAT {
    weigh_page<type, count>(section, row, first, page, ahead(first, values, next_keys),
                            scores + row * kScoreStride + first, partials + row * stride);
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
    float* row_out = out + row / tile.heads * tile.q_stride + row % tile.heads * head_dim;
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
void store_typed(const KvLayout& layout, const float* key, const float* value, int64_t slot, uint8_t* page) {
  constexpr int64_t kSize = kKvBytes<type>;
  auto* scales = reinterpret_cast<float*>(page + layout.scales_offset()) + slot;
  convert_kv<type>(key, layout.head_dim, scales, [&](int64_t c, const uint8_t* element) ELUTQ_FLAT {
    std::memcpy(page + (c * kPagePositions + slot) * kSize, element, kSize);
  });
  uint8_t* row = page + layout.values_offset() + slot * layout.value_columns() * kSize;
  convert_kv<type>(value, layout.head_dim, scales + kPagePositions,
                   [&](int64_t c, const uint8_t* element) ELUTQ_FLAT { std::memcpy(row + c * kSize, element, kSize); });
}

void store_kv(const KvLayout& layout, const float* key, const float* value, int64_t slot, uint8_t* page) {
  const auto store_as = layout.type == KvType::kFloat16 ? store_typed<KvType::kFloat16> : store_typed<KvType::kInt8>;
  store_as(layout, key, value, slot, page);
}

}  // namespace
}  // namespace elutq
