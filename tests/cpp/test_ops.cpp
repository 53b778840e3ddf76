#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "base/half.h"
#include "kernel_cases.h"
#include "ops/attention.h"
#include "ops/linear.h"
#include "ops/rotary.h"

using namespace elutq;

namespace {

std::vector<float> normals(int64_t count, uint32_t seed) { return testing::random_floats(count, seed); }

/// An HLQ matrix and its weights one by one.
struct HlqData : testing::HlqCase {
  using HlqCase::HlqCase;

  float weight(int64_t row, int64_t column) const {
    const int64_t group = row * shape.groups() + column / shape.group_size;
    const bool in_bytes = shape.param_bits == 8;
    float w = in_bytes ? byte_zeros[group] : half_to_float(zeros[group]);
    for (int p = 0; p < shape.bits; ++p) {
      const uint8_t byte = planes[(p * shape.out_features + row) * ((shape.in_features + 7) / 8) + column / 8];
      const int64_t index = group * shape.bits + p;
      if ((byte >> (column % 8) & 1) != 0) w += in_bytes ? byte_scales[index] : half_to_float(scales[index]);
    }
    return in_bytes ? half_to_float(row_scales[row]) * w : w;
  }
};

Activations activations(const std::vector<float>& values, int64_t tokens, int64_t features) {
  Activations x(tokens, features);
  std::copy(values.begin(), values.end(), x.row(0));
  return x;
}

}  // namespace

TEST_CASE("a group of linears gives each one's product, bias and residual, for any number of threads") {
  constexpr int64_t kTokens = 3;
  constexpr int64_t kIn = 200;
  const HlqData first({70, kIn, 2, 64}, 1);
  const HlqData second({33, kIn, 4, kIn, 8}, 2);
  const std::vector<float> dense = normals(45 * kIn, 3);
  const std::vector<float> bias = normals(70, 4);
  const std::vector<float> values = normals(kTokens * kIn, 5);
  std::vector<std::vector<float>> results;
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    const Backend backend{&select_kernels(""), &pool, true};
    Arena arena;
    std::array<Linear, 3> linears = {Linear(70, kIn), Linear(33, kIn), Linear(45, kIn)};
    linears[0].set_hlq(backend, first.view(), arena);
    linears[0].bias() = bias;
    linears[1].set_hlq(backend, second.view(), arena);
    linears[2].set_dense(DenseType::kFloat32, dense.data(), nullptr);
    const Activations x = activations(values, kTokens, kIn);
    std::vector<float> y(kTokens * 70), z(kTokens * 33), u(kTokens * 50), residual(kTokens * 33, 10.0F);
    run_linears(backend, x,
                std::array<LinearCall, 3>{{{&linears[0], {0, kTokens}, y.data(), 70},
                                           {&linears[1], {0, kTokens}, z.data(), 33, residual.data()},
                                           {&linears[2], {0, kTokens}, u.data(), 50}}});
    for (int64_t t = 0; t < kTokens; ++t) {
      const auto product = [&](const auto& weight, int64_t row) {
        double sum = 0;
        for (int64_t k = 0; k < kIn; ++k) sum += static_cast<double>(weight(row, k)) * values[t * kIn + k];
        return sum;
      };
      const auto dense_weight = [&](int64_t row, int64_t k) { return dense[row * kIn + k]; };
      const auto first_weight = [&](int64_t row, int64_t k) { return first.weight(row, k); };
      const auto second_weight = [&](int64_t row, int64_t k) { return second.weight(row, k); };
      for (int64_t n = 0; n < 70; ++n) {
        CHECK(y[t * 70 + n] == doctest::Approx(product(first_weight, n) + bias[n]).epsilon(1e-4));
      }
      for (int64_t n = 0; n < 33; ++n) {
        CHECK(z[t * 33 + n] == doctest::Approx(product(second_weight, n)).epsilon(1e-4));
        CHECK(residual[t * 33 + n] == 10.0F + z[t * 33 + n]);
      }
      for (int64_t n = 0; n < 45; ++n) {
        CHECK(u[t * 50 + n] == doctest::Approx(product(dense_weight, n)).epsilon(1e-4));
      }
      CHECK(u[t * 50 + 45] == 0.0F);
    }
    y.insert(y.end(), z.begin(), z.end());
    y.insert(y.end(), u.begin(), u.end());
    results.push_back(y);
  }
  CHECK(results[1] == results[0]);
  CHECK(results[2] == results[0]);
}

