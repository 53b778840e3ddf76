// The HLQ search of one batch of groups: one group per lane, every loop over lanes an elementwise one. Compiled once
// per instruction set; without reassociation or contraction all builds compute the same bits. Nothing here may be an
// inline function with external linkage, or the linker could keep the copy that needs the widest instructions.
#include "solver/group_search.h"

#include <bit>
#include <cmath>
#include <limits>

#include "solver/search_plan.h"

namespace elutq::ELUTQ_SOLVER_NAMESPACE {
namespace {

constexpr int kLanes = kSearchLanes;

template <typename T>
struct alignas(64) Lanes {
  T v[kLanes];
  T& operator[](int lane) { return v[lane]; }
  const T& operator[](int lane) const { return v[lane]; }
};
using Floats = Lanes<float>;
using Doubles = Lanes<double>;
using Ints = Lanes<int32_t>;

/// Levels of 2^kBits codes and the parameters behind them: scales first, zero last.
template <int kBits>
using Parameters = Lanes<double>[kBits + 1];

/// The groups of a batch in ascending order, ready for any partition into intervals to be summed in O(1).
struct SortedGroups {
  int64_t count;         ///< weights of the longest group; shorter ones end in +inf
  int64_t pivot_step;    ///< distance of the kPivots pivots that a search starts with, a power of two
  const float* x;        ///< [kPivots * pivot_step + pivot_step][kLanes], ascending, +inf past the last weight
  const double* mass;    ///< [count + 1][kLanes], sums of a over the first k weights; nullptr when a = 1
  const double* moment;  ///< [count + 1][kLanes], sums of a * x over the first k weights
  Ints counts;           ///< weights of each group
  Doubles low, high;     ///< smallest and largest weight
  Doubles total;         ///< sum of a
  Doubles square;        ///< sum of a * x^2
};

constexpr int kPivots = 16;

int64_t pivot_step(int64_t stride) {
  int64_t step = 1;
  while (step * kPivots < stride) step *= 2;
  return step;
}

// ---- Sorting ---------------------------------------------------------------------------------------------------

/// Batcher's merge exchange (Knuth, TAOCP 5.2.2, algorithm M): sorts any count with a fixed sequence of exchanges, so
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
        for (int64_t i = block; i < end; ++i) exchange(i, i + d);
      }
      if (q == p) break;
      d = q - p;
      r = p;
    }
  }
}

void sort_lanes(float* x, int64_t count) {
  sort_network(count, [x](int64_t i, int64_t j) {
    float* __restrict a = x + i * kLanes;
    float* __restrict b = x + j * kLanes;
    for (int l = 0; l < kLanes; ++l) {
      const float low = a[l] < b[l] ? a[l] : b[l];
      const float high = a[l] < b[l] ? b[l] : a[l];
      a[l] = low;
      b[l] = high;
    }
  });
}

void sort_lanes_with(float* x, float* importance, int64_t count) {
  sort_network(count, [=](int64_t i, int64_t j) {
    float* __restrict a = x + i * kLanes;
    float* __restrict b = x + j * kLanes;
    float* __restrict u = importance + i * kLanes;
    float* __restrict v = importance + j * kLanes;
    for (int l = 0; l < kLanes; ++l) {
      const bool ordered = a[l] <= b[l];
      const float low = ordered ? a[l] : b[l];
      const float high = ordered ? b[l] : a[l];
      const float first = ordered ? u[l] : v[l];
      const float second = ordered ? v[l] : u[l];
      a[l] = low;
      b[l] = high;
      u[l] = first;
      v[l] = second;
    }
  });
}

/// Where the pieces of the scratch memory begin.
struct Scratch {
  float* x;
  float* importance;
  double* moment;
  double* mass;
  int64_t bytes;

