#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "model/config.h"
#include "ops/linear.h"

namespace elutq {

/// down_proj(silu(gate_proj(x)) * up_proj(x)): the feed-forward of a dense layer, or one expert.
struct MlpWeights {
  Linear gate_proj, up_proj, down_proj;
};

struct LayerWeights {
  std::vector<float> input_layernorm;           ///< [hidden_size]
  std::vector<float> post_attention_layernorm;  ///< [hidden_size]
  std::vector<float> q_norm, k_norm;            ///< [head_dim], empty unless config.qk_norm
  Linear q_proj, k_proj, v_proj, o_proj;
  MlpWeights mlp;                   ///< of a dense layer
  Linear router;                    ///< of a sparse layer: (num_experts, hidden_size), Hugging Face's `gate`
  std::vector<MlpWeights> experts;  ///< of a sparse layer: [num_experts]

  bool is_sparse() const { return !experts.empty(); }
  /// The linears that read the normalized input of the feed-forward.
  std::vector<const Linear*> mlp_readers() const;
};

/// The weights of one model, set one by one under their Hugging Face names, in any order.
class Weights {
 public:
  /// Throws std::invalid_argument when the config is not valid.
  Weights(const ModelConfig& config, const Backend& backend);
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  /// Sets the linear or embedding module `name` (without ".weight"), packing it at once.
  /// Throws std::invalid_argument when the config has no such module or another shape for it.
  void set_hlq(std::string_view name, const HlqView& matrix);
  /// The same from a dense matrix [out_features][in_features], which stays where it is; `owner` is kept alive.
  void set_dense(std::string_view name, DenseType type, const void* values, int64_t out_features, int64_t in_features,
                 std::shared_ptr<const void> owner);
  /// Sets a norm weight or a bias by its full tensor name.
  void set_vector(std::string_view name, std::vector<float> values);

  /// Throws std::invalid_argument that names a missing tensor, if any is.
  void check_complete() const;

  const ModelConfig& config() const { return config_; }
  const Linear& embed_tokens() const { return embed_tokens_; }
  /// The embedding itself where they are tied.
  const Linear& lm_head() const { return config_.tie_word_embeddings ? embed_tokens_ : lm_head_; }
  const std::vector<float>& norm() const { return norm_; }
  const LayerWeights& layer(int64_t index) const { return layers_[index]; }

  /// Memory held here: packed matrices, norms, biases. Dense matrices belong to their owners.
  int64_t memory_bytes() const;
  /// Bytes of weights that one decoded token must read: every linear, norm and bias, one row of the embedding and, of
  /// the experts, as many as a token is given to; where they differ in size, their mean.
  int64_t bytes_per_token() const;

 private:
  struct VectorSlot {
    std::vector<float>* values;
    int64_t size;
  };

  void add_mlp(const std::string& prefix, const std::array<std::string, 3>& names, MlpWeights& mlp,
               int64_t intermediate, bool bias);
  void add_linear(const std::string& name, Linear& linear, int64_t out_features, int64_t in_features, bool bias);
  Linear& find_linear(std::string_view name);

  ModelConfig config_;
  Backend backend_;
  Arena arena_;  // of the packed matrices
  Linear embed_tokens_, lm_head_;
  std::vector<float> norm_;
  std::vector<LayerWeights> layers_;
  std::map<std::string, Linear*, std::less<>> linears_;     // module name -> where it lives above
  std::map<std::string, VectorSlot, std::less<>> vectors_;  // tensor name -> the same
};

}  // namespace elutq
