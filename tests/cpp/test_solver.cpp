#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/aligned.h"
#include "base/cpu_features.h"
#include "base/half.h"
#include "base/thread_pool.h"
#include "solver/hlq_fit.h"
#include "solver/learned_rounding.h"

using namespace elutq;

namespace {

constexpr FitMethod kMethods[] = {FitMethod::kHlq, FitMethod::kAo, FitMethod::kUniform, FitMethod::kRtn};

std::vector<float> random_weights(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> weights(count);
  for (float& w : weights) w = normal(random);
  return weights;
}

struct Matrix {
  std::vector<uint8_t> planes;
  std::vector<uint16_t> scales;
  std::vector<uint16_t> zeros;
  float largest = 0.0f;

  bool operator==(const Matrix&) const = default;
};

/// Fits with `threads` threads; outputs start as ones, so that what is not written shows.
Matrix fit(FitProblem problem, const std::vector<float>& weights, int threads = 1) {
  problem.weights = weights.data();
  const int64_t groups = (problem.in_features + problem.group_size - 1) / problem.group_size;
  Matrix matrix;
  matrix.planes.assign(problem.bits * problem.out_features * ((problem.in_features + 7) / 8), 0xff);
  matrix.scales.assign(problem.out_features * groups * problem.bits, 0xffff);
  matrix.zeros.assign(problem.out_features * groups, 0xffff);
  ThreadPool pool(threads);
  matrix.largest = fit_hlq(problem, {matrix.planes.data(), matrix.scales.data(), matrix.zeros.data()}, pool);
  return matrix;
}

FitProblem shape(int64_t rows, int64_t columns, int bits, int64_t group_size) {
  FitProblem problem;
  problem.out_features = rows;
  problem.in_features = columns;
  problem.bits = bits;
  problem.group_size = group_size;
  return problem;
}

double dequantized(const FitProblem& problem, const Matrix& matrix, int64_t row, int64_t column) {
  const int64_t groups = (problem.in_features + problem.group_size - 1) / problem.group_size;
  const int64_t group = row * groups + column / problem.group_size;
  const int64_t row_bytes = (problem.in_features + 7) / 8;
  double w = static_cast<double>(half_to_float(matrix.zeros[group]));
  for (int plane = 0; plane < problem.bits; ++plane) {
    const uint8_t byte = matrix.planes[(plane * problem.out_features + row) * row_bytes + column / 8];
    if (byte >> column % 8 & 1) {
      w += static_cast<double>(half_to_float(matrix.scales[group * problem.bits + plane]));
    }
  }
  return w;
}

struct Build {
  std::string isa;
  void (*search)(GroupBatch& batch);
  int64_t (*scratch_bytes)(int64_t stride);
};

std::vector<Build> runnable_builds() {
  std::vector<Build> builds = {{"generic", solver_generic::search, solver_generic::scratch_bytes}};
#if defined(__x86_64__)
  if (cpu_features().avx2) builds.push_back({"avx2", solver_avx2::search, solver_avx2::scratch_bytes});
  if (cpu_features().avx512) builds.push_back({"avx512", solver_avx512::search, solver_avx512::scratch_bytes});
#endif
  return builds;
}

struct BatchResult {
  std::vector<uint8_t> codes;
  std::vector<float> parameters;

  bool operator==(const BatchResult&) const = default;
};

BatchResult run(const Build& build, GroupBatch batch) {
  AlignedBuffer<uint8_t> scratch(build.scratch_bytes(batch.stride));
  BatchResult result;
  result.codes.assign(batch.lanes * batch.stride, 0);
  batch.codes = result.codes.data();
  batch.scratch = scratch.data();
  build.search(batch);
  for (int lane = 0; lane < batch.lanes; ++lane) {
    result.parameters.push_back(batch.zeros[lane]);
    for (int plane = 0; plane < batch.bits; ++plane) result.parameters.push_back(batch.scales[lane][plane]);
  }
  return result;
}

}  // namespace

