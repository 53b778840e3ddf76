// y = W x from lookup tables: which rows and tokens go together.

namespace elutq {
namespace {

/// Takes `count` tokens at a time off the front while they last.
template <int bits, int param_bits, int count>
ELUTQ_INLINE void take_tokens(const Layout& layout, const uint8_t* packed, const TableView*& tables, int64_t& tokens,
                              int64_t row_begin, int64_t row_end, float*& y, int64_t y_stride) {
  for (; tokens >= count; tokens -= count, tables += count, y += count * y_stride) {
    multiply_chunk<bits, param_bits, count>(layout, packed, tables, row_begin, row_end, y, y_stride);
  }
}

/// Takes all off the front that go together in large numbers.
template <int bits, int param_bits>
ELUTQ_INLINE void take_many(const Layout& layout, const uint8_t* packed, const TableView*& tables, int64_t& tokens,
                            int64_t row_begin, int64_t row_end, float*& y, int64_t y_stride) {
  while (tokens >= kManyTokens[bits]) {
    const int64_t count = min_of(tokens, kTokensAtOnce);
    for_each_panel(row_begin, row_end, [&](int64_t row, int64_t rows) {
      multiply_many<Lookup, bits, param_bits>(layout, packed, tables, count, row, rows, y, y_stride);
    });
    tokens -= count;
    tables += count;
    y += count * y_stride;
  }
}

// The rows of one chunk, read again for all passes, stay in the second-level cache.
constexpr int64_t kChunkBytes = 384 * 1024;

template <int bits, int param_bits>
void matmul_bits(const HlqShape& shape, const uint8_t* packed, const TableView* tables, int64_t tokens,
                 int64_t row_begin, int64_t row_end, float* y, int64_t y_stride) {
  const Layout layout(shape);
  const int64_t panels = tokens == 1 ? (row_end - row_begin) : kChunkBytes / (layout.tile_bytes * kPanelTiles);
  const int64_t chunk = (panels > 0 ? panels : 1) * kPanelRows;
  for (int64_t begin = row_begin; begin < row_end; begin += chunk) {
    const int64_t end = min_of(begin + chunk, row_end);
    const TableView* next = tables;
    int64_t left = tokens;
    float* to = y;
    constexpr int kMost = kMostTokens[bits];
    if constexpr (kManyTokens[bits] > 0) {
      take_many<bits, param_bits>(layout, packed, next, left, begin, end, to, y_stride);
    }
    take_tokens<bits, param_bits, kMost>(layout, packed, next, left, begin, end, to, y_stride);
    if constexpr (kMost > 4) take_tokens<bits, param_bits, 4>(layout, packed, next, left, begin, end, to, y_stride);
    if constexpr (kMost > 2) take_tokens<bits, param_bits, 2>(layout, packed, next, left, begin, end, to, y_stride);
    if constexpr (kMost > 1) take_tokens<bits, param_bits, 1>(layout, packed, next, left, begin, end, to, y_stride);
  }
}

void matmul(const HlqShape& shape, const uint8_t* packed, const TableView* tables, int64_t tokens, int64_t row_begin,
            int64_t row_end, float* y, int64_t y_stride) {
  constexpr decltype(&matmul) kMatmuls[][kMaxBits] = {
      {matmul_bits<1, 16>, matmul_bits<2, 16>, matmul_bits<3, 16>, matmul_bits<4, 16>},
      {matmul_bits<1, 8>, matmul_bits<2, 8>, matmul_bits<3, 8>, matmul_bits<4, 8>},
  };
  kMatmuls[shape.param_bits == 8][shape.bits - 1](shape, packed, tables, tokens, row_begin, row_end, y, y_stride);
}

}  // namespace
}  // namespace elutq
