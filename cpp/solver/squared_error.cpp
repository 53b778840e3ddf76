#include "solver/squared_error.h"

#include <algorithm>
#include <array>
#include <vector>

#include "base/half.h"

namespace elutq {
namespace {

constexpr int kBlock = 8;  // columns that share a byte of each plane
constexpr int64_t kRowsPerPart = 16;

/// Bit j of each byte as a number: a plane adds kBits[byte][j] * scale, which is exact.
constexpr auto kBits = [] {
  std::array<std::array<float, kBlock>, 256> bits{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int j = 0; j < kBlock; ++j) bits[byte][j] = static_cast<float>(byte >> j & 1);
  }
  return bits;
}();

void load_row(const FitProblem& problem, int64_t row, float* to) {
  const int64_t count = problem.in_features;
  if (problem.type == WeightType::kFloat32) {
    std::copy_n(static_cast<const float*>(problem.weights) + row * count, count, to);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(problem.weights) + row * count;
  if (problem.type == WeightType::kFloat16) {
    for (int64_t k = 0; k < count; ++k) to[k] = half_to_float(from[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) to[k] = bfloat16_to_float(from[k]);
  }
}

/// Element `index` of scales or zeros, which hold fp16 or, `in_bytes`, Byte.
template <typename Byte>
float parameter(const void* values, int64_t index, bool in_bytes) {
  if (in_bytes) return static_cast<float>(static_cast<const Byte*>(values)[index]);
  return half_to_float(static_cast<const uint16_t*>(values)[index]);
}

/// Sums over rows [row_begin, row_end). The eight columns of a byte add up side by side.
SquaredError add_rows(const FitProblem& problem, const QuantizedView& matrix, int64_t row_begin, int64_t row_end) {
  const int64_t columns = problem.in_features;
  const int64_t row_bytes = (columns + kBlock - 1) / kBlock;
  const int64_t groups = (columns + problem.group_size - 1) / problem.group_size;
  const bool in_bytes = matrix.row_scales != nullptr;
  std::vector<float> exact(row_bytes * kBlock, 0.0f);
  double error[kBlock] = {};
  double norm[kBlock] = {};
  for (int64_t row = row_begin; row < row_end; ++row) {
    load_row(problem, row, exact.data());
    const float row_scale = in_bytes ? half_to_float(matrix.row_scales[row]) : 1.0f;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t index = row * groups + group;
      const float zero = parameter<int8_t>(matrix.zeros, index, in_bytes);
      float scales[kSearchMaxBits];
      for (int p = 0; p < problem.bits; ++p) {
        scales[p] = parameter<uint8_t>(matrix.scales, index * problem.bits + p, in_bytes);
      }
      const int64_t end = std::min(columns, (group + 1) * problem.group_size);
      for (int64_t column = group * problem.group_size; column < end; column += kBlock) {
        float value[kBlock];
        for (int j = 0; j < kBlock; ++j) value[j] = zero;
        for (int p = 0; p < problem.bits; ++p) {
          const uint8_t byte = matrix.planes[(p * problem.out_features + row) * row_bytes + column / kBlock];
          for (int j = 0; j < kBlock; ++j) value[j] += kBits[byte][j] * scales[p];
        }
        for (int64_t j = end - column; j < kBlock; ++j) value[j] = 0.0f;  // past the last column
        const float* w = exact.data() + column;
        for (int j = 0; j < kBlock; ++j) {
          const double difference = static_cast<double>(w[j]) - static_cast<double>(row_scale * value[j]);
          error[j] += difference * difference;
          norm[j] += static_cast<double>(w[j]) * static_cast<double>(w[j]);
        }
      }
    }
  }
  SquaredError total;
  for (int j = 0; j < kBlock; ++j) {
    total.error += error[j];
    total.norm += norm[j];
  }
  return total;
}

}  // namespace

SquaredError squared_error(const FitProblem& problem, const QuantizedView& matrix, ThreadPool& pool) {
  check_dimensions(problem);
  std::vector<SquaredError> parts((problem.out_features + kRowsPerPart - 1) / kRowsPerPart);
  pool.run(static_cast<int64_t>(parts.size()), [&](int64_t part) {
    parts[part] =
        add_rows(problem, matrix, part * kRowsPerPart, std::min((part + 1) * kRowsPerPart, problem.out_features));
  });
  SquaredError total;
  for (const SquaredError& part : parts) {
    total.error += part.error;
    total.norm += part.norm;
  }
  return total;
}

}  // namespace elutq
