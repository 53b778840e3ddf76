#include "solver/dequantize.h"

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

/// Element `index` of scales or zeros, which hold fp16 or, `in_bytes`, Byte.
template <typename Byte>
float parameter(const void* values, int64_t index, bool in_bytes) {
  if (in_bytes) return static_cast<float>(static_cast<const Byte*>(values)[index]);
  return half_to_float(static_cast<const uint16_t*>(values)[index]);
}

}  // namespace

void dequantize_row(const FitProblem& problem, const QuantizedView& matrix, int64_t row, float* to) {
  const int64_t columns = problem.in_features;
  const int64_t row_bytes = (columns + kBlock - 1) / kBlock;
  const int64_t groups = (columns + problem.group_size - 1) / problem.group_size;
  const bool in_bytes = matrix.row_scales != nullptr;
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
      float* value = to + column;
      for (int j = 0; j < kBlock; ++j) value[j] = zero;
      for (int p = 0; p < problem.bits; ++p) {
        const uint8_t byte = matrix.planes[(p * problem.out_features + row) * row_bytes + column / kBlock];
        for (int j = 0; j < kBlock; ++j) value[j] += kBits[byte][j] * scales[p];
      }
      for (int j = 0; j < kBlock; ++j) value[j] *= row_scale;
      for (int64_t j = end - column; j < kBlock; ++j) value[j] = 0.0f;  // past the last column
    }
  }
}

void dequantize(const FitProblem& problem, const QuantizedView& matrix, float* to, ThreadPool& pool) {
  check_dimensions(problem);
  const int64_t columns = problem.in_features;
  pool.run((problem.out_features + kRowsPerPart - 1) / kRowsPerPart, [&](int64_t part) {
    std::vector<float> padded((columns + kBlock - 1) / kBlock * kBlock);
    const int64_t row_end = std::min((part + 1) * kRowsPerPart, problem.out_features);
    for (int64_t row = part * kRowsPerPart; row < row_end; ++row) {
      dequantize_row(problem, matrix, row, padded.data());
      std::copy_n(padded.data(), columns, to + row * columns);
    }
  });
}

}  // namespace elutq