TEST_CASE("linears may read different rows, and rows of other activations") {
  constexpr int64_t kIn = 96;
  const HlqData first({70, kIn, 2, 32}, 1);
  const HlqData second({33, kIn, 3, kIn}, 2);
  const std::vector<float> values = normals(4 * kIn, 3);
  for (const bool exact : {false, true}) {
    for (const int threads : {1, 3}) {
      ThreadPool pool(threads);
      const Backend backend{&select_kernels(""), &pool, exact};
      Arena arena;
      std::array<Linear, 2> linears = {Linear(70, kIn), Linear(33, kIn)};
      linears[0].set_hlq(backend, first.view(), arena);
      linears[1].set_hlq(backend, second.view(), arena);
      Activations x = activations(values, 4, kIn);
      for (const Linear& linear : linears) x.reserve_tables(linear);
      const std::array<const Linear*, 2> consumers = {&linears[0], &linears[1]};
      for (int64_t t = 0; t < 4; ++t) x.build(*backend.kernels, t, consumers);
      std::vector<float> all(4 * 70), all_second(4 * 33);
      run_linears(backend, x,
                  std::array<LinearCall, 2>{
                      {{&linears[0], {0, 4}, all.data(), 70}, {&linears[1], {0, 4}, all_second.data(), 33}}});

      const std::array<int64_t, 5> order = {3, 0, 3, 1, 2};
      Activations gathered(5, x);
      for (int64_t i = 0; i < 5; ++i) gathered.share(i, x, order[i], exact);
      std::vector<float> y(2 * 70), z(3 * 33);
      run_linears(
          backend, gathered,
          std::array<LinearCall, 2>{{{&linears[0], {0, 2}, y.data(), 70}, {&linears[1], {2, 3}, z.data(), 33}}});
      for (int64_t i = 0; i < 2; ++i) CHECK(std::equal(&y[i * 70], &y[i * 70] + 70, &all[order[i] * 70]));
      for (int64_t i = 0; i < 3; ++i) CHECK(std::equal(&z[i * 33], &z[i * 33] + 33, &all_second[order[2 + i] * 33]));
    }
  }
}

TEST_CASE("tables are built per segment size and shared") {
  ThreadPool pool(2);
  const Backend backend{&select_kernels(""), &pool, false};
  Arena arena;
  constexpr int64_t kIn = 256;
  const HlqData narrow({64, kIn, 2, 32}, 1);
  const HlqData wide({64, kIn, 3, 128}, 2);
  const HlqData row({64, kIn, 1, kIn}, 3);
  std::array<Linear, 3> linears = {Linear(64, kIn), Linear(64, kIn), Linear(64, kIn)};
  Activations x = activations(normals(2 * kIn, 4), 2, kIn);
  const std::array<const HlqData*, 3> data = {&narrow, &wide, &row};
  for (size_t i = 0; i < linears.size(); ++i) {
    linears[i].set_hlq(backend, data[i]->view(), arena);
    x.reserve_tables(linears[i]);
  }
  CHECK(x.tables(32) != nullptr);
  CHECK(x.tables(128) != nullptr);  // also that of the whole-row group
  CHECK(x.tables(256) == nullptr);
  const std::array<const Linear*, 3> consumers = {&linears[0], &linears[1], &linears[2]};
  x.build(*backend.kernels, 0, consumers);
  x.build(*backend.kernels, 1, consumers);
  for (size_t i = 0; i < linears.size(); ++i) {
    std::vector<float> y(2 * 64);
    run_linears(backend, x, std::array<LinearCall, 1>{{{&linears[i], {0, 2}, y.data(), 64}}});
    double error = 0, norm = 0;
    for (int64_t t = 0; t < 2; ++t) {
      for (int64_t n = 0; n < 64; ++n) {
        double expected = 0;
        for (int64_t k = 0; k < kIn; ++k) expected += static_cast<double>(data[i]->weight(n, k)) * x.row(t)[k];
        error += std::pow(y[t * 64 + n] - expected, 2);
        norm += std::pow(expected, 2);
      }
    }
    CHECK(std::sqrt(error / norm) < 0.02);
  }
}

