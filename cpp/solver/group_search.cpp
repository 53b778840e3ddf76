// The HLQ search of one batch of groups, one group per lane. Compiled once per instruction set; without reassociation
// or contraction all builds compute the same bits. Everything but the entry points has internal linkage, or the linker
// could keep the copy of an inline function that needs the widest instructions.
#include "solver/group_search.h"

#include <bit>
#include <cmath>
#include <limits>

#include "solver/lanes.h"
#include "solver/search_plan.h"

namespace elutq::ELUTQ_SOLVER_NAMESPACE {
namespace {

/// What is sought: scales p[0 .. kBits-1], zero p[kBits].
template <int kBits>
struct Parameters {
  Doubles at[kBits + 1] = {};

  Doubles& operator[](int i) { return at[i]; }
  const Doubles& operator[](int i) const { return at[i]; }
  Doubles& zero() { return at[kBits]; }
  const Doubles& zero() const { return at[kBits]; }
};

/// The groups of a batch in ascending order, ready for any interval to be summed in O(1).
struct SortedGroups {
  int64_t count;         ///< weights of the longest group; shorter ones end in +inf
  int64_t pivot_step;    ///< distance of the kPivots pivots that a search starts with, a power of two
  const float* x;        ///< [(kPivots + 1) * pivot_step][kLanes], ascending, +inf past the last weight
  const double* mass;    ///< [count + 1][kLanes], sums of a over the first k weights; nullptr when a = 1
  const double* moment;  ///< [count + 1][kLanes], sums of a * x over the first k weights
  Ints ends;             ///< index of [weights of the group][lane] in such an array
  Doubles low, high;     ///< smallest and largest weight
  Doubles lower_quartile, upper_quartile;
  Doubles total;   ///< sum of a
  Doubles square;  ///< sum of a * x^2
};

constexpr int kPivots = 16;

int64_t pivot_step(int64_t count) {
  int64_t step = 1;
  while (step * kPivots < count) step *= 2;
  return step;
}

// ---- Sorting -----------------------------------------------------------------------------------------------------

/// Batcher's merge exchange (Knuth, TAOCP 5.2.2, algorithm M): sorts any count by a fixed sequence of exchanges, so
/// all lanes sort at once.
template <typename Exchange>
void sort_network(int64_t count, const Exchange& exchange) {
  int64_t top = 1;
  while (top * 2 < count) top *= 2;
  for (int64_t p = top; p > 0; p /= 2) {
    int64_t r = 0;
    int64_t d = p;
    for (int64_t q = top;; q /= 2) {
      for (int64_t block = r; block < count - d; block += 2 * p) {
        const int64_t end = block + p < count - d ? block + p : count - d;
        for (int64_t i = block; i < end; ++i) exchange(i * kLanes, (i + d) * kLanes);
      }
      if (q == p) break;
      d = q - p;
      r = p;
    }
  }
}

void sort_lanes(float* x, int64_t count) {
  sort_network(count, [x](int64_t i, int64_t j) {
    const Floats a = Floats::load(x + i);
    const Floats b = Floats::load(x + j);
    min(a, b).store(x + i);
    max(a, b).store(x + j);
  });
}

void sort_lanes_with(float* x, float* importance, int64_t count) {
  sort_network(count, [=](int64_t i, int64_t j) {
    for (int l = 0; l < kLanes; ++l) {
      const bool ordered = x[i + l] <= x[j + l];
      const float low = ordered ? x[i + l] : x[j + l];
      const float high = ordered ? x[j + l] : x[i + l];
      const float first = ordered ? importance[i + l] : importance[j + l];
      const float second = ordered ? importance[j + l] : importance[i + l];
      x[i + l] = low;
      x[j + l] = high;
      importance[i + l] = first;
      importance[j + l] = second;
    }
  });
}

/// Where the pieces of the scratch memory begin.
struct Scratch {
  float* x;
  float* importance;
  double* moment;
  double* mass;

  Scratch(void* memory, int64_t stride) {
    const int64_t rows = value_rows(stride);
    x = static_cast<float*>(memory);
    importance = x + rows * kLanes;
    moment = reinterpret_cast<double*>(importance + rows * kLanes);
    mass = moment + (stride + 1) * kLanes;
  }

  static int64_t value_rows(int64_t stride) { return pivot_step(stride) * (kPivots + 1); }

