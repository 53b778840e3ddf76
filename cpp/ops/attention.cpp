#include "ops/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <stdexcept>

namespace elutq {
namespace {

/// Rows of a tile. Tokens and heads of a group read a page together: enough that reading costs little beside the
/// products, few enough that their scores of a section stay in the second-level cache. Where they are fewer, a tile
/// takes more key-value heads, which lie side by side.
constexpr int64_t kTileRows = 32;
/// With fewer items per thread than this, threads share out the sections of long contexts.
constexpr int64_t kItemsPerThread = 8;

/// Floats of a section's partials.
int64_t partials_size(const AttentionTile& tile) { return tile.rows() * partial_floats(tile.layout); }

void grow(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
}

}  // namespace

Attention::Attention(const Backend& backend, const AttentionShape& shape)
    : backend_(backend), shape_(shape), scratch_(backend.pool->size()) {
  if (shape.num_key_value_heads < 1 || shape.num_attention_heads % shape.num_key_value_heads != 0 ||
      shape.head_dim < 8 || shape.head_dim % 8 != 0) {
    throw std::invalid_argument(
        "attention needs a head_dim that is a multiple of 8 and heads that key-value heads divide");
  }
}

void Attention::run(const float* q, std::span<const AttentionRun> runs, int64_t window, float* out) {
  make_items(q, runs, window, out);
  const auto items = static_cast<int64_t>(items_.size());
  pieces_.clear();
  int64_t floats = 0;
  for (Item& item : items_) {
    item.partials = floats;
    for (int64_t s = item.tile.section_begin(); s < item.tile.section_end(); ++s) {
      pieces_.push_back({&item, s});
      floats += partials_size(item.tile);
    }
  }
  const auto pieces = static_cast<int64_t>(pieces_.size());
  if (pieces == items || items >= kItemsPerThread * backend_.pool->size()) {
    share_out(items, [this](int64_t i, Scratch& scratch) {
      const Item& item = items_[i];
      const int64_t begin = item.tile.section_begin();
      const int64_t end = item.tile.section_end();
      const int64_t size = partials_size(item.tile);
      grow(scratch.partials, (end - begin) * size);
      for (int64_t s = begin; s < end; ++s) attend(item, s, scratch, scratch.partials.data() + (s - begin) * size);
      merge(item, scratch.partials.data());
    });
    return;
  }
  grow(partials_, floats);
  share_out(pieces, [this](int64_t i, Scratch& scratch) {
    const auto& [item, section] = pieces_[i];
    const int64_t before = (section - item->tile.section_begin()) * partials_size(item->tile);
    attend(*item, section, scratch, partials_.data() + item->partials + before);
  });
  share_out(items, [this](int64_t i, Scratch&) { merge(items_[i], partials_.data() + items_[i].partials); });
}

void Attention::make_items(const float* q, std::span<const AttentionRun> runs, int64_t window, float* out) {
  const int64_t group = shape_.group();
  const int64_t kv_heads = shape_.num_key_value_heads;
  const int64_t most_tokens = std::max<int64_t>(1, kTileRows / group);
  const int64_t heads_per_thread = (kv_heads + backend_.pool->size() - 1) / backend_.pool->size();
  items_.clear();
  int64_t row = 0;  // of q and out
  for (const AttentionRun& run : runs) {
    const int64_t tile_tokens = std::min(most_tokens, run.tokens);
    const int64_t tile_heads = std::clamp<int64_t>(kTileRows / (tile_tokens * group), 1, heads_per_thread);
    for (int64_t head = 0; head < kv_heads; head += tile_heads) {
      for (int64_t t = 0; t < run.tokens; t += tile_tokens) {
        const int64_t offset = (row + t) * shape_.q_size() + head * group * shape_.head_dim;
        const AttentionTile tile = {.layout = run.layout,
                                    .pages = run.pages,
                                    .layer_offset = run.layer_offset,
                                    .kv_head = head,
                                    .kv_heads = std::min(tile_heads, kv_heads - head),
                                    .group = group,
                                    .position = run.position + t,
                                    .window = window,
                                    .tokens = std::min(tile_tokens, run.tokens - t),
                                    .q = q + offset,
                                    .q_stride = shape_.q_size(),
                                    .scale = 1.0F / std::sqrt(static_cast<float>(shape_.head_dim))};
        items_.push_back({tile, out + offset, 0});
      }
    }
    row += run.tokens;
  }
}

void Attention::attend(const Item& item, int64_t section, Scratch& scratch, float* partials) const {
  grow(scratch.scores, item.tile.rows() * kScoreStride);
  backend_.kernels->attention(item.tile, section, scratch.scores.data(), partials);
}

void Attention::merge(const Item& item, const float* partials) const {
  const int64_t sections = item.tile.section_end() - item.tile.section_begin();
  backend_.kernels->merge_attention(item.tile, sections, partials, item.out);
}

template <typename Work>
void Attention::share_out(int64_t count, const Work& work) {
  // Later tokens see more, so work is claimed one by one rather than split evenly; latest first, so that what comes
  // last is short.
  std::atomic<int64_t> claimed{0};
  const std::function<void(int64_t)> claim = [&](int64_t thread) {
    for (int64_t i; (i = count - 1 - claimed.fetch_add(1, std::memory_order_relaxed)) >= 0;) work(i, scratch_[thread]);
  };
  backend_.pool->run(std::min<int64_t>(backend_.pool->size(), count), claim);
}

}  // namespace elutq
