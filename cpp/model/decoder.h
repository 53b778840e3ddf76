#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "model/kv_cache.h"
#include "model/sparse_mlp.h"
#include "model/weights.h"
#include "ops/attention.h"
#include "ops/linear.h"

namespace elutq {

/// One sequence's part of a step.
struct StepItem {
  KvCache* sequence = nullptr;
  std::span<const int32_t> tokens;  ///< appended to the sequence: a prompt, a piece of one, or one decoded token
  bool all_logits = false;          ///< logits after every token, or after the last one only

  int64_t logit_rows() const { return all_logits ? static_cast<int64_t>(tokens.size()) : 1; }
};

/// The one forward pass.
///
/// All tokens of a step, whatever sequences they belong to, go through the layers together, kChunkTokens at a time.
/// Every number computed for a token depends on its own sequence alone: logits are the same bit for bit whatever else
/// is in the step, however the prompt is cut into steps, and for any number of threads.
class Decoder {
 public:
  /// Tokens that pass through the layers together: enough to reuse weights from cache, few enough that their lookup
  /// tables stay there too.
  static constexpr int64_t kChunkTokens = 128;

  /// `weights` must be complete and outlive the decoder. Throws std::invalid_argument when they are not complete.
  Decoder(const Weights& weights, const Backend& backend);

  /// Appends each item's tokens to its sequence. logits: fp32 [sum of logit_rows()][vocab_size], in order of items.
  /// Throws std::invalid_argument, leaving every sequence as it was, when a token is not in the vocabulary, an item is
  /// empty, a sequence is another model's, is named twice or would outgrow its limit.
  void step(std::span<const StepItem> items, float* logits);

 private:
  struct Row {
    KvCache* sequence;
    int64_t position;
    int32_t token;
    bool wants_logits;
  };

  void reserve_tables();
  void check(std::span<const StepItem> items) const;
  /// Returns where the next row of logits goes.
  float* forward(std::span<const Row> rows, float* logits);
  void attend(std::span<const Row> rows, int64_t layer);
  void feed_forward(int64_t tokens, const LayerWeights& layer);
  void feed_forward_sparse(int64_t tokens, const LayerWeights& layer);
  float* head(std::span<const Row> rows, float* logits);
  void normalize(const float* x, const std::vector<float>& weight, Activations& out, int64_t token,
                 std::span<const Linear* const> consumers) const;

  const Weights& weights_;
  const ModelConfig& config_;
  Backend backend_;
  Attention attention_;

  // Activations of a chunk. Memory is touched only as far as steps are large.
  AlignedBuffer<float> hidden_;     // [kChunkTokens][hidden_size]: the residual stream
  AlignedBuffer<float> projected_;  // [kChunkTokens][hidden_size]: what o_proj and down_proj add to it
  AlignedBuffer<float> q_;          // [kChunkTokens][q_size]
  AlignedBuffer<float> k_;          // [kChunkTokens][kv_size]
  AlignedBuffer<float> v_;          // [kChunkTokens][kv_size]
  AlignedBuffer<float> up_;         // [kChunkTokens][intermediate_size]
  AlignedBuffer<float> cos_;        // [kChunkTokens][head_dim / 2]
  AlignedBuffer<float> sin_;        // [kChunkTokens][head_dim / 2]
  Activations normalized_;          // hidden_size
  Activations attended_;            // q_size
  Activations gated_;               // intermediate_size
  std::optional<SparseMlp> sparse_mlp_;
  std::vector<Row> rows_;           // of the whole step
  std::vector<AttentionRun> runs_;  // of a chunk: its tokens by sequence
};

}  // namespace elutq