  Scratch(void* memory, int64_t stride) {
    const int64_t rows = pivot_step(stride) * (kPivots + 1);
    auto* base = static_cast<char*>(memory);
    x = reinterpret_cast<float*>(base);
    importance = x + rows * kLanes;
    moment = reinterpret_cast<double*>(importance + rows * kLanes);
    mass = moment + (stride + 1) * kLanes;
    bytes = static_cast<int64_t>((rows * 2 * sizeof(float) + (stride + 1) * 2 * sizeof(double)) * kLanes);
  }
};

SortedGroups sort_groups(const GroupBatch& batch) {
  const Scratch scratch(batch.scratch, batch.stride);
  const bool weighted = batch.importances[0] != nullptr;
  SortedGroups groups;
  groups.count = 1;
  for (int l = 0; l < kLanes; ++l) {
    const int source = l < batch.lanes ? l : 0;  // idle lanes repeat the first group
    groups.counts[l] = static_cast<int32_t>(batch.counts[source]);
    if (batch.counts[source] > groups.count) groups.count = batch.counts[source];
  }
  groups.pivot_step = pivot_step(groups.count);
  const int64_t rows = groups.pivot_step * (kPivots + 1);
  float* x = scratch.x;
  for (int l = 0; l < kLanes; ++l) {
    const int source = l < batch.lanes ? l : 0;
    const float* from = batch.values + source * batch.stride;
    for (int64_t k = 0; k < groups.counts[l]; ++k) x[k * kLanes + l] = from[k];
    for (int64_t k = groups.counts[l]; k < rows; ++k) x[k * kLanes + l] = std::numeric_limits<float>::infinity();
    if (!weighted) continue;
    const float* importance = batch.importances[source];
    for (int64_t k = 0; k < groups.count; ++k) {
      scratch.importance[k * kLanes + l] = k < groups.counts[l] ? importance[k] : 0.0f;
    }
  }
  if (weighted) {
    sort_lanes_with(x, scratch.importance, groups.count);
  } else {
    sort_lanes(x, groups.count);
  }

  Doubles mass{};
  Doubles moment{};
  Doubles square{};
  double* masses = scratch.mass;
  double* moments = scratch.moment;
  for (int l = 0; l < kLanes; ++l) moments[l] = masses[l] = 0.0;
  for (int64_t k = 0; k < groups.count; ++k) {
    for (int l = 0; l < kLanes; ++l) {
      const bool present = k < groups.counts[l];
      const double value = present ? static_cast<double>(x[k * kLanes + l]) : 0.0;
      const double a = weighted ? static_cast<double>(scratch.importance[k * kLanes + l]) : (present ? 1.0 : 0.0);
      mass[l] += a;
      moment[l] += a * value;
      square[l] += a * value * value;
      moments[(k + 1) * kLanes + l] = moment[l];
    }
    if (weighted) {
      for (int l = 0; l < kLanes; ++l) masses[(k + 1) * kLanes + l] = mass[l];
    }
  }
  groups.x = x;
  groups.mass = weighted ? masses : nullptr;
  groups.moment = moments;
  groups.total = mass;
  groups.square = square;
  for (int l = 0; l < kLanes; ++l) {
    groups.low[l] = static_cast<double>(x[l]);
    groups.high[l] = static_cast<double>(x[(groups.counts[l] - 1) * kLanes + l]);
  }
  return groups;
}

// ---- Bit-pattern selection, by partition --------------------------------------------------------------------------

/// Number of weights that are <= threshold.
void count_at_most(const SortedGroups& groups, const Floats& threshold, Ints& position) {
  const int64_t step = groups.pivot_step;
  const float* x = groups.x;
  for (int l = 0; l < kLanes; ++l) position[l] = 0;
  for (int64_t i = 1; i <= kPivots; ++i) {
    const float* pivots = x + (i * step - 1) * kLanes;
    for (int l = 0; l < kLanes; ++l) position[l] += pivots[l] <= threshold[l] ? 1 : 0;
  }
  for (int l = 0; l < kLanes; ++l) position[l] *= static_cast<int32_t>(step);
  for (int32_t s = static_cast<int32_t>(step / 2); s >= 1; s /= 2) {
    for (int l = 0; l < kLanes; ++l) {
      position[l] += x[(position[l] + s - 1) * kLanes + l] <= threshold[l] ? s : 0;
    }
  }
}