TEST_CASE("all instruction sets return the same bits") {
  const std::vector<Build> builds = runnable_builds();
  for (const int64_t stride : {1, 5, 32, 100, 128, 300}) {
    const std::vector<float> weights = random_weights(kSearchLanes * stride, 1);
    std::vector<float> importance(stride);
    for (int64_t k = 0; k < stride; ++k) importance[k] = static_cast<float>(k % 5 + 1) / 5;
    for (int bits = 1; bits <= 4; ++bits) {
      for (const FitMethod method : kMethods) {
        for (const bool weighted : {false, true}) {
          GroupBatch batch;
          batch.bits = bits;
          batch.method = method;
          batch.lanes = 13;
          batch.stride = stride;
          batch.values = weights.data();
          for (int lane = 0; lane < batch.lanes; ++lane) {
            batch.counts[lane] = lane % 3 == 0 ? (stride + 1) / 2 : stride;
            if (weighted) batch.importances[lane] = importance.data();
          }
          const BatchResult expected = run(builds[0], batch);
          for (const Build& build : builds) {
            CAPTURE(build.isa);
            CAPTURE(stride);
            CAPTURE(bits);
            CHECK(run(build, batch) == expected);
          }
        }
      }
    }
  }
}

TEST_CASE("the result does not depend on threads") {
  const std::vector<float> weights = random_weights(700 * 200, 2);
  for (const int64_t group_size : {32, 200}) {
    const FitProblem problem = shape(700, 200, 2, group_size);
    const Matrix expected = fit(problem, weights, 1);
    CHECK(fit(problem, weights, 2) == expected);
    CHECK(fit(problem, weights, 5) == expected);
  }
}

TEST_CASE("a row alone gives what it gives among others, tail included") {
  const int64_t columns = 37;
  const std::vector<float> weights = random_weights(20 * columns, 3);
  const Matrix whole = fit(shape(20, columns, 3, 32), weights);
  for (int64_t row = 0; row < 20; ++row) {
    const std::vector<float> alone(weights.begin() + row * columns, weights.begin() + (row + 1) * columns);
    const FitProblem problem = shape(1, columns, 3, 32);
    const Matrix matrix = fit(problem, alone);
    for (int64_t k = 0; k < columns; ++k) {
      CHECK(dequantized(problem, matrix, 0, k) == dequantized(shape(20, columns, 3, 32), whole, row, k));
    }
  }
}

TEST_CASE("bits past the last column are zero") {
  const Matrix matrix = fit(shape(9, 13, 2, 13), random_weights(9 * 13, 4));
  for (size_t byte = 1; byte < matrix.planes.size(); byte += 2) CHECK((matrix.planes[byte] >> 5) == 0);
}

TEST_CASE("two clusters are found exactly by every method but the clipped grid") {
  std::vector<float> weights(128);
  for (size_t k = 0; k < weights.size(); ++k) weights[k] = k % 3 == 0 ? 1.5f : -0.25f;
  for (const FitMethod method : {FitMethod::kHlq, FitMethod::kAo, FitMethod::kRtn}) {
    FitProblem problem = shape(1, 128, 1, 128);
    problem.method = method;
    const Matrix matrix = fit(problem, weights);
    for (int64_t k = 0; k < 128; ++k) CHECK(dequantized(problem, matrix, 0, k) == static_cast<double>(weights[k]));
  }
}

TEST_CASE("one bit reaches the best split of every group") {
  const FitProblem problem = shape(50, 64, 1, 64);
  const std::vector<float> weights = random_weights(50 * 64, 5);
  const Matrix matrix = fit(problem, weights);
  double found = 0.0;
  double least = 0.0;
  for (int64_t row = 0; row < 50; ++row) {
    std::vector<double> x(weights.begin() + row * 64, weights.begin() + (row + 1) * 64);
    for (int64_t k = 0; k < 64; ++k) found += std::pow(x[k] - dequantized(problem, matrix, row, k), 2);
    std::sort(x.begin(), x.end());
    double best = std::numeric_limits<double>::infinity();
    for (size_t split = 1; split < x.size(); ++split) {
      double error = 0.0;
      for (const auto& [begin, end] : {std::pair<size_t, size_t>{0, split}, {split, x.size()}}) {
        double mean = 0.0;
        for (size_t k = begin; k < end; ++k) mean += x[k] / static_cast<double>(end - begin);
        for (size_t k = begin; k < end; ++k) error += (x[k] - mean) * (x[k] - mean);
      }
      best = std::min(best, error);
    }
    least += best;
  }
  CHECK(found >= least);
  CHECK(found <= 1.001 * least);
}

TEST_CASE("the largest magnitude is returned, or one that cannot be stored") {
  const FitProblem problem = shape(40, 64, 2, 32);
  const auto largest = [&](float value) {
    std::vector<float> weights(40 * 64, 1.0f);
    weights[1000] = value;
    return fit(problem, weights, 2).largest;
  };
  CHECK(largest(-3.0f) == 3.0f);
  CHECK(largest(-70000.0f) == 70000.0f);
  CHECK(std::isinf(largest(-std::numeric_limits<float>::infinity())));
  CHECK(std::isnan(largest(std::numeric_limits<float>::quiet_NaN())));
}

