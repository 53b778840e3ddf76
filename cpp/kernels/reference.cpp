#include "kernels/reference.h"

#include <algorithm>
#include <cmath>

#include "base/half.h"

namespace elutq::reference {
namespace {

float fold_lanes(float (&lanes)[16]) {
  for (int width = 8; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

float scale_of(const HlqView& matrix, int plane, int64_t row, int64_t group) {
  const HlqShape& shape = matrix.shape;
  return half_to_float(matrix.scales[(row * shape.groups() + group) * shape.bits + plane]);
}

float zero_of(const HlqView& matrix, int64_t row, int64_t group) {
  return half_to_float(matrix.zeros[row * matrix.shape.groups() + group]);
}

}  // namespace

int bit(const HlqView& matrix, int plane, int64_t row, int64_t column) {
  const int64_t row_bytes = (matrix.shape.in_features + 7) / 8;
  const int64_t byte = (plane * matrix.shape.out_features + row) * row_bytes + column / 8;
  return (matrix.planes[byte] >> (column % 8)) & 1;
}

float weight(const HlqView& matrix, int64_t row, int64_t column) {
  const int64_t group = column / matrix.shape.group_size;
  float w = zero_of(matrix, row, group);
  for (int p = 0; p < matrix.shape.bits; ++p) {
    w = std::fma(scale_of(matrix, p, row, group), static_cast<float>(bit(matrix, p, row, column)), w);
  }
  return w;
}

float sum(const float* values, int64_t count) {
  float lanes[16] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % 16] += values[i];
  return fold_lanes(lanes);
}

float sum_of_products(const float* a, const float* b, int64_t count) {
  float lanes[16] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % 16] = std::fma(a[i], b[i], lanes[i % 16]);
  return fold_lanes(lanes);
}

void build_tables(const float* x, int64_t in_features, int64_t segment_size, TableView tables) {
  const HlqShape shape{.out_features = 0, .in_features = in_features, .bits = 1, .group_size = segment_size};
  const auto entry = [&](int64_t slot, int pattern) {
    float signed_x[kSlotColumns];
    for (int j = 0; j < kSlotColumns; ++j) {
      const int64_t column = slot * kSlotColumns + j;
      const float value = column < in_features ? x[column] : 0.0f;
      signed_x[j] = (pattern >> j & 1) != 0 ? value : -value;
    }
    return 0.5f * ((signed_x[0] + signed_x[1]) + (signed_x[2] + signed_x[3]));
  };
  for (int64_t segment = 0; segment < shape.segments(); ++segment) {
    const int64_t begin = segment * segment_size;
    const int64_t end = std::min(begin + segment_size, in_features);
    // The last segment covers the padding too, whose entries are all zero.
    const int64_t slot_end = segment + 1 == shape.segments() ? shape.slots() : end / kSlotColumns;
    float largest = 0.0f;
    for (int64_t slot = begin / kSlotColumns; slot < slot_end; ++slot) {
      for (int pattern = 0; pattern < 16; ++pattern) largest = std::max(largest, std::fabs(entry(slot, pattern)));
    }
    const bool negligible = largest < 0x1p-100f;
    const float inverse = negligible ? 0.0f : 127.0f / largest;
    tables.scales[segment] = negligible ? 0.0f : largest / 127.0f;
    tables.sums[segment] = sum(x + begin, end - begin);
    for (int64_t slot = begin / kSlotColumns; slot < slot_end; ++slot) {
      for (int pattern = 0; pattern < 16; ++pattern) {
        // One rounding: the product of two floats is exact in double.
        const double scaled = static_cast<double>(entry(slot, pattern)) * static_cast<double>(inverse);
        tables.entries[slot * 16 + pattern] = static_cast<uint8_t>(128 + static_cast<int>(std::nearbyint(scaled)));
      }
    }
  }
}

int32_t segment_sum(const HlqView& matrix, const TableView& tables, int plane, int64_t row, int64_t segment) {
  const HlqShape& shape = matrix.shape;
  const int64_t begin = segment * shape.segment_size();
  const int64_t end = std::min(begin + shape.segment_size(), shape.in_features);
  int32_t total = 0;
  for (int64_t first = begin; first < end; first += kSlotColumns) {
    int pattern = 0;
    for (int64_t column = first; column < std::min(first + kSlotColumns, end); ++column) {
      pattern |= bit(matrix, plane, row, column) << (column - first);
    }
    total += tables.entries[first / kSlotColumns * 16 + pattern] - 128;
  }
  return total;
}

void matmul(const HlqView& matrix, const TableView* tables, int64_t tokens, float* y, int64_t y_stride) {
  const HlqShape& shape = matrix.shape;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t row = 0; row < shape.out_features; ++row) {
      float acc = 0.0f;
      for (int64_t segment = 0; segment < shape.segments(); ++segment) {
        const int64_t group = segment * shape.segment_size() / shape.group_size;
        float u = 0.0f;
        float mid = zero_of(matrix, row, group);
        for (int p = 0; p < shape.bits; ++p) {
          const float scale = scale_of(matrix, p, row, group);
          const auto total = static_cast<float>(segment_sum(matrix, tables[token], p, row, segment));
          u = p == 0 ? scale * total : std::fma(scale, total, u);
          mid = std::fma(0.5f, scale, mid);
        }
        acc = std::fma(u, tables[token].scales[segment], acc);
        acc = std::fma(mid, tables[token].sums[segment], acc);
      }
      y[token * y_stride + row] = acc;
    }
  }
}

void matmul_double(const HlqView& matrix, const float* x, int64_t tokens, double* y) {
  const HlqShape& shape = matrix.shape;
  for (int64_t row = 0; row < shape.out_features; ++row) {
    for (int64_t token = 0; token < tokens; ++token) y[token * shape.out_features + row] = 0.0;
    for (int64_t column = 0; column < shape.in_features; ++column) {
      const int64_t group = column / shape.group_size;
      double w = zero_of(matrix, row, group);
      for (int p = 0; p < shape.bits; ++p)
        w += bit(matrix, p, row, column) * static_cast<double>(scale_of(matrix, p, row, group));
      for (int64_t token = 0; token < tokens; ++token) {
        y[token * shape.out_features + row] += w * x[token * shape.in_features + column];
      }
    }
  }
}

}  // namespace elutq::reference
