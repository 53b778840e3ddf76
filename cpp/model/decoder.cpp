#include "model/decoder.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "ops/rotary.h"

namespace elutq {

Decoder::Decoder(const Weights& weights, const Backend& backend)
    : weights_(weights),
      config_(weights.config()),
      backend_(backend),
      attention_(backend, config_.attention()),
      hidden_(kChunkTokens * config_.hidden_size),
      projected_(kChunkTokens * config_.hidden_size),
      q_(kChunkTokens * config_.attention().q_size()),
      k_(kChunkTokens * config_.attention().kv_size()),
      v_(kChunkTokens * config_.attention().kv_size()),
      up_(kChunkTokens * config_.intermediate_size),
      cos_(kChunkTokens * config_.head_dim / 2),
      sin_(kChunkTokens * config_.head_dim / 2),
      normalized_(kChunkTokens, config_.hidden_size),
      attended_(kChunkTokens, config_.attention().q_size()),
      gated_(kChunkTokens, config_.intermediate_size) {
  weights.check_complete();
  if (!backend.exact) reserve_tables();
  if (config_.has_experts()) sparse_mlp_.emplace(weights, backend, kChunkTokens, normalized_);
}

void Decoder::reserve_tables() {
  normalized_.reserve_tables(weights_.lm_head());
  for (int64_t i = 0; i < config_.num_hidden_layers; ++i) {
    const LayerWeights& layer = weights_.layer(i);
    for (const Linear* linear : {&layer.q_proj, &layer.k_proj, &layer.v_proj}) normalized_.reserve_tables(*linear);
    for (const Linear* linear : layer.mlp_readers()) normalized_.reserve_tables(*linear);
    attended_.reserve_tables(layer.o_proj);
    if (!layer.is_sparse()) gated_.reserve_tables(layer.mlp.down_proj);
  }
}

void Decoder::step(std::span<const StepItem> items, float* logits) {
  check(items);
  for (const StepItem& item : items) {
    item.sequence->reserve(item.sequence->length() + static_cast<int64_t>(item.tokens.size()));
  }
  rows_.clear();
  for (const StepItem& item : items) {
    for (size_t i = 0; i < item.tokens.size(); ++i) {
      const bool wants_logits = item.all_logits || i + 1 == item.tokens.size();
      rows_.push_back({item.sequence, item.sequence->length() + static_cast<int64_t>(i), item.tokens[i], wants_logits});
    }
  }
  for (std::span<const Row> rest = rows_; !rest.empty();) {
    const size_t count = std::min<size_t>(rest.size(), kChunkTokens);
    logits = forward(rest.first(count), logits);
    rest = rest.subspan(count);
  }
  for (const StepItem& item : items) {
    item.sequence->set_length(item.sequence->length() + static_cast<int64_t>(item.tokens.size()));
  }
}

void Decoder::check(std::span<const StepItem> items) const {
  for (size_t i = 0; i < items.size(); ++i) {
    if (!items[i].sequence->fits(config_)) throw std::invalid_argument("a sequence belongs to another model");
    if (items[i].tokens.empty()) throw std::invalid_argument("a step needs at least one token per sequence");
    for (const int32_t token : items[i].tokens) {
      if (token < 0 || token >= config_.vocab_size) {
        throw std::invalid_argument("token " + std::to_string(token) + " is not in the vocabulary of " +
                                    std::to_string(config_.vocab_size));
      }
    }
    for (size_t j = 0; j < i; ++j) {
      if (items[i].sequence == items[j].sequence) throw std::invalid_argument("a step names a sequence twice");
    }
  }
}

float* Decoder::forward(std::span<const Row> rows, float* logits) {
  const auto tokens = static_cast<int64_t>(rows.size());
  for_each(backend_, tokens, [&](int64_t t) {
    weights_.embed_tokens().read_row(*backend_.kernels, rows[t].token, hidden_.data() + t * config_.hidden_size);
    const int64_t half = config_.head_dim / 2;
    rotary_angles(config_.rope_inv_freq, config_.rope_attention_factor, rows[t].position, cos_.data() + t * half,
                  sin_.data() + t * half);
  });
  for (int64_t i = 0; i < config_.num_hidden_layers; ++i) {
    attend(rows, i);
    if (weights_.layer(i).is_sparse()) {
      feed_forward_sparse(tokens, weights_.layer(i));
    } else {
      feed_forward(tokens, weights_.layer(i));
    }
  }
  return head(rows, logits);
}

void Decoder::attend(std::span<const Row> rows, int64_t layer_index) {
  const KernelTable& kernels = *backend_.kernels;
  const LayerWeights& layer = weights_.layer(layer_index);
  const auto tokens = static_cast<int64_t>(rows.size());
  const int64_t hidden = config_.hidden_size;
  const int64_t head_dim = config_.head_dim;
  const int64_t q_size = config_.attention().q_size();
  const int64_t kv_size = config_.attention().kv_size();

  const std::array<const Linear*, 3> readers = {&layer.q_proj, &layer.k_proj, &layer.v_proj};
  for_each(backend_, tokens,
           [&](int64_t t) { normalize(hidden_.data() + t * hidden, layer.input_layernorm, normalized_, t, readers); });
  run_linears(backend_, normalized_,
              std::array<LinearCall, 3>{{{&layer.q_proj, {0, tokens}, q_.data(), q_size},
                                         {&layer.k_proj, {0, tokens}, k_.data(), kv_size},
                                         {&layer.v_proj, {0, tokens}, v_.data(), kv_size}}});

  // Every key and value of the chunk is in its cache before any token looks.
  for_each(backend_, tokens, [&](int64_t t) {
    float* q = q_.data() + t * q_size;
    float* k = k_.data() + t * kv_size;
    const float* v = v_.data() + t * kv_size;
    if (config_.qk_norm) {
      for (int64_t h = 0; h < config_.num_attention_heads; ++h) {
        float* head = q + h * head_dim;
        kernels.rms_norm(head, layer.q_norm.data(), head_dim, config_.rms_norm_eps, head);
      }
      for (int64_t h = 0; h < config_.num_key_value_heads; ++h) {
        float* head = k + h * head_dim;
        kernels.rms_norm(head, layer.k_norm.data(), head_dim, config_.rms_norm_eps, head);
      }
    }
    const float* cos = cos_.data() + t * head_dim / 2;
    const float* sin = sin_.data() + t * head_dim / 2;
    kernels.rope(q, config_.num_attention_heads, head_dim, cos, sin);
    kernels.rope(k, config_.num_key_value_heads, head_dim, cos, sin);
    rows[t].sequence->store(kernels, layer_index, rows[t].position, k, v);
  });

  runs_.clear();
  for (size_t t = 0, next = 0; t < rows.size(); t = next) {
    while (next < rows.size() && rows[next].sequence == rows[t].sequence) ++next;
    runs_.push_back(rows[t].sequence->run(layer_index, rows[t].position, static_cast<int64_t>(next - t)));
  }
  attention_.run(q_.data(), runs_, config_.sliding_windows[layer_index], attended_.row(0));

  const std::array<const Linear*, 1> output = {&layer.o_proj};
  for_each(backend_, tokens, [&](int64_t t) {
    if (!backend_.exact) attended_.build(kernels, t, output);
  });
  run_linears(backend_, attended_,
              std::array<LinearCall, 1>{{{&layer.o_proj, {0, tokens}, projected_.data(), hidden, hidden_.data()}}});
}

void Decoder::feed_forward(int64_t tokens, const LayerWeights& layer) {
  const KernelTable& kernels = *backend_.kernels;
  const int64_t hidden = config_.hidden_size;
  const int64_t intermediate = config_.intermediate_size;

  const std::array<const Linear*, 2> readers = {&layer.mlp.gate_proj, &layer.mlp.up_proj};
  for_each(backend_, tokens, [&](int64_t t) {
    normalize(hidden_.data() + t * hidden, layer.post_attention_layernorm, normalized_, t, readers);
  });
  run_linears(backend_, normalized_,
              std::array<LinearCall, 2>{{{&layer.mlp.gate_proj, {0, tokens}, gated_.row(0), intermediate},
                                         {&layer.mlp.up_proj, {0, tokens}, up_.data(), intermediate}}});
  const std::array<const Linear*, 1> output = {&layer.mlp.down_proj};
  for_each(backend_, tokens, [&](int64_t t) {
    kernels.silu_mul(gated_.row(t), up_.data() + t * intermediate, intermediate, gated_.row(t));
    if (!backend_.exact) gated_.build(kernels, t, output);
  });
  run_linears(
      backend_, gated_,
      std::array<LinearCall, 1>{{{&layer.mlp.down_proj, {0, tokens}, projected_.data(), hidden, hidden_.data()}}});
}

void Decoder::feed_forward_sparse(int64_t tokens, const LayerWeights& layer) {
  const std::vector<const Linear*> readers = layer.mlp_readers();
  for_each(backend_, tokens, [&](int64_t t) {
    normalize(hidden_.data() + t * config_.hidden_size, layer.post_attention_layernorm, normalized_, t, readers);
  });
  sparse_mlp_->run(layer, normalized_, tokens, hidden_.data());
}

float* Decoder::head(std::span<const Row> rows, float* logits) {
  // Compact the wanted rows to the front of the residual stream, which is not needed any more.
  int64_t wanted = 0;
  for (size_t t = 0; t < rows.size(); ++t) {
    if (!rows[t].wants_logits) continue;
    const float* from = hidden_.data() + static_cast<int64_t>(t) * config_.hidden_size;
    std::copy_n(from, config_.hidden_size, hidden_.data() + wanted * config_.hidden_size);
    ++wanted;
  }
  const std::array<const Linear*, 1> reader = {&weights_.lm_head()};
  for_each(backend_, wanted, [&](int64_t t) {
    normalize(hidden_.data() + t * config_.hidden_size, weights_.norm(), normalized_, t, reader);
  });
  if (wanted > 0) {
    run_linears(backend_, normalized_,
                std::array<LinearCall, 1>{{{&weights_.lm_head(), {0, wanted}, logits, config_.vocab_size}}});
  }
  return logits + wanted * config_.vocab_size;
}

void Decoder::normalize(const float* x, const std::vector<float>& weight, Activations& out, int64_t token,
                        std::span<const Linear* const> consumers) const {
  backend_.kernels->rms_norm(x, weight.data(), config_.hidden_size, config_.rms_norm_eps, out.row(token));
  if (!backend_.exact) out.build(*backend_.kernels, token, consumers);
}

}  // namespace elutq
