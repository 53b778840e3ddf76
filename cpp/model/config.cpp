#include "model/config.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace elutq {
namespace {

void require(bool condition, const char* complaint) {
  if (!condition) throw std::invalid_argument(std::string("model config: ") + complaint);
}

}  // namespace

void ModelConfig::validate() const {
  require(vocab_size > 0, "vocab_size must be positive");
  require(hidden_size > 0, "hidden_size must be positive");
  require(intermediate_size > 0, "intermediate_size must be positive");
  require(num_hidden_layers > 0, "num_hidden_layers must be positive");
  require(num_key_value_heads > 0 && num_attention_heads > 0 && num_attention_heads % num_key_value_heads == 0,
          "num_attention_heads must be a positive multiple of num_key_value_heads");
  require(head_dim > 0 && head_dim % 8 == 0, "head_dim must be a positive multiple of 8");
  require(max_position_embeddings > 0, "max_position_embeddings must be positive");
  require(rms_norm_eps >= 0, "rms_norm_eps must not be negative");
  require(static_cast<int64_t>(rope_inv_freq.size()) == head_dim / 2, "rope_inv_freq must have head_dim / 2 values");
  require(static_cast<int64_t>(sliding_windows.size()) == num_hidden_layers,
          "sliding_windows must have one value per layer");
  require(std::all_of(sliding_windows.begin(), sliding_windows.end(), [](int64_t window) { return window >= 0; }),
          "sliding_windows must not be negative");
  require(static_cast<int64_t>(sparse_layers.size()) == num_hidden_layers,
          "sparse_layers must have one value per layer");
  if (has_experts()) {
    require(num_experts_per_tok > 0 && num_experts_per_tok <= num_experts,
            "num_experts_per_tok must be from 1 to num_experts");
    require(moe_intermediate_size > 0, "moe_intermediate_size must be positive");
  } else {
    require(std::none_of(sparse_layers.begin(), sparse_layers.end(), [](bool sparse) { return sparse; }),
            "sparse_layers need num_experts");
  }
}

}  // namespace elutq
