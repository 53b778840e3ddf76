#include "engine/engine.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/hlq_matrix.h"
#include "engine/sampler.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace elutq;

template <typename T, int dimensions>
using Array = nb::ndarray<const T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;

ModelConfig to_model_config(nb::handle config) {
  const auto integer = [&](const char* name) { return nb::cast<int64_t>(config.attr(name)); };
  const auto flag = [&](const char* name) { return nb::cast<bool>(config.attr(name)); };
  ModelConfig result;
  result.vocab_size = integer("vocab_size");
  result.hidden_size = integer("hidden_size");
  result.intermediate_size = integer("intermediate_size");
  result.num_hidden_layers = integer("num_hidden_layers");
  result.num_attention_heads = integer("num_attention_heads");
  result.num_key_value_heads = integer("num_key_value_heads");
  result.head_dim = integer("head_dim");
  result.max_position_embeddings = integer("max_position_embeddings");
  result.rms_norm_eps = nb::cast<float>(config.attr("rms_norm_eps"));
  result.tie_word_embeddings = flag("tie_word_embeddings");
  result.attention_bias_qkv = flag("attention_bias_qkv");
  result.attention_bias_o = flag("attention_bias_o");
  result.mlp_bias = flag("mlp_bias");
  result.qk_norm = flag("qk_norm");
  result.rope_inv_freq = nb::cast<std::vector<float>>(config.attr("rope_inv_freq"));
  result.rope_attention_factor = nb::cast<float>(config.attr("rope_attention_factor"));
  result.sliding_windows = nb::cast<std::vector<int64_t>>(config.attr("sliding_windows"));
  result.sparse_layers = nb::cast<std::vector<bool>>(config.attr("sparse_layers"));
  result.num_experts = integer("num_experts");
  result.num_experts_per_tok = integer("num_experts_per_tok");
  result.moe_intermediate_size = integer("moe_intermediate_size");
  result.norm_topk_prob = flag("norm_topk_prob");
  result.moe_block = nb::cast<std::string>(config.attr("moe_block"));
  result.expert_linears = nb::cast<std::array<std::string, 3>>(config.attr("expert_linears"));
  return result;
}

KvType to_kv_type(std::string_view name) {
  if (name == "fp16") return KvType::kFloat16;
  if (name == "int8") return KvType::kInt8;
  throw std::invalid_argument("kv_cache must be fp16 or int8, not " + std::string(name));
}

void set_hlq(Engine& engine, std::string_view name, nb::handle matrix) {
  const HlqMatrix arrays(matrix);
  const nb::gil_scoped_release release;
  engine.weights().set_hlq(name, arrays.view());
}

template <DenseType type, typename T>
void set_dense(Engine& engine, std::string_view name, Array<T, 2> values) {
  const auto out_features = static_cast<int64_t>(values.shape(0));
  const auto in_features = static_cast<int64_t>(values.shape(1));
  const void* data = values.data();
  auto owner = std::make_shared<Array<T, 2>>(std::move(values));  // releasing it takes the GIL by itself
  engine.weights().set_dense(name, type, data, out_features, in_features, std::move(owner));
}

void set_vector(Engine& engine, std::string_view name, Array<float, 1> values) {
  engine.weights().set_vector(name, std::vector<float>(values.data(), values.data() + values.size()));
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> step(
    Engine& engine, const std::vector<std::tuple<std::shared_ptr<KvCache>, Array<int32_t, 1>>>& batch,
    bool all_logits) {
  std::vector<StepItem> items;
  for (const auto& [sequence, tokens] : batch) {
    items.push_back({sequence.get(), {tokens.data(), tokens.size()}, all_logits});
  }
  const int64_t rows = std::accumulate(items.begin(), items.end(), int64_t{0},
                                       [](int64_t sum, const StepItem& item) { return sum + item.logit_rows(); });
  const int64_t vocab = engine.config().vocab_size;
  auto logits = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(rows * vocab));
  {
    const nb::gil_scoped_release release;
    engine.step(items, logits.get());
  }
  float* data = logits.release();
  const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return {data, {static_cast<size_t>(rows), static_cast<size_t>(vocab)}, owner};
}

