#include "ops/attention.h"

#include <atomic>
#include <cmath>
#include <stdexcept>

namespace elutq {

Attention::Attention(const Backend& backend, const AttentionShape& shape)
    : backend_(backend), shape_(shape), scratch_(backend.pool->size()) {
  if (shape.num_key_value_heads < 1 || shape.num_attention_heads % shape.num_key_value_heads != 0 ||
      shape.head_dim < 8 || shape.head_dim % 8 != 0) {
    throw std::invalid_argument(
        "attention needs a head_dim that is a multiple of 8 and heads that key-value heads divide");
  }
}

void Attention::run(const float* q, int64_t tokens, int64_t max_visible, const VisibleSpans& visible, float* out) {
  const int64_t group = shape_.group();
  const int64_t items = tokens * shape_.num_key_value_heads;
  const float scale = 1.0F / std::sqrt(static_cast<float>(shape_.head_dim));
  for (Scratch& scratch : scratch_) {
    if (static_cast<int64_t>(scratch.scores.size()) < group * max_visible) scratch.scores.resize(group * max_visible);
  }

  // Later tokens see more, so items are claimed one by one rather than split evenly; latest first, so that the longest
  // is not the last.
  std::atomic<int64_t> claimed{0};
  const auto run_part = [&](int64_t part) {
    Scratch& scratch = scratch_[part];
    for (int64_t item; (item = items - 1 - claimed.fetch_add(1, std::memory_order_relaxed)) >= 0;) {
      const int64_t token = item / shape_.num_key_value_heads;
      const int64_t kv_head = item % shape_.num_key_value_heads;
      const int64_t offset = token * shape_.q_size() + kv_head * group * shape_.head_dim;
      visible(token, kv_head, scratch.spans);
      backend_.kernels->attention(q + offset, group, shape_.head_dim, scratch.spans.data(),
                                  static_cast<int64_t>(scratch.spans.size()), scale, scratch.scores.data(),
                                  out + offset);
    }
  };
  backend_.pool->run(std::min<int64_t>(backend_.pool->size(), items), [&run_part](int64_t part) { run_part(part); });
}

}  // namespace elutq
