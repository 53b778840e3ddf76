#include "solver/squared_error.h"

#include <algorithm>
#include <vector>

#include "base/half.h"

namespace elutq {
namespace {

constexpr int kBlock = 8;
constexpr int64_t kRowsPerPart = 16;

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

/// Sums over rows [row_begin, row_end). Eight columns add up side by side.
SquaredError add_rows(const FitProblem& problem, const QuantizedView& matrix, int64_t row_begin, int64_t row_end) {
  const int64_t padded = (problem.in_features + kBlock - 1) / kBlock * kBlock;
  std::vector<float> exact(padded, 0.0f);
  std::vector<float> values(padded);
  double error[kBlock] = {};
  double norm[kBlock] = {};
  for (int64_t row = row_begin; row < row_end; ++row) {
    load_row(problem, row, exact.data());
    dequantize_row(problem, matrix, row, values.data());
    for (int64_t column = 0; column < padded; column += kBlock) {
      for (int j = 0; j < kBlock; ++j) {
        const double w = exact[column + j];
        const double difference = w - static_cast<double>(values[column + j]);
        error[j] += difference * difference;
        norm[j] += w * w;
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
