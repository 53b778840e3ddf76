// Dense products, attention and elementwise functions on every instruction set this machine can run.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/aligned.h"
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

TEST_CASE("norms, sums, softmax, rope and silu_mul match their definitions, the same bits everywhere") {
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

      std::vector<float> scaled = w;
      kernels->add_scaled(x.data(), 0.3f, count, scaled.data());
      for (int64_t i = 0; i < count; ++i) CHECK(scaled[i] == std::fma(0.3f, x[i], w[i]));

      std::vector<float> exponentials = x;
      const float most = *std::max_element(x.begin(), x.end());
      for (float& value : exponentials) value = reference::exp(value - most);
      const float inverse_sum = 1.0f / reference::sum(exponentials.data(), count);
      std::vector<float> probabilities = x;
      kernels->softmax(probabilities.data(), count);
      for (int64_t i = 0; i < count; ++i) CHECK(probabilities[i] == exponentials[i] * inverse_sum);

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

namespace {

/// A layer's cache, filled with random keys and values, and what it holds as floats.
struct CacheCase {
  KvLayout layout;
  std::vector<AlignedBuffer<uint8_t>> pages;
  std::vector<const uint8_t*> addresses;
  std::vector<float> keys, values, key_scales, value_scales;  // [heads][positions][head_dim], [heads][positions]

  CacheCase(const KernelTable& kernels, KvType type, int64_t heads, int64_t head_dim, int64_t positions)
      : layout{type, heads, head_dim} {
    for (int64_t p = 0; p < positions; p += kPagePositions) {
      pages.emplace_back(kLayerOffset + layout.bytes());
      std::fill_n(pages.back().data(), pages.back().size(), uint8_t{0xff});  // NaN: what is not seen must not matter
      addresses.push_back(pages.back().data());
    }
    keys = random_floats(heads * positions * head_dim, 32);
    values = random_floats(heads * positions * head_dim, 33);
    for (int64_t j = 0; j < positions; ++j) {
      std::vector<float> key, value;  // [heads][head_dim]
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t offset = (head * positions + j) * head_dim;
        key.insert(key.end(), keys.begin() + offset, keys.begin() + offset + head_dim);
        value.insert(value.end(), values.begin() + offset, values.begin() + offset + head_dim);
      }
      store(kernels, j, key, value);
    }
    for (float* x : {keys.data(), values.data()}) {
      auto& scales = x == keys.data() ? key_scales : value_scales;
      for (int64_t j = 0; j < heads * positions; ++j, x += head_dim) round(x, scales);
    }
  }

  void store(const KernelTable& kernels, int64_t position, const std::vector<float>& key,
             const std::vector<float>& value) {
    kernels.store_kv(layout, key.data(), value.data(), position % kPagePositions,
                     pages[position / kPagePositions].data() + kLayerOffset);
  }

  /// What the cache should hold of a vector.
  void round(float* x, std::vector<float>& scales) const {
    if (layout.type == KvType::kFloat16) {
      for (int64_t d = 0; d < layout.head_dim; ++d) x[d] = half_to_float(float_to_half(x[d]));
      return;
    }
    float largest = 0.0f;
    for (int64_t d = 0; d < layout.head_dim; ++d) largest = std::max(largest, std::fabs(x[d]));
    scales.push_back(largest / 127.0f);
    const double inverse = 127.0f / largest;
    for (int64_t d = 0; d < layout.head_dim; ++d) x[d] = static_cast<float>(std::nearbyint(x[d] * inverse));
  }

  /// Attention of the tokens [position, position + tokens), `tile_tokens` and `tile_heads` at a time.
  std::vector<float> attend(const KernelTable& kernels, const std::vector<float>& q, int64_t group, int64_t position,
                            int64_t tokens, int64_t window, int64_t tile_tokens, int64_t tile_heads) const {
    const int64_t stride = layout.heads * group * layout.head_dim;
    std::vector<float> out(q.size());
    for (int64_t t = 0; t < tokens; t += tile_tokens) {
      for (int64_t head = 0; head < layout.heads; head += tile_heads) {
        const int64_t offset = t * stride + head * group * layout.head_dim;
        const AttentionTile tile = {.layout = layout,
                                    .pages = addresses.data(),
                                    .layer_offset = kLayerOffset,
                                    .kv_head = head,
                                    .kv_heads = std::min(tile_heads, layout.heads - head),
                                    .group = group,
                                    .position = position + t,
                                    .window = window,
                                    .tokens = std::min(tile_tokens, tokens - t),
                                    .q = q.data() + offset,
                                    .q_stride = stride,
                                    .scale = kScale};
        const int64_t size = tile.rows() * partial_floats(layout);
        const int64_t sections = tile.section_end() - tile.section_begin();
        std::vector<float> scores(static_cast<size_t>(tile.rows() * kScoreStride), NAN);
        std::vector<float> partials(static_cast<size_t>(sections * size), NAN);
        for (int64_t s = 0; s < sections; ++s) {
          kernels.attention(tile, tile.section_begin() + s, scores.data(), partials.data() + s * size);
        }
        kernels.merge_attention(tile, sections, partials.data(), out.data() + offset);
      }
    }
    return out;
  }

  static constexpr int64_t kLayerOffset = 128;
  static constexpr float kScale = 0.1f;
};

}  // namespace

