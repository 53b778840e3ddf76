#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/aligned.h"
#include "base/cpu_features.h"
#include "base/half.h"
#include "base/thread_pool.h"
#include "solver/solve_group.h"

using namespace elutq;

namespace {

/// A calibrated group with room for its results. All numbers are small multiples of a power of two, so that sums of
/// them are exact in any order.
struct Calibrated {
  std::vector<float> target, metric, feedback, parameters, values;
  std::vector<uint8_t> codes;
  CalibratedGroup group;

  Calibrated(int64_t columns, int64_t rows, int bits) {
    std::mt19937 random(7);
    const auto whole = [&](int least, int most) {
      return static_cast<float>(std::uniform_int_distribution<int>(least, most)(random));
    };
    for (int64_t i = 0; i < columns * rows; ++i) target.push_back(whole(-32, 32) / 8);
    metric.resize(columns * columns);
    feedback.resize(columns * columns);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t k = 0; k < j; ++k) {
        metric[j * columns + k] = metric[k * columns + j] = whole(0, 9) == 0 ? 1.0f : 0.0f;
        feedback[j * columns + k] = whole(-1, 1);
      }
      feedback[j * columns + j] = 4.0f;
    }
    for (int64_t j = 0; j < columns; ++j) {  // more than the rest of the row, so that it is positive definite
      metric[j * columns + j] = static_cast<float>(std::bit_ceil(static_cast<uint64_t>(columns)));
    }
    parameters.resize((bits + 1) * rows);
    for (int64_t row = 0; row < rows; ++row) {
      float sum = 0.0f;
      for (int p = 0; p < bits; ++p) sum += parameters[p * rows + row] = whole(1, 2) * static_cast<float>(1 << p) / 2;
      parameters[bits * rows + row] = -sum / 2;
    }
    values.assign(columns * rows, -9.0f);
    codes.assign(columns * rows, 0xff);
    group.columns = columns;
    group.rows = rows;
    group.bits = bits;
    connect();
  }
  Calibrated(const Calibrated& other) { *this = other; }
  Calibrated& operator=(const Calibrated& other) {
    target = other.target;
    metric = other.metric;
    feedback = other.feedback;
    parameters = other.parameters;
    values = other.values;
    codes = other.codes;
    group = other.group;
    connect();
    return *this;
  }

  void connect() {
    group.target = target.data();
    group.metric = metric.data();
    group.parameters = parameters.data();
    group.codes = codes.data();
    group.values = values.data();
  }

  float decoded(int64_t row, uint8_t code) const {
    float value = parameters[group.bits * group.rows + row];
    for (int p = 0; p < group.bits; ++p) value += code >> p & 1 ? parameters[p * group.rows + row] : 0.0f;
    return value;
  }

  double loss(int64_t row) const {
    double sum = 0.0;
    for (int64_t j = 0; j < group.columns; ++j) {
      for (int64_t k = 0; k < group.columns; ++k)
        sum += error(j, row) * error(k, row) * double{metric[j * group.columns + k]};
    }
    return sum;
  }

  double error(int64_t column, int64_t row) const {
    return double{target[column * group.rows + row]} - double{values[column * group.rows + row]};
  }

  bool same_results(const Calibrated& other) const {
    return values == other.values && codes == other.codes && parameters == other.parameters;
  }
};

/// Chooses the first codes as CalibratedGroup states it, row by row.
void start_naively(Calibrated& c, bool feedback) {
  const CalibratedGroup& g = c.group;
  for (int64_t row = 0; row < g.rows; ++row) {
    for (int64_t j = 0; j < g.columns; ++j) {
      double wanted = double{c.target[j * g.rows + row]};
      for (int64_t i = 0; feedback && i < j; ++i) wanted += double{c.feedback[j * g.columns + i]} * c.error(i, row) / 4;
      uint8_t best = 0;
      for (int code = 1; code < 1 << g.bits; ++code) {
        const double distance = std::abs(wanted - double{c.decoded(row, static_cast<uint8_t>(code))});
        const double least = std::abs(wanted - double{c.decoded(row, best)});
        // Half way between two levels it is the lower one.
        const bool lower = c.decoded(row, static_cast<uint8_t>(code)) < c.decoded(row, best);
        if (distance < least || (distance == least && lower)) best = static_cast<uint8_t>(code);
      }
      c.codes[j * g.rows + row] = best;
      c.values[j * g.rows + row] = c.decoded(row, best);
    }
  }
}

