// Dense products, attention and elementwise functions on every instruction set this machine can run.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernel_cases.h"
#include "kernels/reference.h"

using namespace elutq;
using namespace elutq::testing;

namespace {

std::vector<const KernelTable*> all_kernels() {
  std::vector<const KernelTable*> tables;
  for (const std::string_view isa : available_isas()) tables.push_back(find_kernels(isa));
  return tables;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

const std::vector<int64_t> kCounts = {1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257, 1003};

/// `count` weights of a type: their bytes, one byte off any alignment, and their exact values.
struct DenseCase {
  std::vector<uint8_t> storage;
  std::vector<float> values;

  DenseCase(DenseType type, int64_t count, uint32_t seed) : storage(1), values(random_floats(count, seed, 0.1f)) {
    for (float& value : values) {
      uint8_t bytes[4];
      size_t size = 2;
      uint16_t half = 0;
      if (type == DenseType::kFloat32) {
        size = 4;
        std::memcpy(bytes, &value, 4);
      } else if (type == DenseType::kFloat16) {
        half = float_to_half(value);
        value = half_to_float(half);
      } else {
        half = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
        value = bfloat16_to_float(half);
      }
      if (size == 2) std::memcpy(bytes, &half, 2);
      storage.insert(storage.end(), bytes, bytes + size);
    }
  }
  const void* weights() const { return storage.data() + 1; }
};

constexpr DenseType kTypes[] = {DenseType::kFloat32, DenseType::kFloat16, DenseType::kBFloat16};

}  // namespace

TEST_CASE("matmul_dense adds in the canonical order, whatever the batch and the rows") {
  for (const DenseType type : kTypes) {
    for (const int64_t in : {1, 5, 16, 31, 100, 320, 1003}) {
      for (const int64_t out : {1, 3, 4, 9}) {
        constexpr int64_t kTokens = 9;
        const DenseCase matrix(type, out * in, 3);
        const auto x = random_floats(kTokens * (in + 2), 4);
        std::vector<float> expected(static_cast<size_t>(kTokens * out));
        for (int64_t t = 0; t < kTokens; ++t) {
          for (int64_t n = 0; n < out; ++n) {
            expected[t * out + n] =
                reference::sum_of_products(matrix.values.data() + n * in, x.data() + t * (in + 2), in);
          }
        }
        for (const KernelTable* kernels : all_kernels()) {
          CAPTURE(kernels->isa);
          CAPTURE(in);
          CAPTURE(out);
          std::vector<float> y(expected.size());
          kernels->matmul_dense(type, matrix.weights(), in, x.data(), in + 2, kTokens, 0, out, y.data(), out);
          CHECK(same_bits(expected, y));
          std::fill(y.begin(), y.end(), 0.0f);
          for (int64_t t = 0; t < kTokens; ++t) {
            for (int64_t n = 0; n < out; ++n) {
              kernels->matmul_dense(type, matrix.weights(), in, x.data() + t * (in + 2), in + 2, 1, n, n + 1,
                                    y.data() + t * out, out);
            }
          }
          CHECK(same_bits(expected, y));
        }
      }
    }
  }
}

TEST_CASE("to_float is exact and to_half rounds to nearest even") {
  std::vector<uint16_t> halves;
  for (int bits = 0; bits < 65536; ++bits) halves.push_back(static_cast<uint16_t>(bits));
  for (const KernelTable* kernels : all_kernels()) {
    CAPTURE(kernels->isa);
    std::vector<float> floats(halves.size());
    kernels->to_float(DenseType::kFloat16, halves.data(), 65536, floats.data());
    bool exact = true;
    for (size_t i = 0; i < halves.size(); ++i) {
      const float expected = half_to_float(halves[i]);
      exact &= std::isnan(expected) ? std::isnan(floats[i]) : floats[i] == expected;
    }
    CHECK(exact);
    std::vector<uint16_t> back(halves.size());
    kernels->to_half(floats.data(), 65536, back.data());
    bool same = true;
    for (size_t i = 0; i < halves.size(); ++i) same &= std::isnan(floats[i]) || back[i] == halves[i];
    CHECK(same);

    kernels->to_float(DenseType::kBFloat16, halves.data(), 65535, floats.data());
    for (size_t i = 0; i < 65535; ++i) exact &= std::bit_cast<uint32_t>(floats[i]) == static_cast<uint32_t>(i) << 16;
    CHECK(exact);

    for (const int64_t count : kCounts) {
      const auto x = random_floats(count, 5, 1000.0f);
      std::vector<uint16_t> y(static_cast<size_t>(count + 1), 77);
      kernels->to_half(x.data(), count, y.data());
      for (int64_t i = 0; i < count; ++i) same &= y[i] == float_to_half(x[i]);
      CHECK(same);
      CHECK(y[count] == 77);
    }
    const std::vector<float> ties = {1.0f + 0x1p-11f, 1.0f + 0x3p-11f, 65519.9f, 65520.0f, -1e6f, 0x1p-25f, 0x1.1p-25f};
    std::vector<uint16_t> y(ties.size());
    kernels->to_half(ties.data(), static_cast<int64_t>(ties.size()), y.data());
    CHECK(y == std::vector<uint16_t>{0x3c00, 0x3c02, 0x7bff, 0x7c00, 0xfc00, 0, 1});
  }
}

TEST_CASE("rms_norm, rope, add and silu_mul match their definitions, the same bits everywhere") {
  for (const int64_t count : kCounts) {
    const auto x = random_floats(count, 21, 2.0f);
    const auto w = random_floats(count, 22);
    std::vector<float> first_norm, first_silu;
    for (const KernelTable* kernels : all_kernels()) {
      CAPTURE(kernels->isa);
      CAPTURE(count);
      double squares = 0.0;
      for (const float value : x) squares += static_cast<double>(value) * value;
      const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(count) + 1e-5);

      std::vector<float> norm = x;
      kernels->rms_norm(norm.data(), w.data(), count, 1e-5f, norm.data());
      for (int64_t i = 0; i < count; ++i) CHECK(norm[i] == doctest::Approx(x[i] * inverse * w[i]).epsilon(1e-5));
      if (first_norm.empty()) first_norm = norm;
      CHECK(same_bits(norm, first_norm));

      std::vector<float> sum = w;
      kernels->add(x.data(), count, sum.data());
      for (int64_t i = 0; i < count; ++i) CHECK(sum[i] == x[i] + w[i]);

      std::vector<float> silu = x;
      kernels->silu_mul(silu.data(), w.data(), count, silu.data());
      for (int64_t i = 0; i < count; ++i) {
        CHECK(silu[i] == doctest::Approx(x[i] / (1.0 + std::exp(-static_cast<double>(x[i]))) * w[i]).epsilon(1e-6));
      }
      if (first_silu.empty()) first_silu = silu;
      CHECK(same_bits(silu, first_silu));
    }
  }
  for (const int64_t head_dim : {8, 24, 32, 64, 72, 128}) {
    constexpr int64_t kHeads = 3;
    const auto x = random_floats(kHeads * head_dim, 23);
    std::vector<float> cos, sin;
    for (int64_t i = 0; i < head_dim / 2; ++i) {
      cos.push_back(std::cos(static_cast<float>(i)));
      sin.push_back(std::sin(static_cast<float>(i)));
    }
    for (const KernelTable* kernels : all_kernels()) {
      CAPTURE(kernels->isa);
      std::vector<float> y = x;
      kernels->rope(y.data(), kHeads, head_dim, cos.data(), sin.data());
      bool same = true;
      for (int64_t h = 0; h < kHeads; ++h) {
        for (int64_t i = 0; i < head_dim / 2; ++i) {
          const float a = x[h * head_dim + i];
          const float b = x[h * head_dim + head_dim / 2 + i];
          same &= y[h * head_dim + i] == a * cos[i] - b * sin[i];
          same &= y[h * head_dim + head_dim / 2 + i] == b * cos[i] + a * sin[i];
        }
      }
      CHECK(same);
    }
  }
}

