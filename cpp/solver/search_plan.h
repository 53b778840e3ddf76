#pragma once

/// The constants of the search, the same as in src/elutq/hlq.py; docs/lab.md says how they were found.

#include <cstdint>

namespace elutq {

constexpr double kHalfMax = 65504.0;
/// Weight of the previous parameters in a reconstruction, relative to the group's importance: it decides only what the
/// cells leave undetermined, such as the scale of a plane that no weight uses.
constexpr double kProximity = 1e-7;
/// The same for a scale that is to stay where it is.
constexpr double kFixed = 1e6;
constexpr int kAoRounds = 10;
constexpr int kStoreRounds = 3;

/// The uniform baseline tries every pair of these fractions of a group's minimum and maximum.
constexpr int kClipRatios = 15;
constexpr double clip_ratio(int i) { return 1.0 - 0.05 * i; }

/// How long a step is, in steps of least squares. The full step minimizes E for the present cells only; twice that far
/// E is back where it was, but the borders have moved on, and rounds are saved.
constexpr double kPace = 2.0;
constexpr int kStartRounds = 4;
constexpr int kFinalRounds = 2;
constexpr double kStartClips[] = {1.0, 0.8, 0.5};
constexpr double kNormalQuartiles = 1.349;  ///< between the quartiles of a normal distribution, in standard deviations
/// Most that a kick changes a scale by, relative to it.
constexpr double kKickSize = 0.4;

struct SearchPlan {
  int shape_count;
  double shapes[2][4];  ///< scales of further starts around the mean, in standard deviations
  int kicks;
  int kick_rounds;
  double kick_shift;  ///< most that a kick moves the zero by, relative to the sum of scales
};

constexpr SearchPlan kSearchPlans[] = {
    {1, {{1.6}}, 8, 3, 0.2},
    {1, {{1.04, 2.0}}, 8, 4, 0.15},
    {2, {{0.86, 1.51, 1.97}, {1.5, 2.26, 2.99}}, 16, 6, 0.1},
    {2, {{0.54, 1.03, 1.32, 2.07}, {1.61, 1.96, 2.35, 2.98}}, 24, 6, 0.03},
};

/// Direction of parameter i in a kick, in [-1, 1): an additive recurrence that fills the cube evenly (Roberts 2018,
/// "The unreasonable effectiveness of quasirandom sequences": powers of the root of x^6 = x + 1).
constexpr double kick_direction(int kick, int i) {
  constexpr double kSteps[] = {0.8812714616335696, 0.7766393890897683, 0.6844301295853427, 0.6031687406857283,
                               0.5315553977157914};
  const double x = 0.5 + (kick + 1) * kSteps[i];
  return 2.0 * (x - static_cast<double>(static_cast<int64_t>(x))) - 1.0;
}

}  // namespace elutq