struct CalibratedBuild {
  std::string isa;
  int64_t (*rows)();
  int64_t (*scratch)(const CalibratedGroup&);
  void (*solve)(const CalibratedStrips&);

  void run(Calibrated& c) const {
    std::vector<float> sums(c.group.columns);
    for (int64_t j = 0; j < c.group.columns; ++j) {
      sums[j] = std::accumulate(&c.metric[j * c.group.columns], &c.metric[j * c.group.columns] + c.group.columns, 0.0f);
    }
    AlignedBuffer<uint8_t> memory(scratch(c.group));
    solve({c.group, sums.data(), 0, (c.group.rows + rows() - 1) / rows(), memory.data()});
  }
};

std::vector<CalibratedBuild> calibrated_builds() {
  std::vector<CalibratedBuild> builds = {
      {"generic", solver_generic::calibrated_rows, solver_generic::calibrated_scratch, solver_generic::solve_strips}};
#if defined(__x86_64__)
  if (cpu_features().avx2) {
    builds.push_back(
        {"avx2", solver_avx2::calibrated_rows, solver_avx2::calibrated_scratch, solver_avx2::solve_strips});
  }
  if (cpu_features().avx512) {
    builds.push_back(
        {"avx512", solver_avx512::calibrated_rows, solver_avx512::calibrated_scratch, solver_avx512::solve_strips});
  }
#endif
  return builds;
}

}  // namespace

