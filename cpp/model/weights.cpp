#include "model/weights.h"

#include <stdexcept>
#include <utility>

namespace elutq {

Weights::Weights(const ModelConfig& config, const Backend& backend) : config_(config), backend_(backend) {
  config.validate();
  const int64_t hidden = config.hidden_size;
  const int64_t q_size = config.attention().q_size();
  const int64_t kv_size = config.attention().kv_size();

  add_linear("model.embed_tokens", embed_tokens_, config.vocab_size, hidden, false);
  if (!config.tie_word_embeddings) add_linear("lm_head", lm_head_, config.vocab_size, hidden, false);
  vectors_["model.norm.weight"] = {&norm_, hidden};
  layers_.resize(config.num_hidden_layers);
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    LayerWeights& layer = layers_[i];
    vectors_[prefix + "input_layernorm.weight"] = {&layer.input_layernorm, hidden};
    vectors_[prefix + "post_attention_layernorm.weight"] = {&layer.post_attention_layernorm, hidden};
    if (config.qk_norm) {
      vectors_[prefix + "self_attn.q_norm.weight"] = {&layer.q_norm, config.head_dim};
      vectors_[prefix + "self_attn.k_norm.weight"] = {&layer.k_norm, config.head_dim};
    }
    add_linear(prefix + "self_attn.q_proj", layer.q_proj, q_size, hidden, config.attention_bias_qkv);
    add_linear(prefix + "self_attn.k_proj", layer.k_proj, kv_size, hidden, config.attention_bias_qkv);
    add_linear(prefix + "self_attn.v_proj", layer.v_proj, kv_size, hidden, config.attention_bias_qkv);
    add_linear(prefix + "self_attn.o_proj", layer.o_proj, hidden, q_size, config.attention_bias_o);
    if (!config.sparse_layers[i]) {
      add_mlp(prefix + "mlp.", {"gate_proj", "up_proj", "down_proj"}, layer.mlp, config.intermediate_size,
              config.mlp_bias);
      continue;
    }
    const std::string block = prefix + config.moe_block + ".";
    add_linear(block + "gate", layer.router, config.num_experts, hidden, false);
    layer.experts.resize(config.num_experts);
    for (int64_t e = 0; e < config.num_experts; ++e) {
      add_mlp(block + "experts." + std::to_string(e) + ".", config.expert_linears, layer.experts[e],
              config.moe_intermediate_size, false);
    }
  }
}

std::vector<const Linear*> LayerWeights::mlp_readers() const {
  if (!is_sparse()) return {&mlp.gate_proj, &mlp.up_proj};
  std::vector<const Linear*> readers = {&router};
  for (const MlpWeights& expert : experts) readers.insert(readers.end(), {&expert.gate_proj, &expert.up_proj});
  return readers;
}

void Weights::add_mlp(const std::string& prefix, const std::array<std::string, 3>& names, MlpWeights& mlp,
                      int64_t intermediate, bool bias) {
  add_linear(prefix + names[0], mlp.gate_proj, intermediate, config_.hidden_size, bias);
  add_linear(prefix + names[1], mlp.up_proj, intermediate, config_.hidden_size, bias);
  add_linear(prefix + names[2], mlp.down_proj, config_.hidden_size, intermediate, bias);
}

void Weights::add_linear(const std::string& name, Linear& linear, int64_t out_features, int64_t in_features,
                         bool bias) {
  linear = Linear(out_features, in_features);
  linears_[name] = &linear;
  if (bias) vectors_[name + ".bias"] = {&linear.bias(), out_features};
}

Linear& Weights::find_linear(std::string_view name) {
  const auto found = linears_.find(name);
  if (found == linears_.end()) throw std::invalid_argument("the model has no linear named " + std::string(name));
  return *found->second;
}

void Weights::set_hlq(std::string_view name, const HlqView& matrix) {
  try {
    find_linear(name).set_hlq(backend_, matrix, arena_);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(name) + ": " + error.what());
  }
}

void Weights::set_dense(std::string_view name, DenseType type, const void* values, int64_t out_features,
                        int64_t in_features, std::shared_ptr<const void> owner) {
  Linear& linear = find_linear(name);
  if (out_features != linear.out_features() || in_features != linear.in_features()) {
    throw std::invalid_argument(std::string(name) + ": the shape must be (" + std::to_string(linear.out_features()) +
                                ", " + std::to_string(linear.in_features()) + "), not (" +
                                std::to_string(out_features) + ", " + std::to_string(in_features) + ")");
  }
  linear.set_dense(type, values, std::move(owner));
}

void Weights::set_vector(std::string_view name, std::vector<float> values) {
  const auto found = vectors_.find(name);
  if (found == vectors_.end()) throw std::invalid_argument("the model has no tensor named " + std::string(name));
  const VectorSlot& slot = found->second;
  if (static_cast<int64_t>(values.size()) != slot.size) {
    throw std::invalid_argument(std::string(name) + ": the length must be " + std::to_string(slot.size) + ", not " +
                                std::to_string(values.size()));
  }
  *slot.values = std::move(values);
}

void Weights::check_complete() const {
  for (const auto& [name, linear] : linears_) {
    if (!linear->has_weights()) throw std::invalid_argument("the model's weights lack " + name);
  }
  for (const auto& [name, slot] : vectors_) {
    if (slot.values->empty()) throw std::invalid_argument("the model's weights lack " + name);
  }
}

int64_t Weights::memory_bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, linear] : linears_) bytes += static_cast<int64_t>(linear->packed_bytes());
  for (const auto& [name, slot] : vectors_) bytes += slot.size * 4;
  return bytes;
}

int64_t Weights::bytes_per_token() const {
  int64_t bytes = embed_tokens_.row_bytes();
  for (const auto& [name, linear] : linears_) {
    if (linear != &embed_tokens_ || config_.tie_word_embeddings) bytes += linear->bytes();
  }
  for (const auto& [name, slot] : vectors_) bytes += slot.size * 4;
  for (const LayerWeights& layer : layers_) {
    int64_t experts = 0;
    for (const auto& [gate, up, down] : layer.experts) experts += gate.bytes() + up.bytes() + down.bytes();
    if (layer.is_sparse()) bytes -= experts - experts / config_.num_experts * config_.num_experts_per_tok;
  }
  return bytes;
}

}  // namespace elutq