  static int64_t bytes(int64_t stride) {
    return static_cast<int64_t>((value_rows(stride) * 2 * sizeof(float) + (stride + 1) * 2 * sizeof(double)) * kLanes);
  }
};

SortedGroups sort_groups(const GroupBatch& batch) {
  const Scratch scratch(batch.scratch, batch.stride);
  const bool weighted = batch.importances[0] != nullptr;
  SortedGroups groups;
  groups.count = 1;
  int64_t counts[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    counts[l] = batch.counts[l < batch.lanes ? l : 0];  // idle lanes repeat the first group
    groups.count = counts[l] > groups.count ? counts[l] : groups.count;
    groups.ends.set(l, static_cast<int32_t>(counts[l] * kLanes + l));
  }
  groups.pivot_step = pivot_step(groups.count);
  const int64_t rows = groups.pivot_step * (kPivots + 1);
  float* x = scratch.x;
  for (int l = 0; l < kLanes; ++l) {
    const int source = l < batch.lanes ? l : 0;
    const float* from = batch.values + source * batch.stride;
    for (int64_t k = 0; k < counts[l]; ++k) x[k * kLanes + l] = from[k];
    for (int64_t k = counts[l]; k < rows; ++k) x[k * kLanes + l] = std::numeric_limits<float>::infinity();
    for (int64_t k = 0; k < groups.count; ++k) {
      const float present = k < counts[l] ? 1.0f : 0.0f;
      scratch.importance[k * kLanes + l] = weighted && k < counts[l] ? batch.importances[source][k] : present;
    }
  }
  if (weighted) {
    sort_lanes_with(x, scratch.importance, groups.count);
  } else {
    sort_lanes(x, groups.count);
  }

  Doubles mass = 0.0;
  Doubles moment = 0.0;
  Doubles square = 0.0;
  mass.store(scratch.mass);
  moment.store(scratch.moment);
  for (int64_t k = 0; k < groups.count; ++k) {
    const Doubles a = convert<double>(Floats::load(scratch.importance + k * kLanes));
    // Past a group's end lies +inf with importance 0; limited, their product is 0.
    const Doubles value = min(convert<double>(Floats::load(x + k * kLanes)), Doubles(kHalfMax));
    moment += a * value;
    square += a * value * value;
    mass += a;
    moment.store(scratch.moment + (k + 1) * kLanes);
    if (weighted) mass.store(scratch.mass + (k + 1) * kLanes);
  }
  groups.x = x;
  groups.mass = weighted ? scratch.mass : nullptr;
  groups.moment = scratch.moment;
  groups.total = mass;
  groups.square = square;
  for (int l = 0; l < kLanes; ++l) {
    groups.low.set(l, static_cast<double>(x[l]));
    groups.high.set(l, static_cast<double>(x[(counts[l] - 1) * kLanes + l]));
    groups.lower_quartile.set(l, static_cast<double>(x[counts[l] / 4 * kLanes + l]));
    groups.upper_quartile.set(l, static_cast<double>(x[counts[l] * 3 / 4 * kLanes + l]));
  }
  return groups;
}

// ---- Bit-pattern selection, as a partition -----------------------------------------------------------------------

/// For each threshold, the index in a [][kLanes] array of the first weight above it. Several searches run interleaved,
/// since one alone would wait for its own look-ups.
template <int kCount>
void upper_bounds(const SortedGroups& groups, const Floats* thresholds, Ints* indices) {
  const auto step = static_cast<int32_t>(groups.pivot_step);
  Ints index[kCount];
  for (Ints& each : index) {
    for (int l = 0; l < kLanes; ++l) each.set(l, l);
  }
  for (int i = 1; i <= kPivots; ++i) {
    const Floats pivot = Floats::load(groups.x + (i * step - 1) * kLanes);
    for (int t = 0; t < kCount; ++t) index[t] += where_at_most(pivot, thresholds[t], step * kLanes);
  }
  for (int32_t s = step / 2; s >= 1; s /= 2) {
    const float* middle = groups.x + (s - 1) * kLanes;
    for (int t = 0; t < kCount; ++t) index[t] += where_at_most(gather(middle, index[t]), thresholds[t], s * kLanes);
  }
  for (int t = 0; t < kCount; ++t) indices[t] = index[t];
}

/// Sufficient statistics of the weights under each code.
template <int kBits>
struct Cells {
  Doubles mass[1 << kBits];      ///< sum of a
  Doubles residual[1 << kBits];  ///< sum of a * (x - level of the code)
  Doubles error;                 ///< E
};

void exchange(Doubles& a, Doubles& b) {
  const Doubles low = min(a, b);
  b = max(a, b);
  a = low;
}

/// Levels in ascending order. Where that can differ from the order of codes (bits >= 3, canonical parameters), the
/// code of a level takes the place of its last four mantissa bits, so that sorting levels sorts codes along; the
/// change is far below what matters here.
template <int kBits>
void sorted_levels(const Parameters<kBits>& p, Doubles (&levels)[1 << kBits]) {
  constexpr int kCodes = 1 << kBits;
  levels[0] = p.zero();
  for (int plane = 0; plane < kBits; ++plane) {
    for (int c = 0; c < (1 << plane); ++c) levels[(1 << plane) + c] = levels[c] + p[plane];
  }
  if constexpr (kBits >= 3) {
    for (int c = 0; c < kCodes; ++c) {
      for (int i = 0; i < kParts; ++i) {
        const auto bits = std::bit_cast<Masks::Vector>(levels[c].part[i]);
        levels[c].part[i] = std::bit_cast<Doubles::Vector>((bits & ~int64_t{15}) | int64_t{c});
      }
    }
    // Lists of n merge by exchanges at distance n, n/2 .. 1 (Batcher); those of 1 and 2 are in order already.
    for (int n = 2; n < kCodes; n *= 2) {
      for (int begin = 0; begin < kCodes; begin += 2 * n) {
        for (int i = begin; i < begin + n; ++i) exchange(levels[i], levels[i + n]);
        for (int d = n / 2; d >= 1; d /= 2) {
          for (int i = begin + d; i + d < begin + 2 * n; ++i) {
            if ((i - begin) / d % 2 == 1) exchange(levels[i], levels[i + d]);
          }
        }
      }
    }
  }
}

template <int kBits>
void select_patterns(const SortedGroups& groups, const Parameters<kBits>& p, Cells<kBits>& cells) {
  constexpr int kCodes = 1 << kBits;
  Doubles levels[kCodes];
  sorted_levels<kBits>(p, levels);
  Floats thresholds[kCodes];
  for (int c = 0; c + 1 < kCodes; ++c) thresholds[c] = convert<float>(0.5 * (levels[c] + levels[c + 1]));
  Ints borders[kCodes];
  constexpr int kAtOnce = 4;
  for (int c = 0; c + kAtOnce < kCodes; c += kAtOnce) upper_bounds<kAtOnce>(groups, thresholds + c, borders + c);
  constexpr int kRest = (kCodes - 1) % kAtOnce;
  upper_bounds<kRest>(groups, thresholds + kCodes - 1 - kRest, borders + kCodes - 1 - kRest);
  borders[kCodes - 1] = groups.ends;

  Doubles mass_below = 0.0;
  Doubles moment_below = 0.0;
  cells.error = groups.square;
  for (int c = 0; c < kCodes; ++c) {
    const Doubles mass_here =
        groups.mass == nullptr ? convert<double>(borders[c] / kLanes) : gather(groups.mass, borders[c]);
    const Doubles moment_here = gather(groups.moment, borders[c]);
    const Doubles mass = mass_here - mass_below;
    const Doubles moment = moment_here - moment_below;
    const Doubles residual = moment - mass * levels[c];
    cells.error -= levels[c] * (moment + residual);
    mass_below = mass_here;
    moment_below = moment_here;
    if constexpr (kBits >= 3) {
      for (int l = 0; l < kLanes; ++l) {
        const uint64_t code = std::bit_cast<uint64_t>(levels[c][l]) & 15;
        cells.mass[code].set(l, mass[l]);
        cells.residual[code].set(l, residual[l]);
      }
    } else {
      cells.mass[c] = mass;
      cells.residual[c] = residual;
    }
  }
}

// ---- Linear reconstruction ---------------------------------------------------------------------------------------

/// x limited to fp16's range and rounded to it, half to even.
Doubles to_half(const Doubles& x) {
  const Doubles limited = min(max(x, Doubles(-kHalfMax)), Doubles(kHalfMax));
  Doubles power;  // of 2, at or below |x|
  for (int i = 0; i < kParts; ++i) {
    power.part[i] =
        std::bit_cast<Doubles::Vector>(std::bit_cast<Masks::Vector>(limited.part[i]) & int64_t{0x7ff} << 52);
  }
  const Doubles magic = max(power, Doubles(0x1p-14)) * 0x1.8p42;  // the last bit of a sum with it is fp16's last bit
  return (limited + magic) - magic;
}

/// Bits that a code must have for parameter i to be part of its level: those of plane i, or none for the zero.
template <int kBits>
constexpr int pattern(int i) {
  return i < kBits ? 1 << i : 0;
}

/// Sum over the codes that have all bits of `mask`.
template <int kBits>
Doubles sum_with(const Doubles (&of_code)[1 << kBits], int mask) {
  Doubles sum = 0.0;
  for (int c = 0; c < (1 << kBits); ++c) {
    if ((c & mask) == mask) sum += of_code[c];
  }
  return sum;
}

enum class Precision { kFull, kHalf };

/// Moves p to the least-squares parameters of the partition, staying where the cells leave them undetermined. With
/// Precision::kHalf each parameter is rounded as soon as it is known, the zero first and the scales from the largest
/// down, so that those still free make up for the rounding, and scales at the limit of fp16 stay there. Returns by how
/// much E falls, at full precision.
template <int kBits, Precision kPrecision>
Doubles reconstruct(const SortedGroups& groups, const Cells<kBits>& cells, Parameters<kBits>& p) {
  constexpr int kSize = kBits + 1;
  Doubles normal[kSize][kSize];  // lower triangle
  Doubles right[kSize];
  for (int i = 0; i < kSize; ++i) {
    for (int j = 0; j <= i; ++j) normal[i][j] = sum_with<kBits>(cells.mass, pattern<kBits>(i) | pattern<kBits>(j));
    normal[i][i] += kProximity * groups.total;
    if constexpr (kPrecision == Precision::kHalf) {
      if (i < kBits) normal[i][i] += select(p[i] < Doubles(kHalfMax), 0.0, kFixed * groups.total);
    }
    right[i] = sum_with<kBits>(cells.residual, pattern<kBits>(i));
  }

  // normal = L D L^T, L in place of the strict lower triangle; step runs through L^-1 right alongside.
  Doubles step[kSize];
  Doubles inverse[kSize];  // of D
  for (int i = 0; i < kSize; ++i) step[i] = right[i];
  for (int j = 0; j < kSize; ++j) {
    Doubles column[kSize];
    inverse[j] = 1.0 / normal[j][j];
    for (int i = j + 1; i < kSize; ++i) {
      column[i] = normal[i][j];
      normal[i][j] *= inverse[j];
      for (int k = j + 1; k <= i; ++k) normal[i][k] -= normal[i][j] * column[k];
      step[i] -= normal[i][j] * step[j];
    }
  }
  Doubles gain = 0.0;
  for (int i = kSize - 1; i >= 0; --i) {
    step[i] *= inverse[i];
    for (int k = i + 1; k < kSize; ++k) step[i] -= normal[k][i] * step[k];
    Doubles moved = p[i] + step[i];
    if constexpr (kPrecision == Precision::kHalf) {
      moved = to_half(i < kBits ? max(moved, Doubles(0.0)) : moved);
      step[i] = moved - p[i];
    }
    gain += right[i] * step[i];
    p[i] = moved;
  }
  return gain;
}

/// Canonical form: scales >= 0 and ascending.
template <int kBits>
void canonicalize(Parameters<kBits>& p) {
  for (int i = 0; i < kBits; ++i) {
    p.zero() += min(p[i], Doubles(0.0));
    p[i] = max(p[i], 0.0 - p[i]);
  }
  for (int end = kBits - 1; end > 0; --end) {
    for (int i = 0; i < end; ++i) exchange(p[i], p[i + 1]);
  }
}

// ---- Search ------------------------------------------------------------------------------------------------------

/// The best parameters seen of each group.
template <int kBits>
struct Best {
  Parameters<kBits> p;
  Doubles error = std::numeric_limits<double>::infinity();

