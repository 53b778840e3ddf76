// HLQ matrices on every instruction set this machine can run, against the oracle.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernel_cases.h"
#include "kernels/reference.h"

using namespace elutq;
using namespace elutq::testing;

namespace {

constexpr int64_t kWholeRow = -1;

HlqShape make_shape(int64_t out, int64_t in, int bits, int64_t group, int param_bits = 16) {
  return {.out_features = out,
          .in_features = in,
          .bits = bits,
          .group_size = group == kWholeRow ? in : group,
          .param_bits = param_bits};
}

std::vector<HlqShape> shapes() {
  std::vector<HlqShape> all;
  for (int bits = 1; bits <= kMaxBits; ++bits) {
    for (const int64_t group : {int64_t{32}, int64_t{64}, int64_t{128}, int64_t{256}, kWholeRow}) {
      for (const auto& [out, in] : {std::pair<int64_t, int64_t>{1, 1},
                                    {3, 5},
                                    {17, 31},
                                    {33, 33},
                                    {100, 100},
                                    {65, 320},
                                    {129, 1003},
                                    {7, 4100}}) {
        for (const int param_bits : {16, 8}) all.push_back(make_shape(out, in, bits, group, param_bits));
      }
    }
  }
  return all;
}

std::string name_of(const HlqShape& shape) {
  return std::to_string(shape.out_features) + "x" + std::to_string(shape.in_features) + " bits " +
         std::to_string(shape.bits) + " group " + std::to_string(shape.group_size) + " parameters of " +
         std::to_string(shape.param_bits);
}

std::vector<const KernelTable*> all_kernels() {
  std::vector<const KernelTable*> tables;
  for (const std::string_view isa : available_isas()) tables.push_back(find_kernels(isa));
  return tables;
}

AlignedBuffer<uint8_t> packed_by(const KernelTable& kernels, const HlqCase& matrix) {
  AlignedBuffer<uint8_t> packed(static_cast<size_t>(kernels.packed_bytes(matrix.shape)));
  std::fill_n(packed.data(), packed.size(), uint8_t{0xa5});
  // In two parts, the later rows first.
  const int64_t middle = matrix.shape.out_features / 2 / kernels.row_tile * kernels.row_tile;
  kernels.pack(matrix.view(), middle, matrix.shape.out_features, packed.data());
  if (middle > 0) kernels.pack(matrix.view(), 0, middle, packed.data());
  return packed;
}

bool same_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("scalar is always there and the last one is chosen") {
  const auto isas = available_isas();
  REQUIRE(!isas.empty());
  CHECK(isas.front() == "scalar");
  CHECK(select_kernels("").isa == isas.back());
  for (const auto isa : isas) CHECK(select_kernels(isa).isa == isa);
  CHECK(find_kernels("mmx") == nullptr);
  CHECK_THROWS_WITH_AS(select_kernels("mmx"),
                       doctest::Contains("'mmx' cannot run on this machine; available are: scalar"),
                       std::invalid_argument);
}

TEST_CASE("unpacking a packed row gives the definition's weights") {
  for (const KernelTable* kernels : all_kernels()) {
    for (const HlqShape& shape : shapes()) {
      CAPTURE(kernels->isa);
      CAPTURE(name_of(shape));
      const HlqCase matrix(shape, 7);
      const auto packed = packed_by(*kernels, matrix);
      std::vector<float> row(static_cast<size_t>(shape.in_features));
      bool same = true;
      for (int64_t r = 0; r < shape.out_features; ++r) {
        kernels->unpack_row(shape, packed.data(), r, row.data());
        for (int64_t k = 0; k < shape.in_features; ++k) same &= row[k] == reference::weight(matrix.view(), r, k);
      }
      CHECK(same);
    }
  }
}

TEST_CASE("tables are the oracle's, bit for bit") {
  for (const KernelTable* kernels : all_kernels()) {
    for (const int64_t in : {1, 3, 5, 31, 32, 33, 100, 127, 128, 129, 320, 1003, 4100}) {
      for (const int64_t group : {int64_t{32}, int64_t{64}, int64_t{128}, int64_t{256}, kWholeRow}) {
        CAPTURE(kernels->isa);
        CAPTURE(in);
        CAPTURE(group);
        const HlqShape shape = make_shape(1, in, 1, group);
        auto x = random_floats(in, static_cast<uint32_t>(in));
        if (in > 300) {  // a segment of zeros, one of denormals, one with a huge outlier
          std::fill_n(x.begin(), 128, 0.0f);
          std::fill_n(x.begin() + 128, 128, 1e-42f);
          x[290] = 3e30f;
        }
        Tables expected(shape);
        Tables actual(shape);
        std::fill_n(actual.entries.data(), actual.entries.size(), uint8_t{0xa5});
        reference::build_tables(x.data(), in, shape.segment_size(), expected.view());
        kernels->build_tables(x.data(), in, shape.segment_size(), actual.view());
        CHECK(std::memcmp(expected.entries.data(), actual.entries.data(), expected.entries.size()) == 0);
        CHECK(same_bits(expected.scales.data(), actual.scales.data(), shape.segments()));
        CHECK(same_bits(expected.sums.data(), actual.sums.data(), shape.segments()));
      }
    }
  }
}

TEST_CASE("matmul gives the oracle's bits for any tokens and any split of the rows") {
  constexpr int64_t kTokens = 19;
  for (const HlqShape& shape : shapes()) {
    const HlqCase matrix(shape, 11);
    const auto x = random_floats(kTokens * shape.in_features, 12);
    std::vector<Tables> tables;
    std::vector<TableView> views;
    for (int64_t t = 0; t < kTokens; ++t) {
      tables.emplace_back(shape);
      views.push_back(tables.back().view());
      reference::build_tables(x.data() + t * shape.in_features, shape.in_features, shape.segment_size(), views.back());
    }
    const int64_t out = shape.out_features;
    const int64_t stride = out + 3;
    std::vector<float> expected(static_cast<size_t>(kTokens * stride), -7.0f);
    reference::matmul(matrix.view(), views.data(), kTokens, expected.data(), stride);

    for (const KernelTable* kernels : all_kernels()) {
      CAPTURE(kernels->isa);
      CAPTURE(name_of(shape));
      const auto packed = packed_by(*kernels, matrix);
      for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 19}) {
        CAPTURE(tokens);
        std::vector<float> actual(static_cast<size_t>(tokens * stride), -7.0f);
        kernels->matmul(shape, packed.data(), views.data(), tokens, 0, out, actual.data(), stride);
        CHECK(same_bits(expected.data(), actual.data(), tokens * stride));  // the three columns between rows too

        std::fill(actual.begin(), actual.end(), -7.0f);
        for (int64_t begin = 0; begin < out; begin += kernels->row_tile) {
          const int64_t end = std::min(begin + kernels->row_tile, out);
          kernels->matmul(shape, packed.data(), views.data(), tokens, begin, end, actual.data(), stride);
        }
        CHECK(same_bits(expected.data(), actual.data(), tokens * stride));
      }
    }
  }
}

