// Compiled once per instruction set, as group_search.cpp is.
#include "solver/soft_weights.h"

#include "base/exponential.h"
#include "solver/vectors.h"

namespace elutq::ELUTQ_SOLVER_NAMESPACE {
namespace {

constexpr int kSums = 16;  // of every level, whatever the register holds

/// What some columns of a group lie between.
struct Between {
  Ints rank;     ///< of the lower level
  Floats below;  ///< the lower level
  Floats step;   ///< from it to the other
  Floats share;  ///< of the other
  Floats rest;   ///< 1 - share, but exact where that is next to nothing
  Floats slope;  ///< of the sigmoid's argument
};

/// Levels of a group.
template <int kLevels>
class Levels {
 public:
  Levels(const SoftWeights& soft, int64_t group) : level_(soft.level + group * kLevels) {
    for (int i = 0; i < kLevels - 1; ++i) step_[i] = level_[i + 1] - level_[i];
    const float gap = (level_[kLevels - 1] - level_[0]) / (kLevels - 1);
    const float least = gap > 1e-9f ? gap : 1e-9f;
    steepness_ = 2.0f / (soft.temperature * (least * least));
  }

  Between find(const Floats& latent) const {
    Between between{Ints{}, Floats{} + level_[0], Floats{} + step_[0], Floats{}, Floats{}, Floats{}};
    for (int i = 1; i < kLevels - 1; ++i) {
      const Ints above = latent > level_[i];
      between.rank -= above;  // which is -1
      between.below = above ? Floats{} + level_[i] : between.below;
      between.step = above ? Floats{} + step_[i] : between.step;
    }
    between.slope = between.step * steepness_;
    const Floats x = (latent - between.below - between.step * 0.5f) * between.slope;
    const Ints negative = x < 0.0f;
    const Floats e = exp_nonpositive<Ints>(negative ? x : -x);
    const Floats larger = 1.0f / (e + 1.0f);
    const Floats smaller = e * larger;
    between.share = negative ? smaller : larger;
    between.rest = negative ? larger : smaller;
    return between;
  }

 private:
  const float* level_;
  float step_[kLevels - 1];
  float steepness_;
};

Floats load(const float* from, int64_t count) {
  Floats floats{};
  if (count >= kLanes) {
    __builtin_memcpy(&floats, from, sizeof(floats));
  } else {
    for (int l = 0; l < count; ++l) floats[l] = from[l];
  }
  return floats;
}

void store(const Floats& floats, int64_t count, float* to) {
  if (count >= kLanes) {
    __builtin_memcpy(to, &floats, sizeof(floats));
  } else {
    for (int l = 0; l < count; ++l) to[l] = floats[l];
  }
}

template <int kLevels>
void values_of_group(const SoftWeights& soft, int64_t group, float* values) {
  const Levels<kLevels> levels(soft, group);
  for (int64_t column = 0; column < soft.columns; column += kLanes) {
    const int64_t at = group * soft.columns + column;
    const int64_t count = soft.columns - column;
    const Between between = levels.find(load(soft.latent + at, count));
    store(between.below + between.step * between.share, count, values + at);
  }
}

template <int kLevels>
void gradients_of_group(const SoftWeights& soft, int64_t group, const float* gradient, float* for_latent,
                        float* for_level) {
  const Levels<kLevels> levels(soft, group);
  Floats sums[kSums / kLanes][kLevels] = {};
  for (int64_t column = 0; column < soft.columns; column += kLanes) {
    const int64_t at = group * soft.columns + column;
    const int64_t count = soft.columns - column;
    const Between between = levels.find(load(soft.latent + at, count));
    const Floats to_above = load(gradient + at, count) * between.share;
    const Floats to_below = load(gradient + at, count) * between.rest;
    store(to_above * between.rest * between.step * between.slope, count, for_latent + at);
    Floats(&own)[kLevels] = sums[column / kLanes % (kSums / kLanes)];
    for (int i = 0; i < kLevels - 1; ++i) {
      const Ints here = between.rank == i;
      own[i] += here ? to_below : Floats{};
      own[i + 1] += here ? to_above : Floats{};
    }
  }
  for (int i = 0; i < kLevels; ++i) {
    float sum = 0.0f;
    for (int l = 0; l < kSums; ++l) sum += sums[l / kLanes][i][l % kLanes];
    for_level[group * kLevels + i] = sum;
  }
}

template <int kLevels>
void settle_group(const SoftWeights& soft, int64_t group, float distance, float* settled) {
  const float* level = soft.level + group * kLevels;
  for (int64_t column = 0; column < soft.columns; column += kLanes) {
    const int64_t at = group * soft.columns + column;
    const int64_t count = soft.columns - column;
    const Floats latent = load(soft.latent + at, count);
    Floats nearest = Floats{} + level[0];
    for (int i = 1; i < kLevels; ++i) {
      nearest = latent > (level[i - 1] + level[i]) * 0.5f ? Floats{} + level[i] : nearest;
    }
    Floats step = nearest - latent;
    step = step > distance ? Floats{} + distance : step;
    step = step < -distance ? Floats{} - distance : step;
    store(latent + step, count, settled + at);
  }
}

}  // namespace

void soft_values(const SoftWeights& soft, int64_t first, int64_t last, float* values) {
  for (int64_t group = first; group < last; ++group) {
    if (soft.levels == 2) values_of_group<2>(soft, group, values);
    if (soft.levels == 4) values_of_group<4>(soft, group, values);
    if (soft.levels == 8) values_of_group<8>(soft, group, values);
    if (soft.levels == 16) values_of_group<16>(soft, group, values);
  }
}

void soft_gradients(const SoftWeights& soft, int64_t first, int64_t last, const float* gradient, float* for_latent,
                    float* for_level) {
  for (int64_t group = first; group < last; ++group) {
    if (soft.levels == 2) gradients_of_group<2>(soft, group, gradient, for_latent, for_level);
    if (soft.levels == 4) gradients_of_group<4>(soft, group, gradient, for_latent, for_level);
    if (soft.levels == 8) gradients_of_group<8>(soft, group, gradient, for_latent, for_level);
    if (soft.levels == 16) gradients_of_group<16>(soft, group, gradient, for_latent, for_level);
  }
}

void settle(const SoftWeights& soft, int64_t first, int64_t last, float distance, float* settled) {
  for (int64_t group = first; group < last; ++group) {
    if (soft.levels == 2) settle_group<2>(soft, group, distance, settled);
    if (soft.levels == 4) settle_group<4>(soft, group, distance, settled);
    if (soft.levels == 8) settle_group<8>(soft, group, distance, settled);
    if (soft.levels == 16) settle_group<16>(soft, group, distance, settled);
  }
}

}  // namespace elutq::ELUTQ_SOLVER_NAMESPACE
