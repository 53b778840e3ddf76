#include "engine/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "base/exponential.h"

namespace elutq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
/// Weights are added in blocks of so many, so that a draw finds its block first.
constexpr size_t kBlock = 512;

void require(bool condition, const char* complaint) {
  if (!condition) throw std::invalid_argument(complaint);
}

/// The largest of the logits. Throws std::runtime_error when one is NaN.
float largest(std::span<const float> logits) {
  // As integers with the same order, because compilers vectorize those; NaN lies outside both infinities.
  const auto ordered = [](int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); };
  constexpr int32_t kInfinityBits = 0x7F800000;
  int32_t low = 0;
  int32_t high = ~kInfinityBits;
  for (const float logit : logits) {
    const int32_t key = ordered(std::bit_cast<int32_t>(logit));
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  if (low < ~kInfinityBits || high > kInfinityBits) throw std::runtime_error("the model's logits hold NaN");
  return std::bit_cast<float>(ordered(high));
}

/// Turns scores into exp((score - highest) / temperature).
void to_weights(std::span<float> scores, float highest, float temperature) {
  for (float& score : scores) score = exp_nonpositive((score - highest) / temperature);
}

double sum(std::span<const float> values) {
  std::array<double, 4> lanes{};
  const size_t whole = values.size() / lanes.size() * lanes.size();
  for (size_t i = 0; i < whole; i += lanes.size()) {
    for (size_t lane = 0; lane < lanes.size(); ++lane) lanes[lane] += values[i + lane];
  }
  for (size_t i = whole; i < values.size(); ++i) lanes[0] += values[i];
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), state_(options.seed) {
  require(std::isfinite(options.temperature) && options.temperature >= 0, "temperature must be 0 (greedy) or positive");
  require(options.top_k >= 0, "top_k must be 0 (off) or positive");
  require(options.top_p > 0 && options.top_p <= 1, "top_p must be above 0 and at most 1 (off)");
  require(options.min_p >= 0 && options.min_p <= 1, "min_p must be from 0 (off) to 1");
  require(std::isfinite(options.repetition_penalty) && options.repetition_penalty > 0,
          "repetition_penalty must be positive (1 is off)");
  require(std::isfinite(options.frequency_penalty), "frequency_penalty must be a finite number (0 is off)");
  require(std::isfinite(options.presence_penalty), "presence_penalty must be a finite number (0 is off)");
  for (const auto& [token, bias] : options.logit_bias) {
    require(token >= 0, "logit_bias must name tokens of the vocabulary");
    require(bias < kInfinity, "logit_bias must give finite numbers, or -inf to forbid a token");
  }
}

int32_t Sampler::sample(std::span<const float> logits, const SamplingContext& context) {
  float highest = largest(logits);
  if (!std::isfinite(highest)) throw std::runtime_error("the model's logits have no finite maximum");
  const bool penalties =
      options_.repetition_penalty != 1.0F || options_.frequency_penalty != 0.0F || options_.presence_penalty != 0.0F;
  const bool changed = penalties || !options_.logit_bias.empty() || context.allowed;
  if (options_.temperature == 0.0F && !changed) {
    return static_cast<int32_t>(std::find(logits.begin(), logits.end(), highest) - logits.begin());
  }
  scores_.assign(logits.begin(), logits.end());
  if (changed) {
    if (penalties) penalize(context);
    for (const auto& [token, bias] : options_.logit_bias) {
      if (static_cast<size_t>(token) < scores_.size()) scores_[token] += bias;
    }
    if (context.allowed) forbid(*context.allowed);
    highest = largest(scores_);
    require(std::isfinite(highest), "no token is left to choose from: constraint and logit_bias forbid all");
  }
  if (options_.temperature == 0.0F) {
    return static_cast<int32_t>(std::find(scores_.begin(), scores_.end(), highest) - scores_.begin());
  }

  const double total = weigh(highest);
  if (options_.top_k == 0 && options_.top_p == 1.0F && options_.min_p == 0.0F) return draw_from_all(total);
  collect(total);
  if (options_.top_k > 0) keep_top_k();
  if (options_.top_p < 1.0F) keep_top_p(options_.top_k > 0 ? weight_of(candidates_) : total);
  if (options_.min_p > 0.0F) {
    std::erase_if(candidates_, [&](const Candidate& candidate) { return candidate.weight < options_.min_p; });
  }
  return draw_from_candidates();
}

