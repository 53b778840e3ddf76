#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "model/weights.h"
#include "ops/linear.h"

namespace elutq {

/// The feed-forward of layers with a mixture of experts, as transformers computes it.
///
/// The router's logits, fp32, become probabilities by a softmax over all experts. The num_experts_per_tok most probable
/// ones each compute an MLP, of equally probable ones those of lower index; the results are added, the most probable
/// expert's first, each times its probability: divided by the sum of the chosen ones when norm_topk_prob. Tokens that
/// share an expert go through it together, and all experts run in the same parallel regions. What is computed for a
/// token is the same bits whatever other tokens there are.
class SparseMlp {
 public:
  /// For at most `max_tokens` tokens, given to run() as rows of `normalized`, for whose consumers tables are reserved.
  /// `weights` must outlive this.
  SparseMlp(const Weights& weights, const Backend& backend, int64_t max_tokens, const Activations& normalized);

  /// hidden [tokens][hidden_size] += what the layer's experts make of `normalized`, built for layer.mlp_readers().
  void run(const LayerWeights& layer, const Activations& normalized, int64_t tokens, float* hidden);

 private:
  /// An expert that a token is given to.
  struct Choice {
    int64_t expert;
    float weight;
    int64_t row;  // of gathered_, activated_ and results_: the token's place among all of all experts
  };

  /// The token's choices, most probable first.
  std::span<Choice> choices_of(int64_t token);
  void choose(int64_t token);
  /// Gives every choice its row: expert by expert, those of one expert in order of tokens.
  void sort(std::span<Choice> choices);
  Rows rows_of(int64_t expert) const;

  const ModelConfig& config_;
  Backend backend_;
  bool gathers_values_;  // whether any expert reads values rather than tables

  // Of the tokens of a run, and of their choices in order of experts.
  AlignedBuffer<float> probabilities_;  // [max_tokens][num_experts], the router's logits before
  std::vector<Choice> choices_;         // [max_tokens][num_experts_per_tok]
  std::vector<int64_t> ends_;           // [num_experts]: one past each expert's last row
  Activations gathered_;                // hidden_size: the experts' inputs
  Activations activated_;               // moe_intermediate_size
  AlignedBuffer<float> up_;             // [max_tokens * num_experts_per_tok][moe_intermediate_size]
  AlignedBuffer<float> results_;        // [max_tokens * num_experts_per_tok][hidden_size]
  std::vector<LinearCall> calls_;
};

}  // namespace elutq
