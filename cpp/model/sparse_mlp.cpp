#include "model/sparse_mlp.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace elutq {

SparseMlp::SparseMlp(const Weights& weights, const Backend& backend, int64_t max_tokens, const Activations& normalized)
    : config_(weights.config()),
      backend_(backend),
      gathers_values_(backend.exact),
      probabilities_(max_tokens * config_.num_experts),
      choices_(max_tokens * config_.num_experts_per_tok),
      ends_(config_.num_experts),
      gathered_(max_tokens * config_.num_experts_per_tok, normalized),
      activated_(max_tokens * config_.num_experts_per_tok, config_.moe_intermediate_size),
      up_(max_tokens * config_.num_experts_per_tok * config_.moe_intermediate_size),
      results_(max_tokens * config_.num_experts_per_tok * config_.hidden_size) {
  for (int64_t i = 0; i < config_.num_hidden_layers; ++i) {
    for (const auto& [gate, up, down] : weights.layer(i).experts) {
      gathers_values_ |= !gate.is_hlq() || !up.is_hlq();
      if (!backend.exact) activated_.reserve_tables(down);
    }
  }
}

void SparseMlp::run(const LayerWeights& layer, const Activations& normalized, int64_t tokens, float* hidden) {
  const KernelTable& kernels = *backend_.kernels;
  const int64_t hidden_size = config_.hidden_size;
  const int64_t intermediate = config_.moe_intermediate_size;
  const std::span<Choice> choices(choices_.data(), tokens * config_.num_experts_per_tok);

  run_linears(backend_, normalized,
              std::array<LinearCall, 1>{{{&layer.router, {0, tokens}, probabilities_.data(), config_.num_experts}}});
  for_each(backend_, tokens, [&](int64_t t) { choose(t); });
  sort(choices);
  for_each(backend_, tokens, [&](int64_t t) {
    for (const Choice& choice : choices_of(t)) gathered_.share(choice.row, normalized, t, gathers_values_);
  });

  calls_.clear();
  for (int64_t e = 0; e < config_.num_experts; ++e) {
    const Rows rows = rows_of(e);
    if (rows.count == 0) continue;
    calls_.push_back({&layer.experts[e].gate_proj, rows, activated_.row(rows.begin), intermediate});
    calls_.push_back({&layer.experts[e].up_proj, rows, up_.data() + rows.begin * intermediate, intermediate});
  }
  run_linears(backend_, gathered_, calls_);
  for_each(backend_, static_cast<int64_t>(choices.size()), [&](int64_t i) {
    const auto& [expert, weight, row] = choices[i];
    kernels.silu_mul(activated_.row(row), up_.data() + row * intermediate, intermediate, activated_.row(row));
    if (!backend_.exact) activated_.build(kernels, row, std::array<const Linear*, 1>{&layer.experts[expert].down_proj});
  });

  calls_.clear();
  for (int64_t e = 0; e < config_.num_experts; ++e) {
    const Rows rows = rows_of(e);
    if (rows.count == 0) continue;
    calls_.push_back({&layer.experts[e].down_proj, rows, results_.data() + rows.begin * hidden_size, hidden_size});
  }
  run_linears(backend_, activated_, calls_);
  for_each(backend_, tokens, [&](int64_t t) {
    for (const Choice& choice : choices_of(t)) {
      kernels.add_scaled(results_.data() + choice.row * hidden_size, choice.weight, hidden_size,
                         hidden + t * hidden_size);
    }
  });
}

std::span<SparseMlp::Choice> SparseMlp::choices_of(int64_t token) {
  return {choices_.data() + token * config_.num_experts_per_tok, static_cast<size_t>(config_.num_experts_per_tok)};
}

void SparseMlp::choose(int64_t token) {
  const std::span<float> left(probabilities_.data() + token * config_.num_experts, config_.num_experts);
  backend_.kernels->softmax(left.data(), config_.num_experts);
  float sum = 0.0F;
  for (Choice& choice : choices_of(token)) {
    const auto largest = std::max_element(left.begin(), left.end());  // the first of equals
    choice.expert = largest - left.begin();
    choice.weight = *largest;
    sum += *largest;
    *largest = -1.0F;
  }
  if (!config_.norm_topk_prob) return;
  for (Choice& choice : choices_of(token)) choice.weight /= sum;
}

void SparseMlp::sort(std::span<Choice> choices) {
  std::fill(ends_.begin(), ends_.end(), 0);
  for (const Choice& choice : choices) ++ends_[choice.expert];
  std::exclusive_scan(ends_.begin(), ends_.end(), ends_.begin(), int64_t{0});
  for (Choice& choice : choices) choice.row = ends_[choice.expert]++;
}

Rows SparseMlp::rows_of(int64_t expert) const {
  const int64_t begin = expert == 0 ? 0 : ends_[expert - 1];
  return {begin, ends_[expert] - begin};
}

}  // namespace elutq
