#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <string_view>

#include "base/thread_pool.h"
#include "model/decoder.h"
#include "model/kv_cache.h"
#include "model/weights.h"

namespace elutq {

/// A model on this machine: kernels, threads, weights and the decoder over them. Fill weights(), then step().
class Engine {
 public:
  /// isa: an instruction set's name, or empty for the best one. kv_type: of the sequences' caches. Throws
  /// std::invalid_argument when the config is not valid, the instruction set cannot run here, or threads < 1.
  Engine(const ModelConfig& config, std::string_view isa, int threads, bool exact, KvType kv_type);

  Weights& weights() { return weights_; }
  const Weights& weights() const { return weights_; }
  const ModelConfig& config() const { return weights_.config(); }
  std::string_view isa() const { return backend_.kernels->isa; }
  int threads() const { return pool_.size(); }

  KvType kv_type() const { return kv_type_; }
  /// Bytes that one position takes in the cache of one layer.
  int64_t kv_layer_bytes() const;
  /// An empty sequence of at most `max_positions`, and never more than the model's own limit.
  std::shared_ptr<KvCache> new_sequence(int64_t max_positions) const;
  /// Decoder::step. Steps of several callers run one after the other. Throws std::invalid_argument when weights are
  /// missing.
  void step(std::span<const StepItem> items, float* logits);

 private:
  ThreadPool pool_;
  Backend backend_;
  KvType kv_type_;
  Weights weights_;
  std::unique_ptr<Decoder> decoder_;  // made by the first step, when the weights are there
  std::mutex mutex_;
};

}  // namespace elutq