TEST_CASE("rows are read back from every kind of matrix") {
  ThreadPool pool(1);
  const Backend backend{&select_kernels(""), &pool, false};
  Arena arena;
  const HlqData data({10, 100, 3, 32}, 1);
  Linear linear(10, 100);
  std::vector<float> row(100);
  linear.set_hlq(backend, data.view(), arena);
  linear.read_row(*backend.kernels, 9, row.data());
  for (int64_t k = 0; k < 100; ++k) CHECK(row[k] == doctest::Approx(data.weight(9, k)).epsilon(1e-6));
  CHECK(linear.row_bytes() == 3 * 13 + 2 * 4 * 4);

  std::vector<uint16_t> halves;
  for (const float value : normals(1000, 2)) halves.push_back(float_to_half(value));
  linear.set_dense(DenseType::kFloat16, halves.data(), nullptr);
  linear.read_row(*backend.kernels, 3, row.data());
  for (int64_t k = 0; k < 100; ++k) CHECK(row[k] == half_to_float(halves[300 + k]));
  CHECK(linear.row_bytes() == 200);
  CHECK(linear.packed_bytes() == 0);
}

TEST_CASE("a row's bytes are those on disk") {
  ThreadPool pool(1);
  const Backend backend{&select_kernels(""), &pool, false};
  Arena arena;
  Linear linear(10, 100);
  linear.set_hlq(backend, HlqData({10, 100, 3, 32}, 1).view(), arena);
  CHECK(linear.row_bytes() == 3 * 13 + 2 * 4 * 4);
  linear.set_hlq(backend, HlqData({10, 100, 3, 32, 8}, 1).view(), arena);
  CHECK(linear.row_bytes() == 3 * 13 + 4 * 4 + 2);
}

TEST_CASE("matrices that do not fit are refused") {
  ThreadPool pool(1);
  const Backend backend{&select_kernels(""), &pool, false};
  Arena arena;
  Linear linear(10, 100);
  CHECK_THROWS_AS(linear.set_hlq(backend, HlqData({10, 96, 2, 32}, 1).view(), arena), std::invalid_argument);
  CHECK_THROWS_AS(linear.set_hlq(backend, HlqData({10, 100, 2, 48}, 1).view(), arena), std::invalid_argument);
  CHECK_THROWS_AS(linear.set_hlq(backend, HlqData({10, 100, 5, 32}, 1).view(), arena), std::invalid_argument);
  CHECK_THROWS_AS(linear.set_hlq(backend, HlqData({10, 100, 2, 32, 4}, 1).view(), arena), std::invalid_argument);
  CHECK_THROWS_AS(Linear(0, 5), std::invalid_argument);
  Activations x(1, 99);
  CHECK_THROWS_AS(x.reserve_tables(linear), std::invalid_argument);
}

