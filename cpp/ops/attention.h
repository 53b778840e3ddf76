#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "ops/backend.h"

namespace elutq {

/// Dimensions of grouped-query attention.
struct AttentionShape {
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;

  int64_t q_size() const { return num_attention_heads * head_dim; }
  int64_t kv_size() const { return num_key_value_heads * head_dim; }
  int64_t group() const { return num_attention_heads / num_key_value_heads; }
};

/// Attention of many tokens, each over the cached positions it may see.
class Attention {
 public:
  /// Gives the spans that `token` sees of `kv_head`: clears and fills `spans`. Called concurrently.
  using VisibleSpans = std::function<void(int64_t token, int64_t kv_head, std::vector<KvSpan>& spans)>;

  Attention(const Backend& backend, const AttentionShape& shape);

  /// out[t] = attention of q[t], over items (token, key-value head) in parallel.
  /// q: fp32 [tokens][q_size], rotated; out: fp32 [tokens][q_size]; max_visible: most positions any token sees.
  void run(const float* q, int64_t tokens, int64_t max_visible, const VisibleSpans& visible, float* out);

 private:
  struct Scratch {
    std::vector<KvSpan> spans;
    std::vector<float> scores;  // [group][positions]
  };

  Backend backend_;
  AttentionShape shape_;
  std::vector<Scratch> scratch_;  // one per thread; grows with the context
};

}  // namespace elutq