TEST_CASE("16-bit weights are read as what they stand for") {
  const std::vector<float> source = random_weights(4 * 64, 6);
  std::vector<uint16_t> half(source.size());
  std::vector<float> exact(source.size());
  for (size_t k = 0; k < source.size(); ++k) {
    half[k] = float_to_half(source[k]);
    exact[k] = half_to_float(half[k]);
  }
  const Matrix expected = fit(shape(4, 64, 2, 32), exact);
  Matrix matrix = expected;
  matrix.planes.assign(matrix.planes.size(), 0xff);
  FitProblem problem = shape(4, 64, 2, 32);
  problem.weights = half.data();
  problem.type = WeightType::kFloat16;
  ThreadPool pool(1);
  fit_hlq(problem, {matrix.planes.data(), matrix.scales.data(), matrix.zeros.data()}, pool);
  CHECK(matrix == expected);
}

TEST_CASE("impossible dimensions are refused") {
  const std::vector<float> weights(64, 1.0f);
  CHECK_THROWS_AS(fit(shape(1, 64, 0, 32), weights), std::invalid_argument);
  CHECK_THROWS_AS(fit(shape(1, 64, 5, 32), weights), std::invalid_argument);
  CHECK_THROWS_AS(fit(shape(0, 64, 2, 32), weights), std::invalid_argument);
  CHECK_THROWS_AS(fit(shape(1, 64, 2, 20), weights), std::invalid_argument);
}

namespace {

/// Groups whose latent weights lie between their levels and beyond.
struct SoftCase {
  int64_t groups;
  SoftWeights soft;
  std::vector<float> latent, levels, gradient, values, for_latent, for_level;

  SoftCase(int64_t group_count, int64_t columns, int level_count, float temperature)
      : groups(group_count),
        latent(random_weights(group_count * columns, 1)),
        levels(random_weights(group_count * level_count, 2)),
        gradient(random_weights(group_count * columns, 3)),
        values(group_count * columns, -9.0f),
        for_latent(group_count * columns, -9.0f),
        for_level(group_count * level_count, -9.0f) {
    for (int64_t group = 0; group < groups; ++group) {
      const auto first = levels.begin() + group * level_count;
      std::sort(first, first + level_count);
      if (group % 3 == 2) std::fill(first, first + level_count, 0.5f);  // they coincide
    }
    soft = {columns, level_count, temperature, latent.data(), levels.data()};
  }

  bool same_results(const SoftCase& other) const {
    return values == other.values && for_latent == other.for_latent && for_level == other.for_level;
  }
};

/// As SoftWeights states it, in double precision.
void soften_naively(SoftCase& c) {
  const int count = c.soft.levels;
  std::vector<double> for_level(c.for_level.size());
  for (int64_t group = 0; group < c.groups; ++group) {
    const float* level = c.levels.data() + group * count;
    const double gap = std::max(1e-9, (double{level[count - 1]} - double{level[0]}) / (count - 1));
    for (int64_t at = group * c.soft.columns; at < (group + 1) * c.soft.columns; ++at) {
      int rank = 0;
      while (rank < count - 2 && c.latent[at] > level[rank + 1]) ++rank;
      const double a = double{level[rank]};
      const double b = double{level[rank + 1]};
      const double slope = 2 * (b - a) / (double{c.soft.temperature} * gap * gap);
      const double share = 1 / (1 + std::exp(-(double{c.latent[at]} - (a + b) / 2) * slope));
      const double gradient = double{c.gradient[at]};
      c.values[at] = static_cast<float>(a + (b - a) * share);
      c.for_latent[at] = static_cast<float>(gradient * (b - a) * share * (1 - share) * slope);
      for_level[group * count + rank] += gradient * (1 - share);
      for_level[group * count + rank + 1] += gradient * share;
    }
  }
  std::copy(for_level.begin(), for_level.end(), c.for_level.begin());
}

bool close(const std::vector<float>& found, const std::vector<float>& expected) {
  return std::equal(found.begin(), found.end(), expected.begin(),
                    [](float a, float b) { return std::abs(a - b) <= 1e-4f + 1e-4f * std::abs(b); });
}

}  // namespace