/// Sufficient statistics of the weights under each code.
template <int kBits>
struct Cells {
  Doubles mass[1 << kBits];      ///< n_c: sum of a
  Doubles residual[1 << kBits];  ///< r_c: sum of a * (x - level of c)
  Doubles error;                 ///< E
};

/// A level whose last mantissa bits are its code, so that sorting levels sorts codes along; the change, 4 bits out of
/// 52, is far below what matters here.
inline double tag(double level, int code) {
  return std::bit_cast<double>((std::bit_cast<uint64_t>(level) & ~uint64_t{15}) | static_cast<uint64_t>(code));
}

template <int kBits>
void sorted_levels(const Parameters<kBits>& p, Doubles (&levels)[1 << kBits]) {
  for (int l = 0; l < kLanes; ++l) levels[0][l] = p[kBits][l];
  for (int plane = 0; plane < kBits; ++plane) {
    for (int c = 0; c < (1 << plane); ++c) {
      for (int l = 0; l < kLanes; ++l) levels[(1 << plane) + c][l] = levels[c][l] + p[plane][l];
    }
  }
  for (int c = 0; c < (1 << kBits); ++c) {
    for (int l = 0; l < kLanes; ++l) levels[c][l] = tag(levels[c][l], c);
  }
  // Two sorted lists of length n merge by exchanges of distance n, n/2 .. 1 (Batcher).
  for (int n = 1; n < (1 << kBits); n *= 2) {
    for (int begin = 0; begin < (1 << kBits); begin += 2 * n) {
      for (int d = n; d >= 1; d /= 2) {
        for (int i = d == n ? 0 : d; i + d < 2 * n; ++i) {
          if (d != n && (i / d) % 2 == 0) continue;
          Doubles& a = levels[begin + i];
          Doubles& b = levels[begin + i + d];
          for (int l = 0; l < kLanes; ++l) {
            const double low = a[l] < b[l] ? a[l] : b[l];
            const double high = a[l] < b[l] ? b[l] : a[l];
            a[l] = low;
            b[l] = high;
          }
        }
      }
    }
  }
}

inline int code_of(double level) { return static_cast<int>(std::bit_cast<uint64_t>(level) & 15); }

template <int kBits>
void select(const SortedGroups& groups, const Parameters<kBits>& p, Cells<kBits>& cells) {
  constexpr int kCodes = 1 << kBits;
  Doubles levels[kCodes];
  sorted_levels<kBits>(p, levels);
  Doubles mass_below{};
  Doubles moment_below{};
  for (int l = 0; l < kLanes; ++l) cells.error[l] = groups.square[l];
  for (int c = 0; c < kCodes; ++c) {
    Ints position;
    if (c + 1 < kCodes) {
      Floats threshold;
      for (int l = 0; l < kLanes; ++l) threshold[l] = static_cast<float>(0.5 * (levels[c][l] + levels[c + 1][l]));
      count_at_most(groups, threshold, position);
    } else {
      position = groups.counts;
    }
    Doubles mass;
    Doubles residual;
    for (int l = 0; l < kLanes; ++l) {
      const int64_t at = static_cast<int64_t>(position[l]) * kLanes + l;
      const double mass_here = groups.mass != nullptr ? groups.mass[at] : static_cast<double>(position[l]);
      const double moment_here = groups.moment[at];
      mass[l] = mass_here - mass_below[l];
      const double moment = moment_here - moment_below[l];
      residual[l] = moment - mass[l] * levels[c][l];
      cells.error[l] -= levels[c][l] * (moment + residual[l]);
      mass_below[l] = mass_here;
      moment_below[l] = moment_here;
    }
    for (int l = 0; l < kLanes; ++l) {
      const int code = code_of(levels[c][l]);
      cells.mass[code][l] = mass[l];
      cells.residual[code][l] = residual[l];
    }
  }
}

