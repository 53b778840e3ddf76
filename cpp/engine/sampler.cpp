#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace elutq {
namespace {

void require(bool condition, const char* complaint) {
  if (!condition) throw std::invalid_argument(complaint);
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), state_(options.seed) {
  require(std::isfinite(options.temperature) && options.temperature >= 0, "temperature must be 0 (greedy) or positive");
  require(options.top_k >= 0, "top_k must be 0 (off) or positive");
  require(options.top_p > 0 && options.top_p <= 1, "top_p must be above 0 and at most 1 (off)");
  require(options.min_p >= 0 && options.min_p <= 1, "min_p must be from 0 (off) to 1");
  require(std::isfinite(options.repetition_penalty) && options.repetition_penalty > 0,
          "repetition_penalty must be positive (1 is off)");
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> context) {
  candidates_.resize(logits.size());
  double highest = -std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i])) throw std::runtime_error("the model's logits hold NaN");
    candidates_[i] = {logits[i], static_cast<int32_t>(i), 0.0};
    highest = std::max<double>(highest, logits[i]);
  }
  if (!std::isfinite(highest)) throw std::runtime_error("the model's logits have no finite maximum");
  if (options_.repetition_penalty != 1.0F) penalize(context);
  if (options_.temperature == 0.0F) {
    const auto best = std::max_element(candidates_.begin(), candidates_.end(),
                                       [](const Candidate& a, const Candidate& b) { return a.logit < b.logit; });
    return best->token;
  }
  for (Candidate& candidate : candidates_) candidate.logit /= options_.temperature;
  if (options_.top_k > 0) keep_top_k();
  softmax();
  if (options_.top_p < 1.0F) keep_top_p();
  if (options_.min_p > 0.0F) keep_min_p();

  const double target = next_uniform();
  double cumulative = 0;
  for (const Candidate& candidate : candidates_) {
    cumulative += candidate.probability;
    if (cumulative > target) return candidate.token;
  }
  // Rounding left the sum a hair under the target: the last one that has any probability.
  const auto last = std::find_if(candidates_.rbegin(), candidates_.rend(),
                                 [](const Candidate& candidate) { return candidate.probability > 0; });
  return last->token;
}

void Sampler::penalize(std::span<const int32_t> context) {
  order_.assign(context.begin(), context.end());
  std::sort(order_.begin(), order_.end());
  order_.erase(std::unique(order_.begin(), order_.end()), order_.end());
  const double penalty = options_.repetition_penalty;
  for (const int32_t token : order_) {
    if (token < 0 || static_cast<size_t>(token) >= candidates_.size()) continue;
    double& logit = candidates_[token].logit;
    logit = logit < 0 ? logit * penalty : logit / penalty;
  }
}

void Sampler::keep_top_k() {
  const auto k = static_cast<size_t>(options_.top_k);
  if (k >= candidates_.size()) return;
  sorted_.clear();
  for (const Candidate& candidate : candidates_) sorted_.push_back(candidate.logit);
  std::nth_element(sorted_.begin(), sorted_.begin() + static_cast<std::ptrdiff_t>(k - 1), sorted_.end(),
                   std::greater<>());
  const double lowest = sorted_[k - 1];
  std::erase_if(candidates_, [&](const Candidate& candidate) { return candidate.logit < lowest; });
}

void Sampler::keep_top_p() {
  // Tokens this unlikely cannot reach 1 - top_p all together, so none of them is kept: no need to sort them.
  const double negligible = (1.0 - options_.top_p) / static_cast<double>(candidates_.size());
  order_.clear();
  for (size_t i = 0; i < candidates_.size(); ++i) {
    if (candidates_[i].probability >= negligible) order_.push_back(static_cast<int32_t>(i));
  }
  std::sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
    const double p = candidates_[a].probability;
    const double q = candidates_[b].probability;
    return p > q || (p == q && a < b);
  });
  double above = 0;
  size_t kept = 0;
  while (kept < order_.size() && above < options_.top_p) above += candidates_[order_[kept++]].probability;
  order_.resize(kept);
  std::sort(order_.begin(), order_.end());
  for (size_t i = 0; i < kept; ++i) candidates_[i] = candidates_[order_[i]];
  candidates_.resize(kept);
  softmax();
}

void Sampler::keep_min_p() {
  double highest = 0;
  for (const Candidate& candidate : candidates_) highest = std::max(highest, candidate.probability);
  std::erase_if(candidates_,
                [&](const Candidate& candidate) { return candidate.probability < options_.min_p * highest; });
  softmax();
}

void Sampler::softmax() {
  double highest = -std::numeric_limits<double>::infinity();
  for (const Candidate& candidate : candidates_) highest = std::max(highest, candidate.logit);
  double sum = 0;
  for (Candidate& candidate : candidates_) sum += candidate.probability = std::exp(candidate.logit - highest);
  for (Candidate& candidate : candidates_) candidate.probability /= sum;
}

double Sampler::next_uniform() {
  state_ += 0x9E3779B97F4A7C15ULL;
  uint64_t x = state_;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  x ^= x >> 31;
  return static_cast<double>(x >> 11) * 0x1p-53;
}

}  // namespace elutq
