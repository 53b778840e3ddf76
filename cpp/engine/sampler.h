#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace elutq {

/// How the next token is chosen. The defaults are greedy.
struct SamplingOptions {
  float temperature = 0.0F;         ///< 0: the most likely token, the lowest of equals
  int64_t top_k = 0;                ///< keep this many most likely tokens, and all that equal the last; 0: all
  float top_p = 1.0F;               ///< keep the fewest most likely tokens whose probabilities reach this
  float min_p = 0.0F;               ///< drop tokens less likely than this times the most likely one
  float repetition_penalty = 1.0F;  ///< of tokens in the context: divide a positive logit by it, multiply a negative
  float frequency_penalty = 0.0F;   ///< taken from a token's logit for each time it was generated
  float presence_penalty = 0.0F;    ///< taken from a token's logit once it was generated
  std::vector<std::pair<int32_t, float>> logit_bias;  ///< added to the logits of these tokens; -inf forbids one
  uint64_t seed = 0;
};

/// What a sampler knows beside the logits.
struct SamplingContext {
  std::span<const int32_t> tokens;  ///< prompt and generated tokens so far
  int64_t prompt_length = 0;        ///< how many of them are the prompt
  /// Bit t % 32 of word t / 32: whether token t may come next. Tokens beyond it may not. nullopt: all may.
  std::optional<std::span<const int32_t>> allowed;
};

/// Chooses tokens from logits. The order is: repetition, frequency and presence penalty, logit bias, allowed tokens,
/// temperature, top_k, top_p, min_p, each over what the one before it left; those that transformers' generate() has
/// are in its order.
///
/// Draw n of a sampler with seed s is SplitMix64 (Steele et al. 2014): with x = s + (n + 1) * 0x9E3779B97F4A7C15,
/// mixed to 64 bits, u = (top 53 bits) * 2^-53; the token is the first, in ascending order of ids, at which the
/// cumulative probability exceeds u. Exponentials are computed by basic operations alone, so that a seed gives the
/// same text wherever logits are the same.
class Sampler {
 public:
  /// Throws std::invalid_argument, naming the option, when one is out of range.
  explicit Sampler(const SamplingOptions& options);

  /// The next token, from its logits [vocab_size]. Throws std::runtime_error when logits are NaN or there is no finite
  /// one, std::invalid_argument when bias and allowed tokens leave none.
  int32_t sample(std::span<const float> logits, const SamplingContext& context);

 private:
  struct Candidate {
    float weight;  // probability as a share of the most likely token's
    int32_t token;
  };

  void penalize(const SamplingContext& context);
  void forbid(std::span<const int32_t> allowed);
  /// Turns scores into weights; their sum.
  double weigh(float highest);
  /// Fills candidates_, in ascending order of tokens, with all that the filters can keep. total: of all weights.
  void collect(double total);
  void keep_top_k();
  void keep_top_p(double total);
  static double weight_of(std::span<const Candidate> candidates);
  int32_t draw_from_candidates();
  int32_t draw_from_all(double total);
  double next_uniform();

  SamplingOptions options_;
  uint64_t state_;
  std::vector<float> scores_;          // [vocab_size]: changed logits, then weights
  std::vector<int32_t> counts_;        // [vocab_size]: scratch of penalize(), zero between calls
  std::vector<double> block_sums_;     // of consecutive weights, for draw_from_all()
  std::vector<Candidate> candidates_;  // in ascending order of tokens
  std::vector<Candidate> ranked_;      // scratch of keep_top_p()
};

/// A token and the natural logarithm of its probability.
struct TokenLogprob {
  int32_t token;
  float logprob;
};

/// Log-probability of `token`, then those of the `count` most likely tokens, most likely first, the lower id first of
/// equals. logits: [vocab_size], `token` among them.
std::vector<TokenLogprob> log_probabilities(std::span<const float> logits, int32_t token, int64_t count);

}  // namespace elutq
