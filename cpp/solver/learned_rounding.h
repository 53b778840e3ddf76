#pragma once

#include "base/thread_pool.h"
#include "solver/soft_weights.h"

namespace elutq {

/// Soft weights of `groups` groups, their gradients and their pull to levels (see soft_weights.h), with the build for
/// this machine. The results depend neither on the instruction set nor on the number of threads. All throw
/// std::invalid_argument when a dimension or the temperature is outside what SoftWeights states, or the distance is
/// less than 0.
void soft_values(const SoftWeights& soft, int64_t groups, float* values, ThreadPool& pool);
void soft_gradients(const SoftWeights& soft, int64_t groups, const float* gradient, float* for_latent, float* for_level,
                    ThreadPool& pool);
void settle(const SoftWeights& soft, int64_t groups, float distance, float* settled, ThreadPool& pool);

}  // namespace elutq