// ---- Linear reconstruction ---------------------------------------------------------------------------------------

/// x rounded to fp16 and limited to its range.
inline double to_half(double x) {
  const double limited = x > kHalfMax ? kHalfMax : (x < -kHalfMax ? -kHalfMax : x);
  int64_t exponent = static_cast<int64_t>(std::bit_cast<uint64_t>(limited) >> 52 & 2047) - 1023;
  exponent = exponent < -14 ? -14 : exponent;
  const double quantum = std::bit_cast<double>(static_cast<uint64_t>(exponent - 10 + 1023) << 52);
  return std::nearbyint(limited / quantum) * quantum;
}

enum class Storage { kExact, kHalf };

/// Bits that a code must have for parameter i to be part of its level: those of plane i, or none for the zero.
template <int kBits>
constexpr int pattern(int i) {
  return i < kBits ? 1 << i : 0;
}

/// Moves p towards the least-squares parameters of the partition, `pace` times the whole way, staying where the cells
/// leave it undetermined. With Storage::kHalf each parameter is rounded as soon as it is known, the zero first and the
/// scales from the largest down, and those still free make up for the rounding. Returns in `gain` how much E falls at
/// pace 1.
template <int kBits, Storage kStorage>
void reconstruct(const SortedGroups& groups, const Cells<kBits>& cells, double pace, Parameters<kBits>& p,
                 Doubles& gain) {
  constexpr int kSize = kBits + 1;
  Doubles normal[kSize][kSize];  // lower triangle
  Doubles right[kSize];
  for (int i = 0; i < kSize; ++i) {
    for (int j = 0; j <= i; ++j) {
      const int both = pattern<kBits>(i) | pattern<kBits>(j);
      normal[i][j] = Doubles{};
      for (int c = 0; c < (1 << kBits); ++c) {
        if ((c & both) != both) continue;
        for (int l = 0; l < kLanes; ++l) normal[i][j][l] += cells.mass[c][l];
      }
    }
    for (int l = 0; l < kLanes; ++l) normal[i][i][l] += kProximity * groups.total[l];
    right[i] = Doubles{};
    for (int c = 0; c < (1 << kBits); ++c) {
      if ((c & pattern<kBits>(i)) != pattern<kBits>(i)) continue;
      for (int l = 0; l < kLanes; ++l) right[i][l] += cells.residual[c][l];
    }
  }

  // normal = L D L^T, L in place of the strict lower triangle; step runs through L^-1 right alongside.
  Doubles step[kSize];
  Doubles inverse[kSize];  // of D
  for (int i = 0; i < kSize; ++i) step[i] = right[i];
  for (int j = 0; j < kSize; ++j) {
    Doubles column[kSize];
    for (int l = 0; l < kLanes; ++l) inverse[j][l] = 1.0 / normal[j][j][l];
    for (int i = j + 1; i < kSize; ++i) {
      column[i] = normal[i][j];
      for (int l = 0; l < kLanes; ++l) normal[i][j][l] = column[i][l] * inverse[j][l];
      for (int k = j + 1; k <= i; ++k) {
        for (int l = 0; l < kLanes; ++l) normal[i][k][l] -= normal[i][j][l] * column[k][l];
      }
      for (int l = 0; l < kLanes; ++l) step[i][l] -= normal[i][j][l] * step[j][l];
    }
  }
  for (int i = kSize - 1; i >= 0; --i) {
    for (int l = 0; l < kLanes; ++l) step[i][l] *= inverse[i][l];
    for (int k = i + 1; k < kSize; ++k) {
      for (int l = 0; l < kLanes; ++l) step[i][l] -= normal[k][i][l] * step[k][l];
    }
    if constexpr (kStorage == Storage::kHalf) {
      for (int l = 0; l < kLanes; ++l) {
        const double moved = p[i][l] + step[i][l];
        step[i][l] = to_half(i < kBits && moved < 0.0 ? 0.0 : moved) - p[i][l];
      }
    }
  }
  for (int l = 0; l < kLanes; ++l) gain[l] = 0.0;
  for (int i = 0; i < kSize; ++i) {
    for (int l = 0; l < kLanes; ++l) gain[l] += right[i][l] * step[i][l];
    for (int l = 0; l < kLanes; ++l) p[i][l] += pace * step[i][l];
  }
}