TEST_CASE("column runs, row chunks and company change no bit") {
  int param_bits = 16;
  SUBCASE("fp16 parameters") {}
  SUBCASE("8-bit parameters") { param_bits = 8; }
  struct Case {
    int64_t out, in, tokens;
  };
  for (const Case& of : {Case{700, 5000, 5}, {700, 5000, 11}, {300, 600, 70}}) {
    const int64_t out = of.out;
    const int64_t in = of.in;
    const int64_t tokens = of.tokens;
    CAPTURE(tokens);
    const HlqShape shape = make_shape(out, in, 2, 128, param_bits);
    const HlqCase matrix(shape, 13);
    const auto x = random_floats(tokens * in, 14);
    for (const KernelTable* kernels : all_kernels()) {
      CAPTURE(kernels->isa);
      const auto packed = packed_by(*kernels, matrix);
      std::vector<Tables> tables;
      std::vector<TableView> views;
      for (int64_t t = 0; t < tokens; ++t) {
        tables.emplace_back(shape);
        views.push_back(tables.back().view());
        kernels->build_tables(x.data() + t * in, in, shape.segment_size(), views.back());
      }
      std::vector<float> together(static_cast<size_t>(tokens * out));
      std::vector<float> alone(together.size());
      kernels->matmul(shape, packed.data(), views.data(), tokens, 0, out, together.data(), out);
      for (int64_t t = 0; t < tokens; ++t) {
        kernels->matmul(shape, packed.data(), &views[t], 1, 0, out, alone.data() + t * out, out);
      }
      CHECK(same_bits(together.data(), alone.data(), tokens * out));
    }
  }
}

