#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "base/half.h"
#include "engine/engine.h"
#include "engine/sampler.h"
#include "kernels/kernels.h"

using namespace elutq;

namespace {

ModelConfig tiny_config() {
  ModelConfig config;
  config.vocab_size = 50;
  config.hidden_size = 32;
  config.intermediate_size = 40;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.max_position_embeddings = 300;
  config.rms_norm_eps = 1e-5F;
  config.attention_bias_qkv = true;
  config.qk_norm = true;
  config.rope_inv_freq = {1.0F, 0.1F, 0.01F, 0.001F};
  config.sliding_windows = {0, 20};
  config.sparse_layers = {false, false};
  return config;
}

ModelConfig tiny_mixture() {
  ModelConfig config = tiny_config();
  config.sparse_layers = {false, true};
  config.num_experts = 5;
  config.num_experts_per_tok = 2;
  config.moe_intermediate_size = 24;
  config.norm_topk_prob = true;
  config.moe_block = "block_sparse_moe";
  config.expert_linears = {"w1", "w3", "w2"};
  return config;
}

/// All weights: vectors that are the same every time, and matrix(name, out_features, in_features) for each matrix.
template <typename SetMatrix>
void fill(Engine& engine, SetMatrix matrix) {
  const ModelConfig& config = engine.config();
  const auto vector = [&](const std::string& name, int64_t size) {
    std::vector<float> values(size);
    std::iota(values.begin(), values.end(), 1.0F);
    for (float& value : values) value = 1.0F + 0.01F * value;
    engine.weights().set_vector(name, values);
  };
  matrix("model.embed_tokens", 50, 32);
  if (!config.tie_word_embeddings) matrix("lm_head", 50, 32);
  vector("model.norm.weight", 32);
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    vector(layer + "input_layernorm.weight", 32);
    vector(layer + "post_attention_layernorm.weight", 32);
    vector(layer + "self_attn.q_norm.weight", 8);
    vector(layer + "self_attn.k_norm.weight", 8);
    vector(layer + "self_attn.q_proj.bias", 32);
    vector(layer + "self_attn.k_proj.bias", 16);
    vector(layer + "self_attn.v_proj.bias", 16);
    matrix(layer + "self_attn.q_proj", 32, 32);
    matrix(layer + "self_attn.k_proj", 16, 32);
    matrix(layer + "self_attn.v_proj", 16, 32);
    matrix(layer + "self_attn.o_proj", 32, 32);
    if (!config.sparse_layers[i]) {
      matrix(layer + "mlp.gate_proj", 40, 32);
      matrix(layer + "mlp.up_proj", 40, 32);
      matrix(layer + "mlp.down_proj", 32, 40);
      continue;
    }
    const std::string block = layer + "block_sparse_moe.";
    matrix(block + "gate", config.num_experts, 32);
    for (int64_t e = 0; e < config.num_experts; ++e) {
      const std::string expert = block + "experts." + std::to_string(e) + ".";
      matrix(expert + "w1", 24, 32);
      matrix(expert + "w3", 24, 32);
      matrix(expert + "w2", 32, 24);
    }
  }
}

/// Dense fp32 matrices, kept alive by the engine.
void fill(Engine& engine) {
  unsigned seed = 0;
  fill(engine, [&](const std::string& name, int64_t out, int64_t in) {
    std::mt19937 generator(++seed);
    std::normal_distribution<float> normal(0.0F, 1.0F / std::sqrt(static_cast<float>(in)));
    auto values = std::make_shared<std::vector<float>>(out * in);
    for (float& value : *values) value = normal(generator);
    const float* data = values->data();
    engine.weights().set_dense(name, DenseType::kFloat32, data, out, in, std::move(values));
  });
}

/// HLQ matrices of 1 to 4 bits, from integers alone: std::normal_distribution may round differently elsewhere.
void fill_hlq(Engine& engine) {
  unsigned seed = 0;
  fill(engine, [&](const std::string& name, int64_t out, int64_t in) {
    std::mt19937 generator(++seed);
    const HlqShape shape = {out, in, static_cast<int>(1 + seed % kMaxBits), 32};
    std::vector<uint8_t> planes(shape.bits * out * ((in + 7) / 8));
    for (uint8_t& byte : planes) byte = static_cast<uint8_t>(generator());
    // Small embeddings, so that the layers have their say.
    const float step = name == "model.embed_tokens" ? 0x1p-14F : 0x1p-9F;
    const auto halves = [&](int64_t count) {
      std::vector<uint16_t> values(count);
      for (uint16_t& value : values) {
        value = float_to_half(static_cast<float>(static_cast<int>(generator() % 512) - 256) * step);
      }
      return values;
    };
    const std::vector<uint16_t> scales = halves(out * shape.groups() * shape.bits);
    const std::vector<uint16_t> zeros = halves(out * shape.groups());
    engine.weights().set_hlq(name, {shape, planes.data(), scales.data(), zeros.data()});
  });
}