/// Canonical form: scales >= 0 and ascending.
template <int kBits>
void canonicalize(Parameters<kBits>& p) {
  for (int i = 0; i < kBits; ++i) {
    for (int l = 0; l < kLanes; ++l) p[kBits][l] += p[i][l] < 0.0 ? p[i][l] : 0.0;
    for (int l = 0; l < kLanes; ++l) p[i][l] = std::fabs(p[i][l]);
  }
  for (int end = kBits - 1; end > 0; --end) {
    for (int i = 0; i < end; ++i) {
      for (int l = 0; l < kLanes; ++l) {
        const double low = p[i][l] < p[i + 1][l] ? p[i][l] : p[i + 1][l];
        const double high = p[i][l] < p[i + 1][l] ? p[i + 1][l] : p[i][l];
        p[i][l] = low;
        p[i + 1][l] = high;
      }
    }
  }
}

// ---- Search ------------------------------------------------------------------------------------------------------

/// The best parameters seen of each group.
template <int kBits>
struct Best {
  Parameters<kBits> p;
  Doubles error;

  Best() {
    for (int l = 0; l < kLanes; ++l) error[l] = std::numeric_limits<double>::infinity();
  }

  void offer(const Parameters<kBits>& candidate, const Doubles& candidate_error) {
    Lanes<bool> better;
    for (int l = 0; l < kLanes; ++l) better[l] = candidate_error[l] < error[l];
    for (int l = 0; l < kLanes; ++l) error[l] = better[l] ? candidate_error[l] : error[l];
    for (int i = 0; i <= kBits; ++i) {
      for (int l = 0; l < kLanes; ++l) p[i][l] = better[l] ? candidate[i][l] : p[i][l];
    }
  }
};

/// Alternating optimization from p, offering what each round finds.
template <int kBits>
void alternate(const SortedGroups& groups, int rounds, double pace, Parameters<kBits>& p, Best<kBits>& best) {
  Cells<kBits> cells;
  Doubles gain;
  for (int round = 0; round < rounds; ++round) {
    select<kBits>(groups, p, cells);
    Parameters<kBits> reached;
    for (int i = 0; i <= kBits; ++i) reached[i] = p[i];
    reconstruct<kBits, Storage::kExact>(groups, cells, 1.0, reached, gain);
    // With these cells E falls by the gain; with the best cells for the new parameters, by no less.
    for (int l = 0; l < kLanes; ++l) gain[l] = cells.error[l] - gain[l];
    best.offer(reached, gain);
    for (int i = 0; i <= kBits; ++i) {
      for (int l = 0; l < kLanes; ++l) p[i][l] += pace * (reached[i][l] - p[i][l]);
    }
  }
}

template <int kBits>
void uniform_grid(const SortedGroups& groups, double low_ratio, double high_ratio, Parameters<kBits>& p) {
  for (int l = 0; l < kLanes; ++l) {
    const double a = low_ratio * groups.low[l];
    const double b = high_ratio * groups.high[l];
    // A ratio below 1 can bring the ends of a one-signed group past each other.
    const double low = a < b ? a : b;
    const double high = a < b ? b : a;
    const double step = (high - low) / ((1 << kBits) - 1);
    for (int i = 0; i < kBits; ++i) p[i][l] = step * (1 << i);
    p[kBits][l] = low;
  }
}