int32_t sample(Sampler& sampler, Array<float, 1> logits, Array<int32_t, 1> tokens, int64_t prompt_length,
               std::optional<Array<int32_t, 1>> allowed) {
  SamplingContext context{{tokens.data(), tokens.size()}, prompt_length, std::nullopt};
  if (allowed) context.allowed.emplace(allowed->data(), allowed->size());
  const nb::gil_scoped_release release;
  return sampler.sample({logits.data(), logits.size()}, context);
}

std::vector<std::pair<int32_t, float>> to_pairs(const std::vector<TokenLogprob>& logprobs) {
  std::vector<std::pair<int32_t, float>> pairs;
  for (const auto& [token, logprob] : logprobs) pairs.emplace_back(token, logprob);
  return pairs;
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::class_<KvCache>(m, "Sequence", "Keys and values of one sequence.")
      .def("__len__", &KvCache::length)
      .def_prop_ro("max_positions", &KvCache::max_positions)
      .def_prop_ro("memory_bytes", &KvCache::memory_bytes)
      .def("truncate", &KvCache::truncate, "length"_a)
      .def("fork", &KvCache::fork, "length"_a);

  nb::class_<Engine>(m, "Engine", "A model on this machine.")
      .def(
          "__init__",
          [](Engine* self, nb::handle config, std::string_view isa, int threads, bool exact,
             std::string_view kv_cache) {
            new (self) Engine(to_model_config(config), isa, threads, exact, to_kv_type(kv_cache));
          },
          "config"_a, "isa"_a, "threads"_a, "exact"_a, "kv_cache"_a)
      .def_prop_ro("isa", &Engine::isa)
      .def_prop_ro("threads", &Engine::threads)
      .def_prop_ro("weight_memory_bytes", [](const Engine& engine) { return engine.weights().memory_bytes(); })
      .def_prop_ro("weight_bytes_per_token", [](const Engine& engine) { return engine.weights().bytes_per_token(); })
      .def_prop_ro("kv_cache", [](const Engine& engine) { return engine.kv_type() == KvType::kInt8 ? "int8" : "fp16"; })
      .def_prop_ro("kv_layer_bytes", &Engine::kv_layer_bytes)
      .def("set_hlq", &set_hlq, "name"_a, "matrix"_a)
      .def("set_float32", &set_dense<DenseType::kFloat32, float>, "name"_a, "values"_a)
      .def("set_float16", &set_dense<DenseType::kFloat16, uint16_t>, "name"_a, "values"_a)
      .def("set_bfloat16", &set_dense<DenseType::kBFloat16, uint16_t>, "name"_a, "values"_a)
      .def("set_vector", &set_vector, "name"_a, "values"_a)
      .def("new_sequence", &Engine::new_sequence, "max_positions"_a)
      .def("step", &step, "batch"_a, "all_logits"_a);

  nb::class_<Sampler>(m, "Sampler", "Chooses tokens from logits.")
      .def(
          "__init__",
          [](Sampler* self, float temperature, int64_t top_k, float top_p, float min_p, float repetition_penalty,
             float frequency_penalty, float presence_penalty, std::vector<std::pair<int32_t, float>> logit_bias,
             uint64_t seed) {
            new (self) Sampler({temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty,
                                presence_penalty, std::move(logit_bias), seed});
          },
          "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a, "frequency_penalty"_a,
          "presence_penalty"_a, "logit_bias"_a, "seed"_a)
      .def("sample", &sample, "logits"_a, "tokens"_a, "prompt_length"_a, "allowed"_a = nb::none());
  m.def(
      "log_probabilities",
      [](Array<float, 1> logits, int32_t token, int64_t count) {
        return to_pairs(log_probabilities({logits.data(), logits.size()}, token, count));
      },
      "logits"_a, "token"_a, "count"_a);
}
