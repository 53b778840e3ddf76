#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "ops/attention.h"

namespace elutq {

/// Everything the decoder needs to know of a model: elutq.architectures.EngineConfig, which documents the members.
struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;
  float rms_norm_eps = 0;
  bool tie_word_embeddings = false;
  bool attention_bias_qkv = false;
  bool attention_bias_o = false;
  bool mlp_bias = false;
  bool qk_norm = false;
  std::vector<float> rope_inv_freq;  ///< [head_dim / 2]
  float rope_attention_factor = 1;
  std::vector<int64_t> sliding_windows;  ///< [num_hidden_layers], 0: all positions
  std::vector<bool> sparse_layers;       ///< [num_hidden_layers], true: a mixture of experts
  int64_t num_experts = 0;
  int64_t num_experts_per_tok = 0;
  int64_t moe_intermediate_size = 0;
  bool norm_topk_prob = false;
  std::string moe_block;                      ///< module of a layer that holds the router and the experts
  std::array<std::string, 3> expert_linears;  ///< names of an expert's gate, up and down projection

  bool has_experts() const { return num_experts != 0; }
  AttentionShape attention() const { return {num_attention_heads, num_key_value_heads, head_dim}; }

  /// Throws std::invalid_argument, naming the member, when a number is out of range or contradicts another.
  void validate() const;
};

}  // namespace elutq
