#include "model/kv_cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace elutq {

KvCache::KvCache(const ModelConfig& config, int64_t max_positions)
    : layers_(config.num_hidden_layers),
      kv_heads_(config.num_key_value_heads),
      head_dim_(config.head_dim),
      page_values_(layers_ * kv_heads_ * 2 * kPagePositions * head_dim_),
      max_positions_(max_positions) {}

bool KvCache::fits(const ModelConfig& config) const {
  return layers_ == config.num_hidden_layers && kv_heads_ == config.num_key_value_heads &&
         head_dim_ == config.head_dim && max_positions_ <= config.max_position_embeddings;
}

void KvCache::reserve(int64_t positions) {
  if (positions > max_positions_) {
    throw std::invalid_argument("the sequence would grow to " + std::to_string(positions) +
                                " tokens, but the context is limited to " + std::to_string(max_positions_) +
                                "; shorten the prompt or ask for fewer new tokens");
  }
  while (static_cast<int64_t>(pages_.size()) * kPagePositions < positions) pages_.emplace_back(page_values_);
}

void KvCache::truncate(int64_t length) {
  if (length < 0 || length > length_) {
    throw std::invalid_argument("a sequence of " + std::to_string(length_) + " tokens cannot be truncated to " +
                                std::to_string(length));
  }
  length_ = length;
  pages_.resize((length + kPagePositions - 1) / kPagePositions);
}

uint16_t* KvCache::run(int64_t layer, int64_t kv_head, int64_t position) {
  const int64_t run_values = 2 * kPagePositions * head_dim_;
  return pages_[position / kPagePositions].data() + (layer * kv_heads_ + kv_head) * run_values +
         position % kPagePositions * head_dim_;
}

void KvCache::spans(int64_t layer, int64_t kv_head, int64_t begin, int64_t end, std::vector<KvSpan>& out) const {
  const int64_t run_values = 2 * kPagePositions * head_dim_;
  out.clear();
  for (int64_t position = begin; position < end;) {
    const int64_t offset = position % kPagePositions;
    const int64_t length = std::min(kPagePositions - offset, end - position);
    const uint16_t* keys = pages_[position / kPagePositions].data() + (layer * kv_heads_ + kv_head) * run_values;
    const uint16_t* values = keys + kPagePositions * head_dim_;
    out.push_back({keys + offset * head_dim_, values + offset * head_dim_, length});
    position += length;
  }
}

int64_t KvCache::memory_bytes() const { return static_cast<int64_t>(pages_.size()) * page_values_ * 2; }

}  // namespace elutq
