#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned.h"
#include "kernels/kernels.h"
#include "model/config.h"

namespace elutq {

/// Keys and values of one sequence, in pages of kPagePositions positions that are allocated as it grows.
///
/// A page is [layer], each as KvLayout says. A position always lies in the same place of the same page: how a sequence
/// was cut into steps leaves no trace. Sequences that begin alike may share pages: a page is copied before one of
/// several owners writes to it.
class KvCache {
 public:
  /// An empty sequence of at most `max_positions`.
  KvCache(const ModelConfig& config, KvType type, int64_t max_positions);
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  /// Whether this is the cache of a model of that shape.
  bool fits(const ModelConfig& config) const;
  /// Positions held.
  int64_t length() const { return length_; }
  int64_t max_positions() const { return max_positions_; }
  /// Makes room for positions up to `positions`. Throws std::invalid_argument when it exceeds max_positions().
  void reserve(int64_t positions);
  /// Declares positions up to `length` written. Room must have been reserved.
  void set_length(int64_t length) { length_ = length; }
  /// Forgets all but the first `length` positions and frees what held them. Throws std::invalid_argument when there
  /// are fewer.
  void truncate(int64_t length);

  /// A sequence that holds the first `length` positions of this one, in the same memory but for a page that is not
  /// full. What happens to either leaves the other as it is. Throws std::invalid_argument when there are fewer.
  std::shared_ptr<KvCache> fork(int64_t length) const;

  /// Stores the key and value, fp32 [num_key_value_heads][head_dim] each, of a reserved position.
  void store(const KernelTable& kernels, int64_t layer, int64_t position, const float* key, const float* value);
  /// `tokens` positions from `position` on, as queries of a layer. Valid until the sequence grows or is truncated.
  AttentionRun run(int64_t layer, int64_t position, int64_t tokens) const;

  /// Memory of all pages, shared ones included.
  int64_t memory_bytes() const;

 private:
  using Page = AlignedBuffer<uint8_t>;

  /// The first `length` positions of `other`, all of whose pages are shared.
  KvCache(const KvCache& other, int64_t length);
  /// Makes a page this sequence's own.
  void detach(size_t page);

  KvLayout layout_;
  int64_t layers_;
  int64_t max_positions_;
  int64_t length_ = 0;
  std::vector<std::shared_ptr<Page>> pages_;
  std::vector<const uint8_t*> addresses_;  // of the pages
};

}  // namespace elutq