TEST_CASE("silu_mul is accurate over the whole range and keeps NaN") {
  std::vector<float> gate;
  for (float value = -100.0f; value <= 100.0f; value += 0.0137f) gate.push_back(value);
  for (const float value : {0.0f, -0.0f, 1e30f, -1e30f, 1e-30f}) gate.push_back(value);
  const std::vector<float> ones(gate.size(), 1.0f);
  for (const KernelTable* kernels : all_kernels()) {
    CAPTURE(kernels->isa);
    std::vector<float> y(gate.size());
    kernels->silu_mul(gate.data(), ones.data(), static_cast<int64_t>(gate.size()), y.data());
    for (size_t i = 0; i < gate.size(); ++i) {
      const double expected = gate[i] / (1.0 + std::exp(-static_cast<double>(gate[i])));
      CHECK(std::fabs(y[i] - expected) <= 4e-7 * std::fabs(expected) + 1e-6 * (gate[i] < -80.0f));
    }
    const float nan = std::numeric_limits<float>::quiet_NaN();
    kernels->silu_mul(&nan, ones.data(), 1, y.data());
    CHECK(std::isnan(y[0]));
  }
}

TEST_CASE("attention matches softmax in double, whatever the spans") {
  for (const int64_t head_dim : {8, 16, 24, 64, 72, 80, 128, 256}) {
    for (const int64_t heads : {1, 2, 3, 4, 7, 8}) {
      for (const int64_t length : {1, 2, 5, 16, 61}) {
        const auto q = random_floats(heads * head_dim, 31);
        const auto keys = random_halves(length * head_dim, 32);
        const auto values = random_halves(length * head_dim, 33);
        const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
        std::vector<double> expected;
        for (int64_t h = 0; h < heads; ++h) {
          std::vector<double> p;
          for (int64_t j = 0; j < length; ++j) {
            double dot = 0.0;
            for (int64_t d = 0; d < head_dim; ++d) dot += q[h * head_dim + d] * half_to_float(keys[j * head_dim + d]);
            p.push_back(std::exp(scale * dot));
          }
          double total = 0.0;
          for (const double weight : p) total += weight;
          for (int64_t d = 0; d < head_dim; ++d) {
            double sum = 0.0;
            for (int64_t j = 0; j < length; ++j) sum += p[j] * half_to_float(values[j * head_dim + d]);
            expected.push_back(sum / total);
          }
        }
        std::vector<float> first;
        for (const KernelTable* kernels : all_kernels()) {
          CAPTURE(kernels->isa);
          CAPTURE(head_dim);
          CAPTURE(heads);
          CAPTURE(length);
          const auto attend = [&](const std::vector<int64_t>& borders) {
            std::vector<KvSpan> spans;
            for (size_t i = 0; i + 1 < borders.size(); ++i) {
              const int64_t at = borders[i] * head_dim;
              spans.push_back({keys.data() + at, values.data() + at, borders[i + 1] - borders[i]});
            }
            std::vector<float> scores(static_cast<size_t>(heads * length));
            std::vector<float> out(static_cast<size_t>(heads * head_dim));
            kernels->attention(q.data(), heads, head_dim, spans.data(), static_cast<int64_t>(spans.size()), scale,
                               scores.data(), out.data());
            return out;
          };
          const auto whole = attend({0, length});
          double worst = 0.0;
          for (size_t i = 0; i < whole.size(); ++i) worst = std::max(worst, std::fabs(whole[i] - expected[i]));
          CHECK(worst < 3e-6);
          if (first.empty()) first = whole;
          CHECK(same_bits(whole, first));
          if (length > 4) CHECK(same_bits(whole, attend({0, 1, 4, length})));
        }
      }
    }
  }
}

TEST_CASE("attention survives scores far apart") {
  const std::vector<float> q(8, 100.0f);
  std::vector<uint16_t> keys(16, float_to_half(-100.0f));
  std::fill_n(keys.begin(), 8, float_to_half(100.0f));
  std::vector<uint16_t> values(16, float_to_half(5.0f));
  std::fill_n(values.begin(), 8, float_to_half(3.0f));
  const KvSpan span{keys.data(), values.data(), 2};
  for (const KernelTable* kernels : all_kernels()) {
    float scores[2];
    float out[8];
    kernels->attention(q.data(), 1, 8, &span, 1, 1.0f, scores, out);
    for (const float value : out) CHECK(value == 3.0f);
  }
}
