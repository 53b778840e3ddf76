#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "kernels/kernels.h"
#include "model/config.h"

namespace elutq {

/// Keys and values of one sequence, fp16, in pages of kPagePositions positions that are allocated as it grows.
///
/// A page is [layer][key-value head][keys, values][kPagePositions][head_dim], so that what attention reads of one head
/// is contiguous within a page. A position always lies in the same place of the same page: how a sequence was cut into
/// steps leaves no trace.
class KvCache {
 public:
  static constexpr int64_t kPagePositions = 64;

  /// An empty sequence of at most `max_positions`.
  KvCache(const ModelConfig& config, int64_t max_positions);
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

  /// Where the key or value [head_dim] of a reserved position goes.
  uint16_t* key(int64_t layer, int64_t kv_head, int64_t position) { return run(layer, kv_head, position); }
  uint16_t* value(int64_t layer, int64_t kv_head, int64_t position) {
    return run(layer, kv_head, position) + kPagePositions * head_dim_;
  }
  /// Positions [begin, end) of one head, in order.
  void spans(int64_t layer, int64_t kv_head, int64_t begin, int64_t end, std::vector<KvSpan>& out) const;

  /// Memory of all pages.
  int64_t memory_bytes() const;

 private:
  uint16_t* run(int64_t layer, int64_t kv_head, int64_t position);

  int64_t layers_;
  int64_t kv_heads_;
  int64_t head_dim_;
  int64_t page_values_;
  int64_t max_positions_;
  int64_t length_ = 0;
  std::vector<AlignedBuffer<uint16_t>> pages_;
};

}  // namespace elutq
