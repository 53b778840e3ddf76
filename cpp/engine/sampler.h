#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace elutq {

/// How the next token is chosen. The defaults are greedy.
struct SamplingOptions {
  float temperature = 0.0F;         ///< 0: the most likely token, the lowest of equals
  int64_t top_k = 0;                ///< keep this many most likely tokens, and all that equal the last; 0: all
  float top_p = 1.0F;               ///< keep the fewest most likely tokens whose probabilities reach this
  float min_p = 0.0F;               ///< drop tokens less likely than this times the most likely one
  float repetition_penalty = 1.0F;  ///< of tokens in the context: divide a positive logit by it, multiply a negative
  uint64_t seed = 0;
};

/// Chooses tokens from logits. The filters and their order are those of transformers' generate(): penalty,
/// temperature, top_k, top_p, min_p, each over what the one before it left.
///
/// Draw n of a sampler with seed s is SplitMix64 (Steele et al. 2014): with x = s + (n + 1) * 0x9E3779B97F4A7C15,
/// mixed to 64 bits, u = (top 53 bits) * 2^-53; the token is the first, in ascending order of ids, at which the
/// cumulative probability exceeds u. So a seed gives the same text wherever logits are the same.
class Sampler {
 public:
  /// Throws std::invalid_argument, naming the option, when one is out of range.
  explicit Sampler(const SamplingOptions& options);

  /// The next token after `context` (prompt and generated tokens so far), from its logits [vocab_size].
  /// Throws std::runtime_error when logits are NaN or there is no finite one.
  int32_t sample(std::span<const float> logits, std::span<const int32_t> context);

 private:
  struct Candidate {
    double logit;
    int32_t token;
    double probability;
  };

  void penalize(std::span<const int32_t> context);
  void keep_top_k();
  void keep_top_p();
  void keep_min_p();
  /// Fills in probabilities of the candidates; they sum to 1.
  void softmax();
  double next_uniform();

  SamplingOptions options_;
  uint64_t state_;
  std::vector<Candidate> candidates_;  // in ascending order of tokens
  std::vector<int32_t> order_;         // scratch
  std::vector<double> sorted_;         // scratch
};

}  // namespace elutq