void Sampler::penalize(const SamplingContext& context) {
  counts_.resize(scores_.size());
  const auto known = [&](int32_t token) { return token >= 0 && static_cast<size_t>(token) < scores_.size(); };
  if (options_.repetition_penalty != 1.0F) {
    for (const int32_t token : context.tokens) {
      if (!known(token) || counts_[token]++ > 0) continue;
      float& score = scores_[token];
      score = score < 0 ? score * options_.repetition_penalty : score / options_.repetition_penalty;
    }
    for (const int32_t token : context.tokens) {
      if (known(token)) counts_[token] = 0;
    }
  }
  if (options_.frequency_penalty == 0.0F && options_.presence_penalty == 0.0F) return;
  const auto generated = context.tokens.subspan(static_cast<size_t>(context.prompt_length));
  for (const int32_t token : generated) {
    if (known(token)) ++counts_[token];
  }
  for (const int32_t token : generated) {
    if (!known(token) || counts_[token] == 0) continue;
    const auto count = static_cast<float>(counts_[token]);
    scores_[token] -= options_.frequency_penalty * count + options_.presence_penalty;
    counts_[token] = 0;
  }
}

void Sampler::forbid(std::span<const int32_t> allowed) {
  const size_t words = std::min(allowed.size(), (scores_.size() + 31) / 32);
  for (size_t word = 0; word < words; ++word) {
    const auto bits = static_cast<uint32_t>(allowed[word]);
    if (bits == ~uint32_t{0}) continue;
    const size_t end = std::min(scores_.size(), word * 32 + 32);
    for (size_t i = word * 32; i < end; ++i) {
      if ((bits >> (i % 32) & 1) == 0) scores_[i] = -kInfinity;
    }
  }
  if (words * 32 < scores_.size())
    std::fill(scores_.begin() + static_cast<int64_t>(words) * 32, scores_.end(), -kInfinity);
}

double Sampler::weigh(float highest) {
  block_sums_.clear();
  double total = 0;
  for (size_t begin = 0; begin < scores_.size(); begin += kBlock) {
    const auto block = std::span(scores_).subspan(begin, std::min(kBlock, scores_.size() - begin));
    to_weights(block, highest, options_.temperature);
    block_sums_.push_back(sum(block));
    total += block_sums_.back();
  }
  return total;
}

void Sampler::collect(double total) {
  // Lower the bar until what passes it holds all that the filters can keep: seldom more than a thousand tokens.
  const auto enough = [&](double bar, double mass) {
    if (bar == 0) return true;
    if (options_.top_k > 0) return candidates_.size() >= static_cast<size_t>(options_.top_k);
    return mass >= options_.top_p * total || bar < options_.min_p;
  };
  double mass = 0;
  double bar = 1;
  do {
    bar = bar < 0x1p-60 ? 0 : bar * 0x1p-7;
    candidates_.clear();
    mass = 0;
    const auto threshold = static_cast<float>(bar);
    for (size_t i = 0; i < scores_.size(); ++i) {
      if (scores_[i] <= threshold) continue;
      candidates_.push_back({scores_[i], static_cast<int32_t>(i)});
      mass += scores_[i];
    }
  } while (!enough(bar, mass));
}

void Sampler::keep_top_k() {
  const auto k = static_cast<size_t>(options_.top_k);
  if (candidates_.size() <= k) return;
  std::vector<float>& weights = scores_;  // not needed any more
  weights.clear();
  for (const Candidate& candidate : candidates_) weights.push_back(candidate.weight);
  const auto last = weights.begin() + static_cast<std::ptrdiff_t>(k - 1);
  std::nth_element(weights.begin(), last, weights.end(), std::greater<>());
  std::erase_if(candidates_, [lowest = *last](const Candidate& candidate) { return candidate.weight < lowest; });
}