template <int kBits>
void best_clipped(const SortedGroups& groups, Best<kBits>& best) {
  Parameters<kBits> p;
  Cells<kBits> cells;
  for (int i = 0; i < kClipRatios; ++i) {
    for (int j = 0; j < kClipRatios; ++j) {
      uniform_grid<kBits>(groups, clip_ratio(i), clip_ratio(j), p);
      select<kBits>(groups, p, cells);
      best.offer(p, cells.error);
    }
  }
}

template <int kBits>
void search_hlq(const SortedGroups& groups, Best<kBits>& best) {
  Parameters<kBits> p;
  Doubles mean;
  Doubles deviation;
  for (int l = 0; l < kLanes; ++l) {
    mean[l] = groups.moment[groups.counts[l] * kLanes + l] / groups.total[l];
    const double variance = groups.square[l] / groups.total[l] - mean[l] * mean[l];
    deviation[l] = std::sqrt(variance > 0.0 ? variance : 0.0);
  }
  const SearchPlan& plan = kSearchPlans[kBits - 1];
  for (int s = 0; s < plan.clip_starts; ++s) {
    uniform_grid<kBits>(groups, plan.clips[s], plan.clips[s], p);
    alternate<kBits>(groups, plan.start_rounds, plan.pace, p, best);
  }
  for (int s = 0; s < plan.shape_starts; ++s) {
    for (int l = 0; l < kLanes; ++l) p[kBits][l] = mean[l];
    for (int i = 0; i < kBits; ++i) {
      for (int l = 0; l < kLanes; ++l) p[i][l] = plan.shapes[s][i] * deviation[l];
      for (int l = 0; l < kLanes; ++l) p[kBits][l] -= 0.5 * p[i][l];
    }
    alternate<kBits>(groups, plan.start_rounds, plan.pace, p, best);
  }
  for (int kick = 0; kick < plan.kicks; ++kick) {
    // Scales change by up to `kick_size`; the middle of the levels moves by up to a fraction of their span.
    Doubles span{};
    p[kBits] = best.p[kBits];
    for (int i = 0; i < kBits; ++i) {
      const double change = plan.kick_size * kick_direction(kick, i);
      for (int l = 0; l < kLanes; ++l) p[i][l] = best.p[i][l] * (1.0 + change);
      for (int l = 0; l < kLanes; ++l) p[kBits][l] -= 0.5 * change * best.p[i][l];
      for (int l = 0; l < kLanes; ++l) span[l] += best.p[i][l];
    }
    const double shift = plan.kick_shift * kick_direction(kick, kBits);
    for (int l = 0; l < kLanes; ++l) p[kBits][l] += shift * span[l];
    alternate<kBits>(groups, plan.kick_rounds, plan.pace, p, best);
  }
  for (int i = 0; i <= kBits; ++i) p[i] = best.p[i];
  alternate<kBits>(groups, plan.final_rounds, 1.0, p, best);
}

// ---- Storage -----------------------------------------------------------------------------------------------------

/// Rounds a uniform grid and keeps it uniform.
template <int kBits>
void store_uniform(Parameters<kBits>& p) {
  constexpr double kTop = 1 << (kBits - 1);
  for (int l = 0; l < kLanes; ++l) {
    const double step = to_half(p[0][l] < kHalfMax / kTop ? p[0][l] : kHalfMax / kTop);
    for (int i = 0; i < kBits; ++i) p[i][l] = step * (1 << i);
    p[kBits][l] = to_half(p[kBits][l]);
  }
}