TEST_CASE("a calibrated group begins with the nearest levels, or those that make up for errors before") {
  for (int bits = 1; bits <= 4; ++bits) {
    for (const int64_t columns : {1, 5, 80}) {
      for (const int64_t rows : {1, 37, 64}) {
        for (const bool feedback : {false, true}) {
          CAPTURE(bits);
          CAPTURE(columns);
          CAPTURE(rows);
          CAPTURE(feedback);
          const Calibrated start(columns, rows, bits);
          Calibrated expected = start;
          start_naively(expected, feedback);
          for (const CalibratedBuild& build : calibrated_builds()) {
            CAPTURE(build.isa);
            Calibrated found = start;
            found.group.feedback = feedback ? found.feedback.data() : nullptr;
            build.run(found);
            CHECK(found.values == expected.values);
            for (int64_t i = 0; i < columns * rows; ++i) {  // levels may coincide
              REQUIRE(found.decoded(i % rows, found.codes[i]) == expected.values[i]);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("rounds lower the loss of a calibrated group down to where no code can be changed alone") {
  for (int bits = 1; bits <= 4; ++bits) {
    for (const CalibratedBuild& build : calibrated_builds()) {
      CAPTURE(bits);
      CAPTURE(build.isa);
      const int64_t columns = 70;
      const int64_t rows = 67;
      Calibrated first(columns, rows, bits);
      build.run(first);
      Calibrated found(columns, rows, bits);
      found.group.rounds = 6;
      found.group.descents = 3;
      build.run(found);
      double before = 0.0;
      double after = 0.0;
      int64_t better = 0;  // single changes that would pay
      for (int64_t row = 0; row < rows; ++row) {
        const double loss = found.loss(row);
        before += first.loss(row);
        after += loss;
        REQUIRE(loss <= first.loss(row) * 1.00001);
        for (int p = 0; p <= bits; ++p) {
          const float parameter = found.parameters[p * rows + row];
          REQUIRE(half_to_float(float_to_half(parameter)) == parameter);
          if (p < bits) REQUIRE(parameter >= (p > 0 ? found.parameters[(p - 1) * rows + row] : 0.0f));
        }
        for (int64_t j = 0; j < columns; ++j) {
          REQUIRE(found.values[j * rows + row] == found.decoded(row, found.codes[j * rows + row]));
          double pull = 0.0;
          for (int64_t k = 0; k < columns; ++k) pull += double{found.metric[j * columns + k]} * found.error(k, row);
          for (int code = 0; code < 1 << bits; ++code) {
            const double change =
                double{found.decoded(row, static_cast<uint8_t>(code))} - double{found.values[j * rows + row]};
            better += double{found.metric[j * columns + j]} * change * change - 2 * pull * change < -1e-3 * loss;
          }
        }
      }
      CHECK(after < 0.95 * before);
      CHECK(better < (columns * rows << bits) / 400);  // the last refit leaves a few

      Calibrated again = found;  // a known solution can only be improved
      again.group.resume = true;
      again.group.rounds = 1;
      build.run(again);
      for (int64_t row = 0; row < rows; ++row) CHECK(again.loss(row) <= found.loss(row) * 1.00001);

      Calibrated alone(columns, 1, bits);  // the last row, in a strip of its own
      alone.group.rounds = found.group.rounds;
      alone.group.descents = found.group.descents;
      alone.metric = found.metric;
      for (int64_t j = 0; j < columns; ++j) alone.target[j] = found.target[j * rows + rows - 1];
      for (int p = 0; p <= bits; ++p) alone.parameters[p] = first.parameters[p * rows + rows - 1];
      alone.connect();
      build.run(alone);
      for (int64_t j = 0; j < columns; ++j) CHECK(alone.codes[j] == found.codes[j * rows + rows - 1]);
    }
  }
}

TEST_CASE("planes of a known solution may come inverted and in another order") {
  for (int bits = 1; bits <= 4; ++bits) {
    for (const CalibratedBuild& build : calibrated_builds()) {
      CAPTURE(bits);
      CAPTURE(build.isa);
      const int64_t rows = 30;
      Calibrated found(50, rows, bits);
      found.group.rounds = 4;
      found.group.descents = 2;
      build.run(found);
      Calibrated scrambled = found;
      for (uint8_t& code : scrambled.codes) {
        uint8_t other = 0;
        for (int p = 0; p < bits; ++p) other |= static_cast<uint8_t>((code >> p & 1) << (bits - 1 - p));
        code = other ^ 1;
      }
      std::fill(scrambled.parameters.begin(), scrambled.parameters.end(), 0.5f);
      scrambled.group.resume = true;
      scrambled.group.rounds = 1;
      scrambled.group.descents = 0;
      Calibrated refitted = scrambled;
      build.run(refitted);  // the same partition of weights: least squares finds the parameters again, as its own
      for (int64_t row = 0; row < rows; ++row) REQUIRE(refitted.loss(row) <= found.loss(row) * 1.01);

      // The gradient that is kept through rounds is the one that a call begins with.
      Calibrated in_one = scrambled;
      in_one.group.rounds = 3;
      in_one.group.descents = 1;
      build.run(in_one);
      scrambled.group.descents = 1;
      for (int round = 0; round < 3; ++round) build.run(scrambled);
      double together = 0.0;
      double apart = 0.0;
      for (int64_t row = 0; row < rows; ++row) {
        together += in_one.loss(row);
        apart += scrambled.loss(row);
      }
      CHECK(together == doctest::Approx(apart).epsilon(0.02));
    }
  }
}

TEST_CASE("parameters in bytes are multiples of their row's scale") {
  for (const CalibratedBuild& build : calibrated_builds()) {
    CAPTURE(build.isa);
    const int64_t rows = 21;
    Calibrated found(40, rows, 3);
    std::vector<float> units(rows, 1.0f / 64);
    units[5] = 0.0f;
    found.group.row_scales = units.data();
    found.group.rounds = 2;
    found.group.descents = 1;
    build.run(found);
    for (int64_t row = 0; row < rows; ++row) {
      for (int p = 0; p <= 3; ++p) {
        const float parameter = found.parameters[p * rows + row] * 64;
        CHECK(parameter == std::round(parameter));
        CHECK(parameter >= (p < 3 ? 0.0f : -128.0f));
        CHECK(parameter <= (row == 5 ? 0.0f : p < 3 ? 255.0f : 127.0f));
      }
    }
  }
}

TEST_CASE("a calibrated group does not depend on threads, and is refused if it is none") {
  Calibrated one(70, 300, 2);
  one.group.feedback = one.feedback.data();
  one.group.rounds = 2;
  one.group.descents = 1;
  Calibrated three = one;
  three.group.feedback = three.feedback.data();
  ThreadPool alone(1);
  ThreadPool pool(3);
  solve_group(one.group, alone);
  solve_group(three.group, pool);
  CHECK(one.same_results(three));
  for (int64_t CalibratedGroup::* size : {&CalibratedGroup::columns, &CalibratedGroup::rows}) {
    CalibratedGroup none = one.group;
    none.*size = 0;
    CHECK_THROWS_AS(solve_group(none, pool), std::invalid_argument);
  }
  for (const int bits : {0, kCalibratedMaxBits + 1}) {
    CalibratedGroup wrong = one.group;
    wrong.bits = bits;
    CHECK_THROWS_AS(solve_group(wrong, pool), std::invalid_argument);
  }
}