void Sampler::keep_top_p(double total) {
  const auto more_likely = [](const Candidate& a, const Candidate& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
  };
  // Quickselect by weight: those before `begin` are kept and too light, those from `end` on are not needed.
  ranked_ = candidates_;
  double wanted = options_.top_p * total;
  auto begin = ranked_.begin();
  for (auto end = ranked_.end(); end - begin > 1;) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, more_likely);
    const double upper = weight_of({begin, middle});
    if (upper < wanted) {
      wanted -= upper;
      begin = middle;
    } else {
      end = middle;
    }
  }
  std::erase_if(candidates_, [&](const Candidate& candidate) { return more_likely(*begin, candidate); });
}

double Sampler::weight_of(std::span<const Candidate> candidates) {
  return std::accumulate(candidates.begin(), candidates.end(), 0.0,
                         [](double sum, const Candidate& candidate) { return sum + candidate.weight; });
}

int32_t Sampler::draw_from_candidates() {
  const double target = next_uniform() * weight_of(candidates_);
  double cumulative = 0;
  for (const Candidate& candidate : candidates_) {
    cumulative += candidate.weight;
    if (cumulative > target) return candidate.token;
  }
  return candidates_.back().token;  // rounding left the sum a hair under the target
}

int32_t Sampler::draw_from_all(double total) {
  const double target = next_uniform() * total;
  double before = 0;  // weight of the blocks passed
  size_t last = 0;    // token that has any probability
  for (size_t block = 0; block < block_sums_.size(); ++block) {
    if (before + block_sums_[block] > target || block + 1 == block_sums_.size()) {
      double cumulative = before;
      for (size_t i = block * kBlock; i < std::min(scores_.size(), (block + 1) * kBlock); ++i) {
        cumulative += scores_[i];
        if (scores_[i] > 0) last = i;
        if (cumulative > target) return static_cast<int32_t>(i);
      }
    }
    before += block_sums_[block];
  }
  return static_cast<int32_t>(last);
}

double Sampler::next_uniform() {
  state_ += 0x9E3779B97F4A7C15ULL;
  uint64_t x = state_;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  x ^= x >> 31;
  return static_cast<double>(x >> 11) * 0x1p-53;
}

std::vector<TokenLogprob> log_probabilities(std::span<const float> logits, int32_t token, int64_t count) {
  require(token >= 0 && static_cast<size_t>(token) < logits.size(), "the token is not in the vocabulary");
  const float highest = largest(logits);
  std::array<float, kBlock> scratch;
  double total = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const auto block = logits.subspan(begin, std::min(kBlock, logits.size() - begin));
    const auto weights = std::span(scratch).first(block.size());
    std::copy(block.begin(), block.end(), weights.begin());
    to_weights(weights, highest, 1.0F);
    total += sum(weights);
  }
  const double log_total = highest + std::log(total);
  const auto entry = [&](size_t i) {
    return TokenLogprob{static_cast<int32_t>(i), static_cast<float>(logits[i] - log_total)};
  };
  const size_t wanted = std::min(logits.size(), static_cast<size_t>(std::max<int64_t>(count, 0)));
  std::vector<size_t> best;  // in order; an equal one goes behind
  for (size_t i = 0; i < logits.size() && wanted > 0; ++i) {
    if (best.size() == wanted && logits[i] <= logits[best.back()]) continue;
    if (best.size() == wanted) best.pop_back();
    best.insert(
        std::upper_bound(best.begin(), best.end(), i, [&](size_t a, size_t b) { return logits[a] > logits[b]; }), i);
  }
  std::vector<TokenLogprob> result = {entry(static_cast<size_t>(token))};
  std::transform(best.begin(), best.end(), std::back_inserter(result), entry);
  return result;
}

}  // namespace elutq