TEST_CASE("attention is shared out over tokens, heads and sections without a trace") {
  const AttentionShape shape{6, 2, 16};
  const KernelTable& kernels = select_kernels("");
  // Two sequences: one decodes at a long context, the other is a prompt of more than one tile.
  struct Sequence {
    int64_t position, tokens;
    std::vector<float> keys, values;  // [position + tokens][kv_size]
    std::vector<AlignedBuffer<uint8_t>> pages{};
    std::vector<const uint8_t*> addresses{};
  };
  for (const KvType type : {KvType::kFloat16, KvType::kInt8}) {
    const KvLayout layout{type, 2, shape.head_dim};
    std::vector<Sequence> sequences;
    std::vector<AttentionRun> runs;
    for (const auto& [position, tokens] : {std::pair<int64_t, int64_t>{2100, 1}, {0, 25}}) {
      const int64_t count = (position + tokens) * shape.kv_size();
      sequences.push_back({position, tokens, normals(count, 1), normals(count, 2)});
    }
    for (Sequence& s : sequences) {
      for (int64_t j = 0; j < s.position + s.tokens; ++j) {
        if (j % kPagePositions == 0) {
          s.pages.emplace_back(2 * layout.bytes());
          s.addresses.push_back(s.pages.back().data());
        }
        const int64_t offset = j * shape.kv_size();
        kernels.store_kv(layout, s.keys.data() + offset, s.values.data() + offset, j % kPagePositions,
                         s.pages.back().data() + layout.bytes());
      }
      runs.push_back({layout, s.addresses.data(), layout.bytes(), s.position, s.tokens});
    }
    const std::vector<float> q = normals(26 * shape.q_size(), 3);
    std::vector<float> first;
    for (const int threads : {1, 3, 16}) {
      ThreadPool pool(threads);
      Attention attention({&kernels, &pool, false}, shape);
      std::vector<float> out(q.size()), apart(q.size());
      attention.run(q.data(), runs, 0, out.data());
      attention.run(q.data(), {runs.data(), 1}, 0, apart.data());
      attention.run(q.data() + shape.q_size(), {runs.data() + 1, 1}, 0, apart.data() + shape.q_size());
      CHECK(out == apart);
      if (first.empty()) first = out;
      CHECK(out == first);
    }
    int64_t row = 0;
    for (const Sequence& s : sequences) {
      for (int64_t t = 0; t < s.tokens; ++t, ++row) {
        for (int64_t h = 0; h < 6; ++h) {
          std::vector<double> expected(16);
          double sum = 0;
          for (int64_t j = 0; j <= s.position + t; ++j) {
            const int64_t offset = j * shape.kv_size() + h / 3 * 16;
            double score = 0;
            for (int64_t d = 0; d < 16; ++d) score += q[row * 96 + h * 16 + d] * s.keys[offset + d];
            const double weight = std::exp(score / 4);
            sum += weight;
            for (int64_t d = 0; d < 16; ++d) expected[d] += weight * s.values[offset + d];
          }
          double worst = 0;
          for (int64_t d = 0; d < 16; ++d) {
            worst = std::max(worst, std::fabs(first[row * 96 + h * 16 + d] - expected[d] / sum));
          }
          CHECK(worst < (type == KvType::kFloat16 ? 1e-3 : 3e-2));
        }
      }
    }
  }
  ThreadPool pool(1);
  const Backend backend{&kernels, &pool, false};
  CHECK_THROWS_AS(Attention(backend, {6, 4, 16}), std::invalid_argument);
  CHECK_THROWS_AS(Attention(backend, {6, 2, 12}), std::invalid_argument);
}

TEST_CASE("rotary angles round where transformers rounds") {
  std::array<float, 2> cos{}, sin{};
  rotary_angles({1.0F, 0.1F}, 1.5F, 100003, cos.data(), sin.data());
  const double second = static_cast<float>(100003.0F * 0.1F);
  CHECK(cos[0] == static_cast<float>(std::cos(100003.0)) * 1.5F);
  CHECK(cos[1] == static_cast<float>(std::cos(second)) * 1.5F);
  CHECK(sin[1] == static_cast<float>(std::sin(second)) * 1.5F);
}