/// Rounds p to fp16, looking for the parameters that lose least by it.
template <int kBits>
void store(const SortedGroups& groups, Parameters<kBits>& p) {
  Best<kBits> best;
  Cells<kBits> cells;
  Doubles gain;
  canonicalize<kBits>(p);
  for (int attempt = 0; attempt < kStoreRounds; ++attempt) {
    select<kBits>(groups, p, cells);
    if (attempt > 0) best.offer(p, cells.error);
    reconstruct<kBits, Storage::kHalf>(groups, cells, 1.0, p, gain);
  }
  select<kBits>(groups, p, cells);
  best.offer(p, cells.error);
  for (int i = 0; i <= kBits; ++i) p[i] = best.p[i];
  canonicalize<kBits>(p);
}

/// The largest float at or below x, so that for a float w: w > result exactly when w > x.
float round_down(double x) {
  const auto nearest = static_cast<float>(x);
  return static_cast<double>(nearest) > x ? std::nextafterf(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}

/// Codes of the nearest stored levels, of two equally near ones the lower level's.
template <int kBits>
void write_codes(const GroupBatch& batch, const Parameters<kBits>& p, int lane) {
  constexpr int kCodes = 1 << kBits;
  double levels[kCodes];
  int order[kCodes];
  levels[0] = p[kBits][lane];
  for (int plane = 0; plane < kBits; ++plane) {
    for (int c = 0; c < (1 << plane); ++c) levels[(1 << plane) + c] = levels[c] + p[plane][lane];
  }
  for (int c = 0; c < kCodes; ++c) {
    int at = c;
    for (; at > 0 && levels[order[at - 1]] > levels[c]; --at) order[at] = order[at - 1];
    order[at] = c;
  }
  // A weight past a threshold changes from one level's code to the next one's.
  float threshold[kCodes - 1];
  uint8_t change[kCodes - 1];
  for (int j = 0; j + 1 < kCodes; ++j) {
    threshold[j] = round_down((levels[order[j]] + levels[order[j + 1]]) / 2);
    change[j] = static_cast<uint8_t>(order[j] ^ order[j + 1]);
  }
  const float* values = batch.values + lane * batch.stride;
  uint8_t* codes = batch.codes + lane * batch.stride;
  const auto lowest = static_cast<uint8_t>(order[0]);
  for (int64_t k = 0; k < batch.counts[lane]; ++k) {
    uint8_t code = lowest;
    for (int j = 0; j + 1 < kCodes; ++j) code ^= values[k] > threshold[j] ? change[j] : uint8_t{0};
    codes[k] = code;
  }
}

template <int kBits>
void search_bits(GroupBatch& batch) {
  const SortedGroups groups = sort_groups(batch);
  Best<kBits> best;
  Parameters<kBits> p;
  switch (batch.method) {
    case FitMethod::kRtn:
      uniform_grid<kBits>(groups, 1.0, 1.0, p);
      store_uniform<kBits>(p);
      break;
    case FitMethod::kUniform:
      best_clipped<kBits>(groups, best);
      for (int i = 0; i <= kBits; ++i) p[i] = best.p[i];
      store_uniform<kBits>(p);
      break;
    case FitMethod::kAo:
      uniform_grid<kBits>(groups, 1.0, 1.0, p);
      alternate<kBits>(groups, kAoRounds, 1.0, p, best);
      store<kBits>(groups, p);
      break;
    case FitMethod::kHlq:
      search_hlq<kBits>(groups, best);
      for (int i = 0; i <= kBits; ++i) p[i] = best.p[i];
      store<kBits>(groups, p);
      break;
  }
  for (int l = 0; l < batch.lanes; ++l) {
    write_codes<kBits>(batch, p, l);
    for (int i = 0; i < kBits; ++i) batch.scales[l][i] = static_cast<float>(p[i][l]);
    batch.zeros[l] = static_cast<float>(p[kBits][l]);
  }
}

}  // namespace

int64_t scratch_bytes(int64_t stride) { return Scratch(nullptr, stride).bytes; }

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