TEST_CASE("soft weights and their gradients are those of the formula, to the same bits by all instruction sets") {
  using Values = void (*)(const SoftWeights&, int64_t, int64_t, float*);
  using Gradients = void (*)(const SoftWeights&, int64_t, int64_t, const float*, float*, float*);
  std::vector<std::pair<Values, Gradients>> builds = {{solver_generic::soft_values, solver_generic::soft_gradients}};
#if defined(__x86_64__)
  if (cpu_features().avx2) builds.emplace_back(solver_avx2::soft_values, solver_avx2::soft_gradients);
  if (cpu_features().avx512) builds.emplace_back(solver_avx512::soft_values, solver_avx512::soft_gradients);
#endif
  for (const int levels : {2, 4, 8, 16}) {
    for (const int64_t columns : {1, 32, 70, 128}) {
      for (const float temperature : {1.0f, 0.2f, 0.01f}) {
        CAPTURE(levels);
        CAPTURE(columns);
        CAPTURE(temperature);
        SoftCase expected(7, columns, levels, temperature);
        soften_naively(expected);
        SoftCase first(7, columns, levels, temperature);
        for (const int threads : {1, 3}) {
          ThreadPool pool(threads);
          soft_values(first.soft, first.groups, first.values.data(), pool);
          soft_gradients(first.soft, first.groups, first.gradient.data(), first.for_latent.data(),
                         first.for_level.data(), pool);
          CHECK(close(first.values, expected.values));
          CHECK(close(first.for_latent, expected.for_latent));
          CHECK(close(first.for_level, expected.for_level));
        }
        for (const auto& [values, gradients] : builds) {
          SoftCase found(7, columns, levels, temperature);
          values(found.soft, 0, 7, found.values.data());
          gradients(found.soft, 0, 7, found.gradient.data(), found.for_latent.data(), found.for_level.data());
          CHECK(found.same_results(first));
        }
      }
    }
  }
}

TEST_CASE("latent weights settle on the nearest levels, to the same bits by all instruction sets") {
  auto builds = std::vector{solver_generic::settle};
#if defined(__x86_64__)
  if (cpu_features().avx2) builds.push_back(solver_avx2::settle);
  if (cpu_features().avx512) builds.push_back(solver_avx512::settle);
#endif
  for (const int levels : {2, 4, 8, 16}) {
    for (const int64_t columns : {1, 32, 70, 128}) {
      for (const float distance : {0.0f, 0.05f, 10.0f}) {
        CAPTURE(levels);
        CAPTURE(columns);
        CAPTURE(distance);
        const SoftCase c(7, columns, levels, 0.0f);
        std::vector<float> expected = c.latent;
        for (int64_t at = 0; at < c.groups * columns; ++at) {
          const float* level = c.levels.data() + at / columns * levels;
          const auto nearer = [&](float a, float b) { return std::abs(a - c.latent[at]) < std::abs(b - c.latent[at]); };
          const float nearest = *std::min_element(level, level + levels, nearer);
          expected[at] += std::clamp(nearest - c.latent[at], -distance, distance);
        }
        for (const int threads : {1, 3}) {
          ThreadPool pool(threads);
          SoftCase found(7, columns, levels, 0.0f);
          settle(found.soft, found.groups, distance, found.latent.data(), pool);
          CHECK(found.latent == expected);
        }
        for (const auto& build : builds) {
          SoftCase found(7, columns, levels, 0.0f);
          build(found.soft, 0, 7, distance, found.values.data());
          CHECK(found.values == expected);
        }
      }
    }
  }
}

TEST_CASE("soft weights of other numbers of levels, or without a temperature, are refused") {
  ThreadPool pool(1);
  SoftCase c(2, 8, 4, 0.2f);
  for (const int levels : {0, 1, 3, 32}) {
    SoftWeights soft = c.soft;
    soft.levels = levels;
    CHECK_THROWS_AS(soft_values(soft, 2, c.values.data(), pool), std::invalid_argument);
    CHECK_THROWS_AS(settle(soft, 2, 0.1f, c.values.data(), pool), std::invalid_argument);
  }
  for (const float distance : {-1.0f, std::nanf("")}) {
    CHECK_THROWS_AS(settle(c.soft, 2, distance, c.values.data(), pool), std::invalid_argument);
  }
  for (const float temperature : {0.0f, -1.0f, std::nanf("")}) {
    SoftWeights soft = c.soft;
    soft.temperature = temperature;
    CHECK_THROWS_AS(soft_gradients(soft, 2, c.gradient.data(), c.for_latent.data(), c.for_level.data(), pool),
                    std::invalid_argument);
  }
}