/// Tokens chosen greedily after a prompt, and a hash of the bits of every logit on the way (FNV-1a).
struct Trace {
  std::string tokens;
  uint64_t hash = 0xcbf29ce484222325ULL;
};

Trace greedy(Engine& engine, std::vector<int32_t> input, int count) {
  Trace trace;
  const auto sequence = engine.new_sequence(300);
  for (int i = 0; i < count; ++i) {
    std::vector<float> logits(input.size() * 50);
    engine.step(std::array<StepItem, 1>{{{sequence.get(), input, true}}}, logits.data());
    for (const float logit : logits) trace.hash = (trace.hash ^ std::bit_cast<uint32_t>(logit)) * 0x100000001b3ULL;
    const auto last = logits.end() - 50;
    input = {static_cast<int32_t>(std::max_element(last, logits.end()) - last)};
    trace.tokens += std::to_string(input[0]) + " ";
  }
  return trace;
}

std::vector<int32_t> some_tokens(size_t count) {
  std::vector<int32_t> tokens(count);
  for (size_t i = 0; i < count; ++i) tokens[i] = static_cast<int32_t>(i * 7 % 50);
  return tokens;
}

}  // namespace

TEST_CASE("logits do not depend on chunks, company or threads") {
  const std::vector<int32_t> tokens = some_tokens(1090);  // nine chunks, two sections
  ModelConfig config;
  std::vector<float> expected;
  const auto check = [&](int threads, KvType kv_type) {
    Engine engine(config, "", threads, false, kv_type);
    fill(engine);
    std::vector<float> logits(tokens.size() * 50);
    const auto whole = engine.new_sequence(1100);
    engine.step(std::array<StepItem, 1>{{{whole.get(), tokens, true}}}, logits.data());
    CHECK(whole->length() == 1090);
    if (expected.empty()) expected = logits;
    CHECK(logits == expected);

    const auto mine = engine.new_sequence(1100);
    const auto other = engine.new_sequence(1100);
    std::vector<float> rows(4 * 50);
    size_t done = 0;
    for (size_t piece = 1; done < tokens.size(); piece = piece * 2 + 1) {
      const size_t count = std::min(piece, tokens.size() - done);
      const std::array<StepItem, 2> items = {
          {{other.get(), {tokens.data() + done % 9, 1}, false}, {mine.get(), {tokens.data() + done, count}, false}}};
      engine.step(items, rows.data());
      done += count;
      CHECK(std::equal(rows.begin() + 50, rows.begin() + 100, expected.begin() + (done - 1) * 50));
    }
  };
  for (const ModelConfig& model : {tiny_config(), tiny_mixture()}) {
    config = model;
    config.max_position_embeddings = 1100;
    for (const KvType kv_type : {KvType::kFloat16, KvType::kInt8}) {
      expected.clear();
      for (const int threads : {1, 2, 4}) check(threads, kv_type);
    }
  }
}

TEST_CASE("every machine computes the same tokens, from the same bits") {
  // Known answers: they change when the definition of a result does, never with the machine.
  for (const std::string_view isa : available_isas()) {
    CAPTURE(isa);
    Engine engine(tiny_config(), isa, 2, false, KvType::kFloat16);
    fill_hlq(engine);
    const Trace rounded = greedy(engine, some_tokens(150), 24);
    CHECK(rounded.tokens == "15 8 13 42 42 13 42 42 42 13 42 13 42 13 42 42 42 13 42 42 42 42 13 13 ");
    CHECK(rounded.hash == 5207630014395030548ULL);

    Engine exact_engine(tiny_config(), isa, 2, true, KvType::kFloat16);
    fill_hlq(exact_engine);
    const Trace exact = greedy(exact_engine, some_tokens(150), 24);
    CHECK(exact.tokens == "15 8 13 42 42 42 42 42 42 13 42 42 13 42 42 13 42 42 13 42 13 13 13 13 ");
    CHECK(exact.hash == 4432352189075656635ULL);

    Engine int8_engine(tiny_config(), isa, 2, false, KvType::kInt8);
    fill_hlq(int8_engine);
    const Trace int8 = greedy(int8_engine, some_tokens(150), 24);
    CHECK(int8.tokens == "15 8 13 42 42 13 42 42 42 42 42 42 42 42 42 13 42 13 13 42 13 42 13 13 ");
    CHECK(int8.hash == 7391708033964485777ULL);

    Engine mixture_engine(tiny_mixture(), isa, 2, false, KvType::kFloat16);
    fill_hlq(mixture_engine);
    const Trace mixture = greedy(mixture_engine, some_tokens(150), 24);
    CHECK(mixture.tokens == "15 15 15 15 15 15 42 13 13 13 13 13 13 13 13 13 13 13 13 13 13 13 13 13 ");
    CHECK(mixture.hash == 683661640603265694ULL);
  }
}

