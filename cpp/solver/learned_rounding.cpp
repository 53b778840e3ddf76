#include "solver/learned_rounding.h"

#include <stdexcept>

#include "base/cpu_features.h"

namespace elutq {
namespace {

void check_levels(const SoftWeights& soft) {
  if (soft.levels != 2 && soft.levels != 4 && soft.levels != 8 && soft.levels != kSoftMaxLevels) {
    throw std::invalid_argument("levels must be 2, 4, 8 or 16");
  }
}

void check(const SoftWeights& soft) {
  check_levels(soft);
  if (!(soft.temperature > 0.0f)) throw std::invalid_argument("the temperature must be more than 0");
}

}  // namespace

void soft_values(const SoftWeights& soft, int64_t groups, float* values, ThreadPool& pool) {
  check(soft);
  auto* build = solver_generic::soft_values;
#if defined(__x86_64__)
  if (cpu_features().avx2) build = solver_avx2::soft_values;
  if (cpu_features().avx512) build = solver_avx512::soft_values;
#endif
  pool.run_ranges(groups, 1, [&](int64_t first, int64_t last) { build(soft, first, last, values); });
}

void soft_gradients(const SoftWeights& soft, int64_t groups, const float* gradient, float* for_latent, float* for_level,
                    ThreadPool& pool) {
  check(soft);
  auto* build = solver_generic::soft_gradients;
#if defined(__x86_64__)
  if (cpu_features().avx2) build = solver_avx2::soft_gradients;
  if (cpu_features().avx512) build = solver_avx512::soft_gradients;
#endif
  pool.run_ranges(groups, 1,
                  [&](int64_t first, int64_t last) { build(soft, first, last, gradient, for_latent, for_level); });
}

void settle(const SoftWeights& soft, int64_t groups, float distance, float* settled, ThreadPool& pool) {
  check_levels(soft);
  if (!(distance >= 0.0f)) throw std::invalid_argument("the distance must be at least 0");
  auto* build = solver_generic::settle;
#if defined(__x86_64__)
  if (cpu_features().avx2) build = solver_avx2::settle;
  if (cpu_features().avx512) build = solver_avx512::settle;
#endif
  pool.run_ranges(groups, 1, [&](int64_t first, int64_t last) { build(soft, first, last, distance, settled); });
}

}  // namespace elutq
