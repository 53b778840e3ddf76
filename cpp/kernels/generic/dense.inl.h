// Products with matrices of plain floats: 16 lanes per output, column c in lane c % 16, folded at the end. A block of
// rows and tokens shares its loads; the block's shape never changes an output's own order of additions.

namespace elutq {
namespace {

template <DenseType type>
constexpr int64_t kWeightBytes = type == DenseType::kFloat32 ? 4 : 2;

template <DenseType type>
ELUTQ_INLINE Floats load_weights(const uint8_t* from) {
  if constexpr (type == DenseType::kFloat32) {
    return load(from);
  } else if constexpr (type == DenseType::kFloat16) {
    return load_half(from);
  } else {
    return load_bfloat16(from);
  }
}

template <DenseType type>
ELUTQ_INLINE Floats load_weights_part(const uint8_t* from, int64_t count) {
  uint8_t padded[kLanes * kWeightBytes<type>] = {};
  std::memcpy(padded, from, static_cast<size_t>(count * kWeightBytes<type>));
  return load_weights<type>(padded);
}

/// rows x tokens outputs over `columns` columns. kAdd: onto what y holds.
template <DenseType type, bool kAdd, int rows, int tokens>
void dense_block(const uint8_t* weights, int64_t row_bytes, int64_t columns, const float* x, int64_t x_stride, float* y,
                 int64_t y_stride) {
  Floats sums[rows][tokens] = {};
  const auto step = [&](auto load_w, auto load_x) ELUTQ_FLAT {
    Floats w[rows];
    unroll<rows>([&](auto r) ELUTQ_FLAT { w[r] = load_w(weights + r * row_bytes); });
    unroll<tokens>([&](auto t) ELUTQ_FLAT {
      const Floats v = load_x(x + t * x_stride);
      unroll<rows>([&](auto r) ELUTQ_FLAT { sums[r][t] = fma(w[r], v, sums[r][t]); });
    });
  };
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    step([c](const uint8_t* row) { return load_weights<type>(row + c * kWeightBytes<type>); },
         [c](const float* token) { return load(token + c); });
  }
  if (c < columns) {
    const int64_t left = columns - c;
    step([c, left](const uint8_t* row) { return load_weights_part<type>(row + c * kWeightBytes<type>, left); },
         [c, left](const float* token) { return load_part(token + c, left); });
  }
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < rows; ++r) {
      float& out = y[t * y_stride + r];
      const float sum = reduce_add(sums[r][t]);
      out = kAdd ? out + sum : sum;
    }
  }
}

template <DenseType type, bool kAdd, int rows>
void dense_rows(const uint8_t* weights, int64_t row_bytes, int64_t columns, const float* x, int64_t x_stride,
                int64_t tokens, float* y, int64_t y_stride) {
  int64_t t = 0;
  for (; t + kDenseTokens <= tokens; t += kDenseTokens) {
    dense_block<type, kAdd, rows, kDenseTokens>(weights, row_bytes, columns, x + t * x_stride, x_stride,
                                                y + t * y_stride, y_stride);
  }
  for (; t < tokens; ++t) {
    dense_block<type, kAdd, rows, 1>(weights, row_bytes, columns, x + t * x_stride, x_stride, y + t * y_stride,
                                     y_stride);
  }
}

/// weights: first of `rows` rows that are row_bytes apart; y: their first output.
template <DenseType type, bool kAdd>
void dense(const uint8_t* weights, int64_t row_bytes, int64_t columns, const float* x, int64_t x_stride, int64_t tokens,
           int64_t rows, float* y, int64_t y_stride) {
  int64_t r = 0;
  for (; r + kDenseRows <= rows; r += kDenseRows) {
    dense_rows<type, kAdd, kDenseRows>(weights + r * row_bytes, row_bytes, columns, x, x_stride, tokens, y + r,
                                       y_stride);
  }
  for (; r < rows; ++r) {
    dense_rows<type, kAdd, 1>(weights + r * row_bytes, row_bytes, columns, x, x_stride, tokens, y + r, y_stride);
  }
}

template <DenseType type>
void dense_range(const void* weights, int64_t in_features, const float* x, int64_t x_stride, int64_t tokens,
                 int64_t row_begin, int64_t row_end, float* y, int64_t y_stride) {
  const int64_t row_bytes = in_features * kWeightBytes<type>;
  dense<type, false>(static_cast<const uint8_t*>(weights) + row_begin * row_bytes, row_bytes, in_features, x, x_stride,
                     tokens, row_end - row_begin, y + row_begin, y_stride);
}

void matmul_dense(DenseType type, const void* weights, int64_t in_features, const float* x, int64_t x_stride,
                  int64_t tokens, int64_t row_begin, int64_t row_end, float* y, int64_t y_stride) {
  switch (type) {
    case DenseType::kFloat32:
      return dense_range<DenseType::kFloat32>(weights, in_features, x, x_stride, tokens, row_begin, row_end, y,
                                              y_stride);
    case DenseType::kFloat16:
      return dense_range<DenseType::kFloat16>(weights, in_features, x, x_stride, tokens, row_begin, row_end, y,
                                              y_stride);
    case DenseType::kBFloat16:
      return dense_range<DenseType::kBFloat16>(weights, in_features, x, x_stride, tokens, row_begin, row_end, y,
                                               y_stride);
  }
}

/// HLQ rows against fp32 activations: a few rows at a time are dequantized, kExactColumns columns of them, and
/// multiplied as floats. One output adds its runs of kExactColumns columns in order.
constexpr int64_t kExactColumns = 1024;
constexpr int64_t kExactRows = 4;

void matmul_exact(const HlqShape& shape, const uint8_t* packed, const float* x, int64_t x_stride, int64_t tokens,
                  int64_t row_begin, int64_t row_end, float* y, int64_t y_stride) {
  const Layout layout(shape);
  const auto unpack = shape.param_bits == 8 ? unpack_columns<8> : unpack_columns<16>;
  alignas(64) float weights[kExactRows * kExactColumns];
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(weights);
  for (int64_t row = row_begin; row < row_end; row += kExactRows) {
    const int64_t rows = min_of(kExactRows, row_end - row);
    for (int64_t begin = 0; begin < shape.in_features; begin += kExactColumns) {
      const int64_t end = min_of(begin + kExactColumns, shape.in_features);
      for (int64_t r = 0; r < rows; ++r) {
        unpack(layout, packed, row + r, begin, end, weights + r * kExactColumns);
      }
      const auto multiply = begin == 0 ? dense<DenseType::kFloat32, false> : dense<DenseType::kFloat32, true>;
      multiply(bytes, kExactColumns * 4, end - begin, x + begin, x_stride, tokens, rows, y + row, y_stride);
    }
  }
}

template <DenseType type>
void convert(const uint8_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load_weights<type>(from + i * kWeightBytes<type>), to + i);
  if (i < count) store_part(load_weights_part<type>(from + i * kWeightBytes<type>, count - i), to + i, count - i);
}

void to_float(DenseType type, const void* from, int64_t count, float* to) {
  const auto* bytes = static_cast<const uint8_t*>(from);
  switch (type) {
    case DenseType::kFloat32:
      return convert<DenseType::kFloat32>(bytes, count, to);
    case DenseType::kFloat16:
      return convert<DenseType::kFloat16>(bytes, count, to);
    case DenseType::kBFloat16:
      return convert<DenseType::kBFloat16>(bytes, count, to);
  }
}

}  // namespace
}  // namespace elutq