TEST_CASE("a token is given to its most probable experts, of equals to those of lower index") {
  // With a router of zeros all are equally probable and the first two are chosen: the third does not matter.
  ModelConfig config = tiny_mixture();
  const auto logits_of = [&](bool norm, float third_expert) {
    config.norm_topk_prob = norm;
    Engine engine(config, "", 1, false, KvType::kFloat16);
    fill(engine);
    std::vector<float> router(5 * 32, 0.0F), third(24 * 32, third_expert);
    engine.weights().set_dense("model.layers.1.block_sparse_moe.gate", DenseType::kFloat32, router.data(), 5, 32,
                               nullptr);
    engine.weights().set_dense("model.layers.1.block_sparse_moe.experts.2.w3", DenseType::kFloat32, third.data(), 24,
                               32, nullptr);
    const auto sequence = engine.new_sequence(10);
    const std::vector<int32_t> tokens = {3, 1, 4};
    std::vector<float> logits(3 * 50);
    engine.step(std::array<StepItem, 1>{{{sequence.get(), tokens, true}}}, logits.data());
    return logits;
  };
  CHECK(logits_of(true, 0.0F) == logits_of(true, 9.0F));
  CHECK(logits_of(true, 0.0F) != logits_of(false, 0.0F));
}

TEST_CASE("a decoded token reads only the experts it is given to") {
  ModelConfig config = tiny_mixture();
  Engine two(config, "", 1, false, KvType::kFloat16);
  fill_hlq(two);
  config.num_experts_per_tok = 5;
  Engine all(config, "", 1, false, KvType::kFloat16);
  fill_hlq(all);
  CHECK(all.weights().memory_bytes() == two.weights().memory_bytes());
  // fill_hlq() gives its n-th matrix 1 + n % 4 bits; before the experts come embedding, head, 7 + 4 of the layers and
  // the router. Rows are of one group.
  int64_t experts = 0;
  for (int64_t n = 15; n < 30; ++n) {
    const bool is_down = n % 3 == 2;
    const int64_t rows = is_down ? 32 : 24, columns = is_down ? 24 : 32, bits = 1 + n % kMaxBits;
    experts += rows * (bits * columns / 8 + 2 * (bits + 1));
  }
  CHECK(all.weights().bytes_per_token() - two.weights().bytes_per_token() == experts / 5 * 3);
}

TEST_CASE("incomplete or foreign weights are named") {
  Engine engine(tiny_config(), "", 1, false, KvType::kFloat16);
  const auto sequence = engine.new_sequence(10);
  const std::vector<int32_t> tokens = {1};
  std::vector<float> logits(50);
  const std::array<StepItem, 1> items = {{{sequence.get(), tokens, false}}};
  CHECK_THROWS_WITH_AS(engine.step(items, logits.data()), "the model's weights lack lm_head", std::invalid_argument);
  Weights& weights = engine.weights();
  const std::vector<float> values(32 * 32);
  const auto set = [&](const char* name, int64_t out, int64_t in) {
    weights.set_dense(name, DenseType::kFloat32, values.data(), out, in, nullptr);
  };
  CHECK_THROWS_AS(set("model.layers.2.mlp.up_proj", 32, 32), std::invalid_argument);
  CHECK_THROWS_AS(set("model.layers.0.self_attn.q_proj", 32, 31), std::invalid_argument);
  CHECK_THROWS_AS(weights.set_vector("model.norm.weight", std::vector<float>(31)), std::invalid_argument);
  Engine mixture(tiny_mixture(), "", 1, false, KvType::kFloat16);
  fill(mixture);
  CHECK_THROWS_AS(mixture.weights().set_dense("model.layers.1.block_sparse_moe.experts.5.w1", DenseType::kFloat32,
                                              values.data(), 24, 32, nullptr),
                  std::invalid_argument);
  CHECK_THROWS_AS(
      mixture.weights().set_dense("model.layers.1.mlp.up_proj", DenseType::kFloat32, values.data(), 40, 32, nullptr),
      std::invalid_argument);
  CHECK_THROWS_AS(weights.set_vector("model.norm.bias", std::vector<float>(32)), std::invalid_argument);
  fill(engine);
  engine.step(items, logits.data());
  CHECK(sequence->length() == 1);
}

