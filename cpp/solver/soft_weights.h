#pragma once

#include <cstdint>

namespace elutq {

inline constexpr int kSoftMaxLevels = 16;

/// Weights w that lie between two levels each, in groups with levels of their own. A latent weight z is between two
/// levels a < b, or nearest to them; with the mean distance between levels, gap,
///
///     w = a + (b - a) share,    share = sigmoid(2 (z - (a + b) / 2) (b - a) / (temperature gap^2))
///
/// src/elutq/finetune/soft_weights.py says what for. Memory is owned by the caller.
struct SoftWeights {
  int64_t columns = 0;            ///< of a group
  int levels = 0;                 ///< 2, 4, 8 or 16
  float temperature = 0.0f;       ///< more than 0; settle() has no use for it
  const float* latent = nullptr;  ///< z, [groups][columns]
  const float* level = nullptr;   ///< [groups][levels], ascending
};

// The builds for each instruction set, all of which return the same bits.
#define ELUTQ_SOFT_WEIGHTS(build)                                                                                      \
  namespace build {                                                                                                    \
  /** Weights, [groups][columns], of the groups from `first` until before `last`. */                                   \
  void soft_values(const SoftWeights& soft, int64_t first, int64_t last, float* values);                               \
  /** Gradients for z, [groups][columns], and for levels, [groups][levels], of a loss from those of w. As for z,       \
      levels count as fixed in the share. */                                                                           \
  void soft_gradients(const SoftWeights& soft, int64_t first, int64_t last, const float* gradient, float* for_latent,  \
                      float* for_level);                                                                               \
  /** Latent weights, [groups][columns], moved to the level nearest to each by at most `distance`; may be written over \
      soft.latent. */                                                                                                  \
  void settle(const SoftWeights& soft, int64_t first, int64_t last, float distance, float* settled);                   \
  }
ELUTQ_SOFT_WEIGHTS(solver_generic)
#if defined(__x86_64__)
ELUTQ_SOFT_WEIGHTS(solver_avx2)
ELUTQ_SOFT_WEIGHTS(solver_avx512)
#endif
#undef ELUTQ_SOFT_WEIGHTS

}  // namespace elutq
