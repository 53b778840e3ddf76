#include "engine/engine.h"

#include <algorithm>

namespace elutq {

Engine::Engine(const ModelConfig& config, std::string_view isa, int threads, bool exact, KvType kv_type)
    : pool_(threads), backend_{&select_kernels(isa), &pool_, exact}, kv_type_(kv_type), weights_(config, backend_) {}

int64_t Engine::kv_layer_bytes() const {
  return KvLayout{kv_type_, config().num_key_value_heads, config().head_dim}.bytes() / kPagePositions;
}

std::shared_ptr<KvCache> Engine::new_sequence(int64_t max_positions) const {
  return std::make_shared<KvCache>(config(), kv_type_, std::min(max_positions, config().max_position_embeddings));
}

void Engine::step(std::span<const StepItem> items, float* logits) {
  const std::lock_guard lock(mutex_);
  if (!decoder_) decoder_ = std::make_unique<Decoder>(weights_, backend_);
  decoder_->step(items, logits);
}

}  // namespace elutq