TEST_CASE("attention adds in its stated order, whatever the tile") {
  struct Case {
    int64_t head_dim, group, position, tokens, window;
  };
  constexpr int64_t kHeads = 3;
  const std::vector<Case> cases = {
      {8, 1, 0, 3, 0},   {16, 3, 60, 9, 0},   {24, 7, 5, 2, 0},     {64, 4, 100, 10, 0},    {72, 2, 63, 5, 4},
      {80, 1, 30, 9, 2}, {128, 4, 127, 5, 0}, {128, 1, 1020, 9, 0}, {64, 2, 2046, 5, 1030}, {256, 8, 64, 1, 1},
      {32, 1, 50, 7, 1}, {96, 5, 1, 1, 0},    {128, 4, 2500, 1, 0}, {16, 2, 1023, 3, 2},    {8, 1, 1022, 5, 1024},
  };
  for (const KvType type : {KvType::kFloat16, KvType::kInt8}) {
    for (const Case& c : cases) {
      const int64_t positions = c.position + c.tokens;
      const int64_t stride = kHeads * c.group * c.head_dim;
      const auto q = random_floats(c.tokens * stride, 31);
      const CacheCase any(*all_kernels()[0], type, kHeads, c.head_dim, positions);
      std::vector<float> expected(q.size());
      for (int64_t t = 0; t < c.tokens; ++t) {
        const int64_t end = c.position + t + 1;
        const int64_t begin = c.window == 0 ? 0 : std::max<int64_t>(0, end - c.window);
        const bool scaled = type == KvType::kInt8;
        for (int64_t h = 0; h < kHeads * c.group; ++h) {
          const int64_t offset = t * stride + h * c.head_dim;
          const int64_t first = h / c.group * positions + begin;
          reference::attention(q.data() + offset, any.keys.data() + first * c.head_dim,
                               any.values.data() + first * c.head_dim, scaled ? any.key_scales.data() + first : nullptr,
                               scaled ? any.value_scales.data() + first : nullptr, begin, end - begin, c.head_dim,
                               CacheCase::kScale, expected.data() + offset);
        }
      }
      for (const KernelTable* kernels : all_kernels()) {
        CAPTURE(kernels->isa);
        CAPTURE(static_cast<int>(type));
        CAPTURE(c.head_dim);
        CAPTURE(c.position);
        const CacheCase cache(*kernels, type, kHeads, c.head_dim, positions);
        for (const auto& [tokens, heads] : {std::pair<int64_t, int64_t>{1, 3}, {3, 2}, {c.tokens, 1}}) {
          CHECK(same_bits(cache.attend(*kernels, q, c.group, c.position, c.tokens, c.window, tokens, heads), expected));
        }
      }
    }
  }
}

TEST_CASE("attention matches softmax in double") {
  constexpr int64_t kHeadDim = 64;
  constexpr int64_t kPositions = 1500;
  const auto q = random_floats(kHeadDim, 31);
  for (const KvType type : {KvType::kFloat16, KvType::kInt8}) {
    const KernelTable& kernels = *all_kernels().back();
    const CacheCase cache(kernels, type, 1, kHeadDim, kPositions);
    const auto keys = random_floats(kPositions * kHeadDim, 32);
    const auto values = random_floats(kPositions * kHeadDim, 33);
    std::vector<double> expected(kHeadDim);
    double total = 0.0;
    for (int64_t j = 0; j < kPositions; ++j) {
      double dot = 0.0;
      for (int64_t d = 0; d < kHeadDim; ++d) dot += static_cast<double>(q[d]) * keys[j * kHeadDim + d];
      const double weight = std::exp(CacheCase::kScale * dot);
      total += weight;
      for (int64_t d = 0; d < kHeadDim; ++d) expected[d] += weight * values[j * kHeadDim + d];
    }
    const auto out = cache.attend(kernels, q, 1, kPositions - 1, 1, 0, 1, 1);
    double worst = 0.0;
    for (int64_t d = 0; d < kHeadDim; ++d) worst = std::max(worst, std::fabs(out[d] - expected[d] / total));
    CHECK(worst < (type == KvType::kFloat16 ? 1e-4 : 2e-3));
  }
}

TEST_CASE("attention survives scores far apart and empty vectors") {
  const std::vector<float> q(8, 100.0f);
  for (const KvType type : {KvType::kFloat16, KvType::kInt8}) {
    for (const KernelTable* kernels : all_kernels()) {
      CacheCase cache(*kernels, type, 1, 8, 3);
      const auto store = [&](int64_t position, float key, float value) {
        cache.store(*kernels, position, std::vector<float>(8, key), std::vector<float>(8, value));
      };
      store(0, 100.0f, 3.0f);
      store(1, -100.0f, 5.0f);
      store(2, 0.0f, 0.0f);
      for (const float value : cache.attend(*kernels, q, 1, 1, 1, 0, 1, 1)) CHECK(value == 3.0f);
      for (const float value : cache.attend(*kernels, q, 1, 2, 1, 1, 1, 1)) CHECK(value == 0.0f);
    }
  }
}
