#pragma once

namespace elutq {

constexpr double kHalfMax = 65504.0;
/// Weight of the previous parameters in a reconstruction, relative to the group's importance: it decides only what the
/// cells leave undetermined, such as the scale of a plane that no weight uses.
constexpr double kProximity = 1e-7;
constexpr int kAoRounds = 10;
constexpr int kStoreRounds = 2;

/// The uniform baseline tries every pair of these fractions of a group's minimum and maximum.
constexpr int kClipRatios = 15;
constexpr double clip_ratio(int i) { return 1.0 - 0.05 * i; }

struct SearchPlan {
  int clip_starts;
  double clips[4];
  int shape_starts;
  double shapes[6][4];
  int start_rounds;
  int kicks;
  int kick_rounds;
  int final_rounds;
  double kick_size;
  double kick_shift;
  double pace;
};

#ifndef TUNE
constexpr SearchPlan kSearchPlans[4] = {
    {3, {1.0, 0.7, 0.45}, 0, {}, 5, 6, 3, 3, 0.3, 0.1, 1.5},
    {2, {0.9, 0.45}, 2, {{1.04, 2.0}, {2.27, 3.25}}, 4, 12, 3, 3, 0.3, 0.1, 1.5},
    {2, {0.9, 0.5}, 2, {{0.86, 1.51, 1.97}, {1.5, 2.26, 2.99}}, 5, 24, 3, 4, 0.3, 0.1, 1.5},
    {2, {0.9, 0.5}, 2, {{0.54, 1.03, 1.32, 2.07}, {1.61, 1.96, 2.35, 2.98}}, 5, 24, 3, 4, 0.3, 0.1, 1.5},
};
#else
extern SearchPlan kSearchPlans[4];
#endif

/// Direction of parameter i in the given kick, in -1..1: the additive recurrence of the plastic-number family (Roberts,
/// "The unreasonable effectiveness of quasirandom sequences"), which fills the cube evenly.
constexpr double kick_direction(int kick, int i) {
  constexpr double kAlpha[5] = {0.8566748838545029, 0.733891856627126, 0.6287067210378087, 0.5385972572236101,
                                0.4614034006771627};
  const double x = 0.5 + (kick + 1) * kAlpha[i];
  return 2.0 * (x - static_cast<double>(static_cast<int>(x))) - 1.0;
}

}  // namespace elutq
