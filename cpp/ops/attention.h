#pragma once

#include <cstdint>
#include <span>
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

/// Consecutive tokens of one sequence, and the layer of its cache that they attend to.
struct AttentionRun {
  KvLayout layout;
  const uint8_t* const* pages = nullptr;  ///< of the sequence, from position 0 on
  int64_t layer_offset = 0;               ///< where the layer's part begins in each page
  int64_t position = 0;                   ///< of the first token
  int64_t tokens = 0;
};

/// Attention of many tokens, each over the cached positions it may see.
class Attention {
 public:
  Attention(const Backend& backend, const AttentionShape& shape);

  /// out[t] = attention of q[t]. Each token sees positions of its sequence up to its own, the last `window` of them (0:
  /// all). q: fp32 [tokens of all runs][q_size], rotated; out: fp32, the same shape.
  void run(const float* q, std::span<const AttentionRun> runs, int64_t window, float* out);

 private:
  struct Item {
    AttentionTile tile;
    float* out;
    int64_t partials;  // where its partials begin in partials_, when sections are shared out
  };
  /// One section of an item.
  struct Piece {
    const Item* item;
    int64_t section;
  };
  struct Scratch {
    std::vector<float> scores;    // [rows][kScoreStride]
    std::vector<float> partials;  // [sections][rows][partial_floats]
  };

  void make_items(const float* q, std::span<const AttentionRun> runs, int64_t window, float* out);
  void attend(const Item& item, int64_t section, Scratch& scratch, float* partials) const;
  void merge(const Item& item, const float* partials) const;
  /// Calls work(i, scratch of the thread) for all i < count, in parallel.
  template <typename Work>
  void share_out(int64_t count, const Work& work);

  Backend backend_;
  AttentionShape shape_;
  std::vector<Scratch> scratch_;  // one per thread; grows with the context
  std::vector<Item> items_;
  std::vector<Piece> pieces_;
  std::vector<float> partials_;  // of all items, when sections are shared out
};

}  // namespace elutq