  void offer(const Parameters<kBits>& candidate, const Doubles& candidate_error) {
    const Masks better = candidate_error < error;
    error = select(better, candidate_error, error);
    for (int i = 0; i <= kBits; ++i) p[i] = select(better, candidate[i], p[i]);
  }
};

/// Alternating optimization from p, in steps `pace` times as long as least squares asks for. Offers what each round
/// finds.
template <int kBits>
void alternate(const SortedGroups& groups, Parameters<kBits> p, int rounds, double pace, Best<kBits>& best) {
  Cells<kBits> cells;
  for (int round = 0; round < rounds; ++round) {
    canonicalize<kBits>(p);
    select_patterns<kBits>(groups, p, cells);
    Parameters<kBits> reached = p;
    const Doubles gain = reconstruct<kBits, Precision::kFull>(groups, cells, reached);
    // With these cells E falls by the gain; with the best cells for the new parameters, by no less.
    best.offer(reached, cells.error - gain);
    for (int i = 0; i <= kBits; ++i) p[i] += pace * (reached[i] - p[i]);
  }
}

template <int kBits>
Parameters<kBits> uniform_grid(const SortedGroups& groups, double low_ratio, double high_ratio) {
  // A ratio below 1 can bring the ends of a one-signed group past each other.
  const Doubles low = min(low_ratio * groups.low, high_ratio * groups.high);
  const Doubles high = max(low_ratio * groups.low, high_ratio * groups.high);
  const Doubles step = (high - low) / static_cast<double>((1 << kBits) - 1);
  Parameters<kBits> p;
  for (int i = 0; i < kBits; ++i) p[i] = step * static_cast<double>(1 << i);
  p.zero() = low;
  return p;
}

template <int kBits>
void best_clipped(const SortedGroups& groups, Best<kBits>& best) {
  Cells<kBits> cells;
  for (int i = 0; i < kClipRatios; ++i) {
    for (int j = 0; j < kClipRatios; ++j) {
      const Parameters<kBits> p = uniform_grid<kBits>(groups, clip_ratio(i), clip_ratio(j));
      select_patterns<kBits>(groups, p, cells);
      best.offer(p, cells.error);
    }
  }
}

/// Scales of the given shape, in units of `deviation`, with the middle of their levels at `center`.
template <int kBits>
Parameters<kBits> shaped(const double (&shape)[kSearchMaxBits], const Doubles& deviation, const Doubles& center) {
  Parameters<kBits> p;
  p.zero() = center;
  for (int i = 0; i < kBits; ++i) {
    p[i] = shape[i] * deviation;
    p.zero() -= 0.5 * p[i];
  }
  return p;
}

/// A start for groups with an outlier: one plane reaches out to it, the others share the bulk.
template <int kBits>
Parameters<kBits> outlier_start(const SortedGroups& groups) {
  const Doubles middle = 0.5 * (groups.lower_quartile + groups.upper_quartile);
  const Doubles deviation = (groups.upper_quartile - groups.lower_quartile) / kNormalQuartiles;
  const Doubles above = groups.high - middle;
  const Doubles below = middle - groups.low;
  const Parameters<kBits - 1> bulk = shaped<kBits - 1>(kSearchPlans[kBits - 2].shapes[0], deviation, middle);
  Parameters<kBits> p;
  for (int i = 0; i < kBits - 1; ++i) p[i] = bulk[i];
  p[kBits - 1] = max(above, below);
  p.zero() = bulk.zero() - select(above < below, below, 0.0);
  return p;
}

/// Starts of fixed shapes, then kicks: the best parameters so far, disturbed, are the next start.
template <int kBits>
void search_hlq(const SortedGroups& groups, Best<kBits>& best) {
  constexpr const SearchPlan& plan = kSearchPlans[kBits - 1];
  for (const double clip : kStartClips) {
    alternate<kBits>(groups, uniform_grid<kBits>(groups, clip, clip), kStartRounds, kPace, best);
  }
  const Doubles mean = gather(groups.moment, groups.ends) / groups.total;
  const Doubles deviation = sqrt(max(groups.square / groups.total - mean * mean, Doubles(0.0)));
  for (int shape = 0; shape < plan.shape_count; ++shape) {
    alternate<kBits>(groups, shaped<kBits>(plan.shapes[shape], deviation, mean), kStartRounds, kPace, best);
  }
  if constexpr (kBits > 1) alternate<kBits>(groups, outlier_start<kBits>(groups), kStartRounds, kPace, best);
  for (int kick = 0; kick < plan.kicks; ++kick) {
    Parameters<kBits> p = best.p;
    Doubles span = 0.0;
    for (int i = 0; i < kBits; ++i) {
      const Doubles change = kKickSize * kick_direction(kick, i) * best.p[i];
      p[i] += change;
      p.zero() -= 0.5 * change;  // the middle of the levels stays
      span += best.p[i];
    }
    p.zero() += plan.kick_shift * kick_direction(kick, kBits) * span;
    alternate<kBits>(groups, p, plan.kick_rounds, kPace, best);
  }
  alternate<kBits>(groups, best.p, kFinalRounds, 1.0, best);
}

// ---- Storage -----------------------------------------------------------------------------------------------------

/// Rounds a uniform grid to fp16 and keeps it uniform.
template <int kBits>
void store_uniform(Parameters<kBits>& p) {
  constexpr double kTop = 1 << (kBits - 1);
  const Doubles step = to_half(min(p[0], Doubles(kHalfMax / kTop)));
  for (int i = 0; i < kBits; ++i) p[i] = step * static_cast<double>(1 << i);
  p.zero() = to_half(p.zero());
}

/// Rounds p to fp16, so that least is lost.
template <int kBits>
void store(const SortedGroups& groups, Parameters<kBits>& p) {
  Best<kBits> best;
  Cells<kBits> cells;
  for (int round = 0; round < kStoreRounds; ++round) {
    canonicalize<kBits>(p);
    select_patterns<kBits>(groups, p, cells);
    reconstruct<kBits, Precision::kHalf>(groups, cells, p);
    canonicalize<kBits>(p);
    select_patterns<kBits>(groups, p, cells);
    best.offer(p, cells.error);
  }
  p = best.p;
}

/// The largest float at or below x: a float exceeds it exactly when it exceeds x.
float round_down(double x) {
  const auto nearest = static_cast<float>(x);
  return static_cast<double>(nearest) > x ? __builtin_nextafterf(nearest, -std::numeric_limits<float>::infinity())
                                          : nearest;
}

/// Codes of the nearest stored levels; of two equally near ones, the lower level's.
template <int kBits>
void write_codes(const GroupBatch& batch, const Parameters<kBits>& p, int lane) {
  constexpr int kCodes = 1 << kBits;
  double levels[kCodes];
  int order[kCodes];
  levels[0] = p.zero()[lane];
  for (int plane = 0; plane < kBits; ++plane) {
    for (int c = 0; c < (1 << plane); ++c) levels[(1 << plane) + c] = levels[c] + p[plane][lane];
  }
  for (int c = 0; c < kCodes; ++c) {
    int at = c;
    for (; at > 0 && levels[order[at - 1]] > levels[c]; --at) order[at] = order[at - 1];
    order[at] = c;
  }
  // Past each threshold the code changes from one level's to the next one's.
  float threshold[kCodes - 1];
  int32_t change[kCodes - 1];
  for (int j = 0; j + 1 < kCodes; ++j) {
    threshold[j] = round_down((levels[order[j]] + levels[order[j + 1]]) / 2);
    change[j] = order[j] ^ order[j + 1];
  }
  const float* values = batch.values + lane * batch.stride;
  uint8_t* codes = batch.codes + lane * batch.stride;
  for (int64_t k = 0; k < batch.counts[lane]; ++k) {
    int32_t code = order[0];
    for (int j = 0; j + 1 < kCodes; ++j) code ^= values[k] > threshold[j] ? change[j] : 0;
    codes[k] = static_cast<uint8_t>(code);
  }
}

template <int kBits>
void search_bits(GroupBatch& batch) {
  const SortedGroups groups = sort_groups(batch);
  Best<kBits> best;
  Parameters<kBits> p;
  if (batch.method == FitMethod::kRtn) {
    p = uniform_grid<kBits>(groups, 1.0, 1.0);
    store_uniform<kBits>(p);
  } else if (batch.method == FitMethod::kUniform) {
    best_clipped<kBits>(groups, best);
    p = best.p;
    store_uniform<kBits>(p);
  } else {
    if (batch.method == FitMethod::kAo) {
      alternate<kBits>(groups, uniform_grid<kBits>(groups, 1.0, 1.0), kAoRounds, 1.0, best);
    } else {
      search_hlq<kBits>(groups, best);
    }
    p = best.p;
    store<kBits>(groups, p);
  }
  for (int l = 0; l < batch.lanes; ++l) {
    write_codes<kBits>(batch, p, l);
    for (int i = 0; i < kBits; ++i) batch.scales[l][i] = static_cast<float>(p[i][l]);
    batch.zeros[l] = static_cast<float>(p.zero()[l]);
  }
}

}  // namespace

int64_t scratch_bytes(int64_t stride) { return Scratch::bytes(stride); }

void search(GroupBatch& batch) {
  switch (batch.bits) {
    case 1:
      return search_bits<1>(batch);
    case 2:
      return search_bits<2>(batch);
    case 3:
      return search_bits<3>(batch);
    default:
      return search_bits<4>(batch);
  }
}

}  // namespace elutq::ELUTQ_SOLVER_NAMESPACE
