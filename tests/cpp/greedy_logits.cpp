// greedy_logits MODEL ISA fp16|int8 COUNT PROMPT_TOKEN...: reads a model that tests/e2e/emulated.py dumped, decodes
// COUNT tokens greedily with a cache of that type and writes the logits of each, fp32 [COUNT][vocab_size], to standard
// output.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace {

using namespace elutq;

/// Reads the dump's numbers and arrays in the order in which they were written.
class Dump {
 public:
  explicit Dump(const char* path) : file_(path, std::ios::binary) {
    file_.exceptions(std::ios::failbit | std::ios::badbit);
  }

  bool at_end() { return file_.peek() == std::ifstream::traits_type::eof(); }
  int64_t integer() { return values<int64_t>(1)[0]; }
  bool flag() { return integer() != 0; }
  /// An array that follows its length in elements.
  template <typename T>
  std::vector<T> array() {
    return values<T>(integer());
  }
  std::string text() {
    const std::vector<char> characters = array<char>();
    return {characters.begin(), characters.end()};
  }

 private:
  template <typename T>
  std::vector<T> values(int64_t count) {
    std::vector<T> result(count);
    file_.read(reinterpret_cast<char*>(result.data()), count * static_cast<int64_t>(sizeof(T)));
    return result;
  }

  std::ifstream file_;
};

ModelConfig read_config(Dump& dump) {
  ModelConfig config;
  for (int64_t* number :
       {&config.vocab_size, &config.hidden_size, &config.intermediate_size, &config.num_hidden_layers,
        &config.num_attention_heads, &config.num_key_value_heads, &config.head_dim, &config.max_position_embeddings}) {
    *number = dump.integer();
  }
  for (bool* flag : {&config.tie_word_embeddings, &config.attention_bias_qkv, &config.attention_bias_o,
                     &config.mlp_bias, &config.qk_norm}) {
    *flag = dump.flag();
  }
  config.sliding_windows = dump.array<int64_t>();
  config.sparse_layers.resize(config.num_hidden_layers);  // dense models alone are dumped
  config.rope_inv_freq = dump.array<float>();
  const std::vector<float> factors = dump.array<float>();
  config.rms_norm_eps = factors.at(0);
  config.rope_attention_factor = factors.at(1);
  return config;
}

void read_weights(Dump& dump, Weights& weights) {
  while (!dump.at_end()) {
    const std::string name = dump.text();
    const std::string kind = dump.text();
    if (kind == "vector") {
      weights.set_vector(name, dump.array<float>());
      continue;
    }
    HlqShape shape;
    shape.out_features = dump.integer();
    shape.in_features = dump.integer();
    if (kind == "bfloat16") {
      auto values = std::make_shared<std::vector<uint16_t>>(dump.array<uint16_t>());
      const void* data = values->data();
      weights.set_dense(name, DenseType::kBFloat16, data, shape.out_features, shape.in_features, std::move(values));
    } else {
      shape.bits = static_cast<int>(dump.integer());
      shape.group_size = dump.integer();
      shape.param_bits = static_cast<int>(dump.integer());
      const auto planes = dump.array<uint8_t>();
      const auto scales = dump.array<uint8_t>();  // bytes, whatever the parameters are
      const auto zeros = dump.array<uint8_t>();
      const auto row_scales = dump.array<uint16_t>();
      weights.set_hlq(name, {shape, planes.data(), scales.data(), zeros.data(), row_scales.data()});
    }
  }
}

void run(const char* path, const char* isa, KvType kv_type, int count, std::vector<int32_t> tokens) {
  Dump dump(path);
  Engine engine(read_config(dump), isa, 1, false, kv_type);
  read_weights(dump, engine.weights());
  const auto sequence = engine.new_sequence(engine.config().max_position_embeddings);
  std::vector<float> logits(engine.config().vocab_size);
  for (int i = 0; i < count; ++i) {
    engine.step(std::array<StepItem, 1>{{{sequence.get(), tokens}}}, logits.data());
    std::fwrite(logits.data(), sizeof(float), logits.size(), stdout);
    tokens = {static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin())};
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fputs("greedy_logits MODEL ISA fp16|int8 COUNT PROMPT_TOKEN...\n", stderr);
    return 2;
  }
  try {
    std::vector<int32_t> prompt;
    std::transform(argv + 5, argv + argc, std::back_inserter(prompt),
                   [](const char* token) { return std::atoi(token); });
    const KvType kv_type = std::string_view(argv[3]) == "int8" ? KvType::kInt8 : KvType::kFloat16;
    run(argv[1], argv[2], kv_type, std::atoi(argv[4]), std::move(prompt));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
