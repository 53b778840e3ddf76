#include "kernels/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

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
  const int64_t index = (row * shape.groups() + group) * shape.bits + plane;
  if (shape.param_bits == 8) return static_cast<const uint8_t*>(matrix.scales)[index];
  return half_to_float(static_cast<const uint16_t*>(matrix.scales)[index]);
}

float zero_of(const HlqView& matrix, int64_t row, int64_t group) {
  const int64_t index = row * matrix.shape.groups() + group;
  if (matrix.shape.param_bits == 8) return static_cast<const int8_t*>(matrix.zeros)[index];
  return half_to_float(static_cast<const uint16_t*>(matrix.zeros)[index]);
}

/// What a row's weights are multiplied by in the end.
float row_scale_of(const HlqView& matrix, int64_t row) {
  return matrix.shape.param_bits == 8 ? half_to_float(matrix.row_scales[row]) : 1.0f;
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
  return row_scale_of(matrix, row) * w;
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
    const auto largest_entry = [&](int64_t slot) {
      float largest = 0.0f;
      for (int pattern = 0; pattern < 16; ++pattern) largest = std::max(largest, std::fabs(entry(slot, pattern)));
      return largest;
    };
    float largest = 0.0f;  // sum of the two slots of a pair
    for (int64_t slot = begin / kSlotColumns; slot < slot_end; ++slot) {
      if (slot % 8 < 4) largest = std::max(largest, largest_entry(slot) + largest_entry(slot + 4));
    }
    const bool negligible = largest < 0x1p-100f;
    const float inverse = negligible ? 0.0f : kLargestPair / largest;
    tables.scales[segment] = negligible ? 0.0f : largest / kLargestPair;
    tables.sums[segment] = sum(x + begin, end - begin);
    for (int64_t slot = begin / kSlotColumns; slot < slot_end; ++slot) {
      for (int pattern = 0; pattern < 16; ++pattern) {
        // One rounding: the product of two floats is exact in double.
        const double scaled = static_cast<double>(entry(slot, pattern)) * static_cast<double>(inverse);
        tables.entries[slot * 16 + pattern] = static_cast<uint8_t>(64 + static_cast<int>(std::nearbyint(scaled)));
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
    total += static_cast<int8_t>(tables.entries[first / kSlotColumns * 16 + pattern] - 64);
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
      y[token * y_stride + row] = row_scale_of(matrix, row) * acc;
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
      w *= row_scale_of(matrix, row);
      for (int64_t token = 0; token < tokens; ++token) {
        y[token * shape.out_features + row] += w * x[token * shape.in_features + column];
      }
    }
  }
}

float exp(float x) {
  x = std::min(88.0f, std::max(-87.0f, x));
  const float shifted = std::fma(x, 1.44269504f, 0x1.8p23f);
  const float n = shifted - 0x1.8p23f;
  float r = std::fma(n, -0.693359375f, x);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  for (const float coefficient :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = std::fma(p, r, coefficient);
  }
  p = std::fma(p, r * r, r) + 1.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
}

void attention(const float* query, const float* keys, const float* values, const float* key_scales,
               const float* value_scales, int64_t begin, int64_t positions, int64_t head_dim, float scale, float* out) {
  struct Partial {
    float largest;
    float sum;
    std::vector<float> value;
  };
  std::vector<Partial> partials;
  for (int64_t first = 0; first < positions;) {
    const int64_t section_end = (begin + first) / kSectionPositions * kSectionPositions + kSectionPositions;
    const int64_t count = std::min(positions - first, section_end - (begin + first));
    std::vector<float> weights;
    for (int64_t j = first; j < first + count; ++j) {
      float score = 0.0f;
      for (int64_t d = 0; d < head_dim; ++d) score = std::fma(query[d], keys[j * head_dim + d], score);
      score = scale * score;
      weights.push_back(key_scales == nullptr ? score : score * key_scales[j]);
    }
    Partial partial{*std::max_element(weights.begin(), weights.end()), 0.0f, std::vector<float>(head_dim)};
    for (float& weight : weights) weight = exp(weight - partial.largest);
    partial.sum = sum(weights.data(), count);
    for (int64_t j = 0; j < count; ++j) {
      const float weight = value_scales == nullptr ? weights[j] : weights[j] * value_scales[first + j];
      for (int64_t d = 0; d < head_dim; ++d) {
        partial.value[d] = std::fma(weight, values[(first + j) * head_dim + d], partial.value[d]);
      }
    }
    partials.push_back(partial);
    first += count;
  }
  float most = partials[0].largest;
  for (const Partial& partial : partials) most = std::max(most, partial.largest);
  float total = 0.0f;
  for (const Partial& partial : partials) total = std::fma(exp(partial.largest - most), partial.sum, total);
  for (int64_t d = 0; d < head_dim; ++d) {
    float value = 0.0f;
    for (const Partial& partial : partials) value = std::fma(exp(partial.largest - most), partial.value[d], value);
    out[d] = value * (1.0f / total);
  }
}

}  // namespace elutq::reference