TEST_CASE("configs are validated") {
  const auto broken = [](const auto& change) {
    ModelConfig config = tiny_config();
    change(config);
    CHECK_THROWS_AS(Engine(config, "", 1, false, KvType::kFloat16), std::invalid_argument);
  };
  broken([](ModelConfig& c) { c.num_key_value_heads = 3; });
  broken([](ModelConfig& c) { c.head_dim = 12; });
  broken([](ModelConfig& c) { c.rope_inv_freq.pop_back(); });
  broken([](ModelConfig& c) { c.sliding_windows.pop_back(); });
  broken([](ModelConfig& c) { c.vocab_size = 0; });
  broken([](ModelConfig& c) { c.sparse_layers.pop_back(); });
  broken([](ModelConfig& c) { c.sparse_layers[0] = true; });
  broken([](ModelConfig& c) {
    c = tiny_mixture();
    c.num_experts_per_tok = 6;
  });
  broken([](ModelConfig& c) {
    c = tiny_mixture();
    c.moe_intermediate_size = 0;
  });
  CHECK_THROWS_AS(Engine(tiny_config(), "no-such-isa", 1, false, KvType::kFloat16), std::invalid_argument);
  CHECK_THROWS_AS(Engine(tiny_config(), "", 0, false, KvType::kFloat16), std::invalid_argument);
}

TEST_CASE("the cache keeps every position in its place") {
  const KernelTable& kernels = select_kernels("");
  for (const KvType type : {KvType::kFloat16, KvType::kInt8}) {
    KvCache cache(tiny_config(), type, 300);
    const KvLayout layout{type, 2, 8};
    CHECK(layout.bytes() == 2 * 64 * (type == KvType::kFloat16 ? (8 + 16) * 2 : 8 + 16 + 8));
    CHECK_THROWS_AS(cache.reserve(301), std::invalid_argument);
    cache.reserve(200);
    CHECK(cache.memory_bytes() == 4 * 2 * layout.bytes());  // pages, layers
    const auto is_at = [](int64_t position, int64_t layer) { return static_cast<float>(position % 100 + 10 * layer); };
    for (int64_t position = 0; position < 200; ++position) {
      for (int64_t layer = 0; layer < 2; ++layer) {
        std::vector<float> key(16, is_at(position, layer)), value(16, -is_at(position, layer));
        std::fill_n(key.begin(), 8, 0.0F);  // of the first head
        cache.store(kernels, layer, position, key.data(), value.data());
      }
    }
    cache.set_length(200);
    const AttentionRun run = cache.run(1, 170, 30);
    CHECK(run.position == 170);
    CHECK(run.tokens == 30);
    for (int64_t position = 0; position < 200; ++position) {
      const int64_t slot = position % kPagePositions;
      const uint8_t* page = run.pages[position / kPagePositions] + run.layer_offset;
      const auto element = [&](int64_t offset, int64_t index, int64_t scales) {
        if (type == KvType::kFloat16) return half_to_float(reinterpret_cast<const uint16_t*>(page + offset)[index]);
        const float scale = reinterpret_cast<const float*>(page + scales)[slot];
        return static_cast<float>(reinterpret_cast<const int8_t*>(page + offset)[index]) * scale;
      };
      const float key = element(layout.keys_offset(1), 3 * kPagePositions + slot, layout.key_scales_offset(1));
      const float value = element(layout.values_offset(1), slot * 16 + 7, layout.value_scales_offset(1));
      CHECK(key == doctest::Approx(is_at(position, 1)));
      CHECK(value == doctest::Approx(-is_at(position, 1)));
    }
    cache.truncate(64);
    CHECK(cache.memory_bytes() == 2 * layout.bytes());
    CHECK(cache.length() == 64);
    CHECK_THROWS_AS(cache.truncate(65), std::invalid_argument);
    CHECK_THROWS_AS(cache.truncate(-1), std::invalid_argument);
  }
}

TEST_CASE("a sampler draws its documented sequence") {
  // With equal logits, token floor(u * n): the first three draws of seed 0 are SplitMix64's published outputs.
  const std::vector<float> logits(1000, 1.0F);
  SamplingOptions options;
  options.temperature = 1.0F;
  Sampler sampler(options);
  const std::array<uint64_t, 3> published = {0xE220A8397B1DCDAFULL, 0x6E789E6AA1B965F4ULL, 0x06C45D188009454FULL};
  for (const uint64_t output : published) {
    CHECK(sampler.sample(logits, {}) == static_cast<int32_t>(static_cast<double>(output >> 11) * 0x1p-53 * 1000));
  }
}
