#include "model/kv_cache.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace elutq {

KvCache::KvCache(const ModelConfig& config, KvType type, int64_t max_positions)
    : layout_{type, config.num_key_value_heads, config.head_dim},
      layers_(config.num_hidden_layers),
      max_positions_(max_positions) {}

bool KvCache::fits(const ModelConfig& config) const {
  return layers_ == config.num_hidden_layers && layout_.heads == config.num_key_value_heads &&
         layout_.head_dim == config.head_dim && max_positions_ <= config.max_position_embeddings;
}

void KvCache::reserve(int64_t positions) {
  if (positions > max_positions_) {
    throw std::invalid_argument("the sequence would grow to " + std::to_string(positions) +
                                " tokens, but the context is limited to " + std::to_string(max_positions_) +
                                "; shorten the prompt or ask for fewer new tokens");
  }
  if (positions > length_ && length_ % kPagePositions != 0) detach(static_cast<size_t>(length_ / kPagePositions));
  while (static_cast<int64_t>(pages_.size()) * kPagePositions < positions) {
    addresses_.reserve(pages_.size() + 1);
    pages_.push_back(std::make_shared<Page>(layers_ * layout_.bytes()));
    addresses_.push_back(pages_.back()->data());
  }
}

void KvCache::truncate(int64_t length) {
  if (length < 0 || length > length_) {
    throw std::invalid_argument("a sequence of " + std::to_string(length_) + " tokens cannot be truncated to " +
                                std::to_string(length));
  }
  length_ = length;
  pages_.resize((length + kPagePositions - 1) / kPagePositions);
  addresses_.resize(pages_.size());
}

KvCache::KvCache(const KvCache& other, int64_t length)
    : layout_(other.layout_),
      layers_(other.layers_),
      max_positions_(other.max_positions_),
      length_(other.length_),
      pages_(other.pages_),
      addresses_(other.addresses_) {
  truncate(length);
}

std::shared_ptr<KvCache> KvCache::fork(int64_t length) const {
  std::shared_ptr<KvCache> result(new KvCache(*this, length));
  return result;
}

void KvCache::detach(size_t page) {
  if (pages_[page].use_count() == 1) return;
  const int64_t bytes = layers_ * layout_.bytes();
  auto own = std::make_shared<Page>(bytes);
  std::memcpy(own->data(), pages_[page]->data(), static_cast<size_t>(bytes));
  addresses_[page] = own->data();
  pages_[page] = std::move(own);
}

void KvCache::store(const KernelTable& kernels, int64_t layer, int64_t position, const float* key, const float* value) {
  uint8_t* page = pages_[position / kPagePositions]->data() + layer * layout_.bytes();
  kernels.store_kv(layout_, key, value, position % kPagePositions, page);
}

AttentionRun KvCache::run(int64_t layer, int64_t position, int64_t tokens) const {
  return {layout_, addresses_.data(), layer * layout_.bytes(), position, tokens};
}

int64_t KvCache::memory_bytes() const { return static_cast<int64_t>(pages_.size()) * layers_ * layout_.bytes(); }

}  // namespace elutq