TEST_CASE("parameters of 8 bits take half the room, and four bytes per row") {
  for (const KernelTable* kernels : all_kernels()) {
    CAPTURE(kernels->isa);
    const int64_t halves = kernels->packed_bytes(make_shape(256, 1024, 2, 128));
    const int64_t bytes = kernels->packed_bytes(make_shape(256, 1024, 2, 128, 8));
    CHECK(halves - bytes == 256 * (8 * 3 - 4));
  }
}

TEST_CASE("int8 tables stay within one percent of the exact product") {
  const HlqShape shape = make_shape(256, 1024, 2, 128);
  const HlqCase matrix(shape, 15);
  const auto x = random_floats(shape.in_features, 16);
  std::vector<double> exact(256);
  reference::matmul_double(matrix.view(), x.data(), 1, exact.data());
  Tables tables(shape);
  const TableView view = tables.view();
  for (const KernelTable* kernels : all_kernels()) {
    const auto packed = packed_by(*kernels, matrix);
    kernels->build_tables(x.data(), shape.in_features, shape.segment_size(), view);
    std::vector<float> y(256);
    kernels->matmul(shape, packed.data(), &view, 1, 0, 256, y.data(), 256);
    double error = 0.0;
    double norm = 0.0;
    for (int64_t n = 0; n < 256; ++n) {
      error += (y[n] - exact[n]) * (y[n] - exact[n]);
      norm += exact[n] * exact[n];
    }
    CHECK(std::sqrt(error / norm) < 0.01);
  }
}

TEST_CASE("matmul_exact is near the double product and independent of batch and rows") {
  constexpr int64_t kTokens = 7;
  for (const HlqShape& shape : shapes()) {
    const HlqCase matrix(shape, 17);
    const auto x = random_floats(kTokens * shape.in_features, 18);
    const int64_t out = shape.out_features;
    std::vector<double> expected(static_cast<size_t>(kTokens * out));
    reference::matmul_double(matrix.view(), x.data(), kTokens, expected.data());
    std::vector<float> scalar;
    for (const KernelTable* kernels : all_kernels()) {
      CAPTURE(kernels->isa);
      CAPTURE(name_of(shape));
      const auto packed = packed_by(*kernels, matrix);
      std::vector<float> y(static_cast<size_t>(kTokens * out));
      kernels->matmul_exact(shape, packed.data(), x.data(), shape.in_features, kTokens, 0, out, y.data(), out);
      double worst = 0.0;
      for (size_t i = 0; i < y.size(); ++i) worst = std::max(worst, std::fabs(y[i] - expected[i]));
      CHECK(worst < 2e-6 * std::sqrt(static_cast<double>(shape.in_features)));
      if (scalar.empty()) scalar = y;
      CHECK(same_bits(scalar.data(), y.data(), kTokens * out));

      std::vector<float> split(y.size());
      for (int64_t t = 0; t < kTokens; ++t) {
        for (int64_t begin = 0; begin < out; begin += kernels->row_tile) {
          const int64_t end = std::min(begin + kernels->row_tile, out);
          kernels->matmul_exact(shape, packed.data(), x.data() + t * shape.in_features, shape.in_features, 1, begin,
                                end, split.data() + t * out, out);
        }
      }
      CHECK(same_bits(split.data(), y.data(), kTokens * out));
    }
  }
}

TEST_CASE("activations that are not finite give outputs that are not finite, never a crash") {
  int param_bits = 16;
  SUBCASE("fp16 parameters") {}
  SUBCASE("8-bit parameters") { param_bits = 8; }
  const HlqShape shape = make_shape(40, 100, 3, 32, param_bits);
  const HlqCase matrix(shape, 19);
  for (const KernelTable* kernels : all_kernels()) {
    const auto packed = packed_by(*kernels, matrix);
    for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      auto x = random_floats(shape.in_features, 20);
      x[50] = bad;
      Tables tables(shape);
      const TableView view = tables.view();
      kernels->build_tables(x.data(), shape.in_features, shape.segment_size(), view);
      std::vector<float> y(40);
      kernels->matmul(shape, packed.data(), &view, 1, 0, 40, y.data(), 40);
      CHECK(std::none_of(y.begin(), y.end(), [](float value) { return std::isfinite(value); }));
    }
  }
}
