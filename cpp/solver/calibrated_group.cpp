// The solver of calibrated groups, a row in each lane. Compiled once per instruction set, as group_search.cpp is.
#include "solver/calibrated_group.h"

#include "solver/vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace elutq::ELUTQ_SOLVER_NAMESPACE {
namespace {

constexpr int kVectors = 4;  // side by side: what a strip needs of 128 columns fits the second cache
constexpr int kRows = kLanes * kVectors;
constexpr int64_t kBlock = 32;  // columns whose changes reach the others together
constexpr float kHalfMax = 65504.0f;
/// Weight of the present parameters in least squares, as in src/elutq/group_problem.py.
constexpr double kProximity = 1e-6;

/// A number for each row of a strip: of a column, a level, a parameter.
template <typename Vector>
struct Each {
  Vector part[kVectors];
};
using Column = Each<Floats>;
using Codes = Each<Ints>;

/// a b + c, rounded once where there is an instruction for it.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline Floats where(Ints mask, Floats value) { return Floats(Ints(value) & mask); }

inline Floats limit(Floats x, float least, float most) {
  x = x > least ? x : Floats{} + least;
  return x < most ? x : Floats{} + most;
}

/// x limited to fp16's range and rounded to it, half to even.
Floats to_half(Floats x) {
  const Ints sign = Ints(x) & INT32_MIN;
  const Floats magnitude = Floats(Ints(limit(x, -kHalfMax, kHalfMax)) & INT32_MAX);
  const Floats subnormal = (magnitude + 0.5f) - 0.5f;  // a float there has fp16's last bit
  const Ints bits = Ints(magnitude);
  const Floats normal = Floats((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fff);
  return Floats(Ints(magnitude < 0x1p-14f ? subnormal : normal) | sign);
}

/// x rounded to the nearest integer, half to even; |x| < 2^22.
inline Floats to_integer(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  return (x + kRound) - kRound;
}

/// Registers that hold sums beside each other: four columns of two or four vectors.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kTileVectors = 2;
#else
constexpr int kTileVectors = 4;
#endif

/// to_j (+)= the sum of a_jk from_k over k < count, for kColumns columns j and some vectors of rows.
template <int kColumns>
inline void multiply_tile(const float* a, int64_t stride, int64_t count, const Column* from, Column* to, int first,
                          bool add) {
  Floats sums[kColumns][kTileVectors];
  for (int j = 0; j < kColumns; ++j) {
    for (int v = 0; v < kTileVectors; ++v) sums[j][v] = add ? to[j].part[first + v] : Floats{};
  }
  for (int64_t k = 0; k < count; ++k) {
    for (int j = 0; j < kColumns; ++j) {
      const Floats factor = Floats{} + a[j * stride + k];
      for (int v = 0; v < kTileVectors; ++v) {
        sums[j][v] = multiply_add(factor, from[k].part[first + v], sums[j][v]);
      }
    }
  }
  for (int j = 0; j < kColumns; ++j) {
    for (int v = 0; v < kTileVectors; ++v) to[j].part[first + v] = sums[j][v];
  }
}

/// to (+)= a from: a is [columns][count], its rows `stride` apart.
void multiply(const float* a, int64_t stride, int64_t columns, int64_t count, const Column* from, Column* to,
              bool add = false) {
  constexpr int kTile = 4;
  for (int first = 0; first < kVectors; first += kTileVectors) {
    int64_t j = 0;
    for (; j + kTile <= columns; j += kTile) {
      multiply_tile<kTile>(a + j * stride, stride, count, from, to + j, first, add);
    }
    for (; j < columns; ++j) multiply_tile<1>(a + j * stride, stride, count, from, to + j, first, add);
  }
}

/// Where a strip lies in arrays [columns][rows]. Lanes without a row are 0.
struct Strip {
  int64_t first;
  int64_t stride;
  int rows;

  Column load(const float* from, int64_t column) const {
    Column loaded{};
    from += column * stride + first;
    if (rows == kRows) {
      __builtin_memcpy(&loaded, from, sizeof(loaded));
    } else {
      for (int i = 0; i < rows; ++i) loaded.part[i / kLanes][i % kLanes] = from[i];
    }
    return loaded;
  }

  void store(const Column& column, float* to, int64_t index) const {
    to += index * stride + first;
    if (rows == kRows) {
      __builtin_memcpy(to, &column, sizeof(column));
    } else {
      for (int i = 0; i < rows; ++i) to[i] = column.part[i / kLanes][i % kLanes];
    }
  }
};

/// A strip: the iterate and the best of each row so far.
template <int kBits>
class Solver {
 public:
  static constexpr int kLevels = 1 << kBits;
  static constexpr int64_t kScratch = 6 + kBits;  // Columns for each of the group's

  Solver(const CalibratedStrips& strips, int64_t index)
      : group_(strips.group), columns_(group_.columns), metric_sums_(strips.metric_sums) {
    const int64_t left = group_.rows - index * kRows;
    strip_ = {index * kRows, group_.rows, static_cast<int>(left < kRows ? left : kRows)};
    auto* scratch = reinterpret_cast<Column*>(strips.scratch);
    target_ = scratch;
    values_ = scratch + columns_;
    gradient_ = scratch + 2 * columns_;
    work_ = scratch + 3 * columns_;
    codes_ = reinterpret_cast<Codes*>(scratch + 4 * columns_);
    best_codes_ = reinterpret_cast<Codes*>(scratch + 5 * columns_);
    for (int p = 0; p < kBits; ++p) moved_[p] = scratch + (6 + p) * columns_;
    for (int64_t j = 0; j < columns_; ++j) metric_total_ += double{metric_sums_[j]};
  }

  void run() {
    for (int64_t j = 0; j < columns_; ++j) target_[j] = strip_.load(group_.target, j);
    if (group_.row_scales != nullptr) row_scales_ = strip_.load(group_.row_scales, 0);
    for (int p = 0; p <= kBits; ++p) parameters_[p] = strip_.load(group_.parameters, p);
    make_storable();
    find_levels();
    if (group_.resume) {
      resume();
    } else if (group_.feedback != nullptr) {
      feed_back();
    } else {
      for (int64_t j = 0; j < columns_; ++j) choose(target_[j], j);
    }
    for (int64_t j = 0; j < columns_; ++j) {
      for (int v = 0; v < kVectors; ++v) work_[j].part[v] = target_[j].part[v] - values_[j].part[v];
    }
    multiply(group_.metric, columns_, columns_, columns_, work_, gradient_);
    settle(true);
    for (int round = 0; round < group_.rounds; ++round) {
      for (int i = 0; i < group_.descents; ++i) descend();
      if (group_.descents > 0) settle();
      refit();
      settle();
    }
    write_best();
  }

 private:
  void resume() {
    for (int64_t j = 0; j < columns_; ++j) {
      codes_[j] = {};
      const uint8_t* from = group_.codes + j * strip_.stride + strip_.first;
      for (int i = 0; i < strip_.rows; ++i) codes_[j].part[i / kLanes][i % kLanes] = from[i];
      values_[j] = value_of(codes_[j], parameters_);
    }
  }

  /// Column by column, V^T (x - q) of those before added to the target.
  void feed_back() {
    for (int64_t first = 0; first < columns_; first += kBlock) {
      const int64_t end = first + kBlock < columns_ ? first + kBlock : columns_;
      multiply(group_.feedback + first * columns_, columns_, end - first, first, work_, gradient_ + first);
      for (int64_t j = first; j < end; ++j) {
        const float* row = group_.feedback + j * columns_;
        choose(wanted(target_[j], gradient_[j], row + first, j - first, work_ + first, row[j]), j);
        for (int v = 0; v < kVectors; ++v) work_[j].part[v] = target_[j].part[v] - values_[j].part[v];
      }
    }
  }

  /// Column by column, the best level with all others fixed. Keeps the gradient.
  void descend() {
    for (int64_t first = 0; first < columns_; first += kBlock) {
      const int64_t end = first + kBlock < columns_ ? first + kBlock : columns_;
      for (int64_t j = first; j < end; ++j) {
        const float* row = group_.metric + j * columns_;
        const Column before = values_[j];
        choose(wanted(before, gradient_[j], row + first, j - first, work_, row[j]), j);
        for (int v = 0; v < kVectors; ++v) work_[j - first].part[v] = before.part[v] - values_[j].part[v];
      }
      multiply(group_.metric + first, columns_, columns_, end - first, work_, gradient_, true);
    }
  }

  /// base + (pull + the sum of factor_i change_i) / diagonal
  static Column wanted(const Column& base, Column pull, const float* factor, int64_t count, const Column* change,
                       float diagonal) {
    for (int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        pull.part[v] = multiply_add(Floats{} + factor[i], change[i].part[v], pull.part[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) pull.part[v] = base.part[v] + pull.part[v] * (1.0f / diagonal);
    return pull;
  }

  /// Column j takes the level nearest to what is wanted.
  void choose(const Column& wanted, int64_t j) {
    for (int v = 0; v < kVectors; ++v) {
      Floats value = levels_[0].part[v];
      Ints code = level_codes_[0].part[v];
      for (int i = 1; i < kLevels; ++i) {
        const Ints above = wanted.part[v] > borders_[i].part[v];
        value = above ? levels_[i].part[v] : value;
        code = above ? level_codes_[i].part[v] : code;
      }
      values_[j].part[v] = value;
      codes_[j].part[v] = code;
    }
  }

  static Column value_of(const Codes& codes, const Column* parameters) {
    Column value = parameters[kBits];
    for (int p = 0; p < kBits; ++p) {
      for (int v = 0; v < kVectors; ++v) value.part[v] += where(has(codes, v, p), parameters[p].part[v]);
    }
    return value;
  }

  /// Where codes have a plane: -1, elsewhere 0.
  static Ints has(const Codes& codes, int v, int plane) { return -(codes.part[v] >> plane & 1); }

  /// Remember the rows whose loss (x - q)^T M (x - q) is lower than ever; at first all.
  void settle(bool first = false) {
    Codes better;
    bool any = false;
    for (int v = 0; v < kVectors; ++v) {
      Floats loss{};
      for (int64_t j = 0; j < columns_; ++j) {
        loss = multiply_add(target_[j].part[v] - values_[j].part[v], gradient_[j].part[v], loss);
      }
      better.part[v] = first ? Ints{} - 1 : loss < best_loss_.part[v];
      best_loss_.part[v] = better.part[v] ? loss : best_loss_.part[v];
      for (int l = 0; l < kLanes; ++l) any = any || better.part[v][l] != 0;
    }
    if (!any) return;
    for (int v = 0; v < kVectors; ++v) {
      for (int p = 0; p <= kBits; ++p) {
        best_parameters_[p].part[v] = better.part[v] ? parameters_[p].part[v] : best_parameters_[p].part[v];
      }
    }
    for (int64_t j = 0; j < columns_; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        best_codes_[j].part[v] = better.part[v] ? codes_[j].part[v] : best_codes_[j].part[v];
      }
    }
  }

  /// Least squares for the parameters in the metric, codes fixed. Keeps the gradient: it is M x less, for each
  /// parameter, what M makes of its plane.
  void refit() {
    for (int p = 0; p < kBits; ++p) {
      for (int64_t j = 0; j < columns_; ++j) {
        for (int v = 0; v < kVectors; ++v) work_[j].part[v] = where(has(codes_[j], v, p), Floats{} + 1.0f);
      }
      multiply(group_.metric, columns_, columns_, columns_, work_, moved_[p]);
    }
    Column before[kBits + 1];
    for (int p = 0; p <= kBits; ++p) before[p] = parameters_[p];
    for (int v = 0; v < kVectors; ++v) step(v);
    make_canonical();
    make_storable();
    Column after[kBits + 1];  // for the codes and planes as they were
    undo_canonical(after);
    for (int v = 0; v < kVectors; ++v) {
      Floats change[kBits + 1];
      for (int p = 0; p <= kBits; ++p) change[p] = before[p].part[v] - after[p].part[v];
      for (int64_t j = 0; j < columns_; ++j) {
        Floats gradient = multiply_add(change[kBits], Floats{} + metric_sums_[j], gradient_[j].part[v]);
        for (int p = 0; p < kBits; ++p) gradient = multiply_add(change[p], moved_[p][j].part[v], gradient);
        gradient_[j].part[v] = gradient;
      }
    }
    move_codes();
    find_levels();
    for (int64_t j = 0; j < columns_; ++j) values_[j] = value_of(codes_[j], parameters_);
  }

  /// Adds the step of least squares to the parameters.
  void step(int v) {
    Floats normal[kBits][kBits] = {};
    Floats ones[kBits] = {};
    Floats right[kBits + 1] = {};
    for (int64_t j = 0; j < columns_; ++j) {
      const Floats gradient = gradient_[j].part[v];
      right[kBits] += gradient;
      for (int p = 0; p < kBits; ++p) {
        const Ints mask = has(codes_[j], v, p);
        right[p] += where(mask, gradient);
        ones[p] += where(mask, Floats{} + metric_sums_[j]);
        for (int other = 0; other <= p; ++other) normal[other][p] += where(mask, moved_[other][j].part[v]);
      }
    }
    constexpr int kCount = kBits + 1;
    for (int l = 0; l < kLanes; ++l) {
      double a[kCount][kCount];
      double b[kCount];
      double trace = metric_total_;
      for (int p = 0; p < kBits; ++p) {
        for (int other = 0; other <= p; ++other) a[other][p] = double{normal[other][p][l]};
        a[p][kBits] = double{ones[p][l]};
        b[p] = double{right[p][l]};
        trace += a[p][p];
      }
      a[kBits][kBits] = metric_total_;
      b[kBits] = double{right[kBits][l]};
      for (int p = 0; p < kCount; ++p) a[p][p] += kProximity / kCount * trace;
      if (!solve(a, b)) continue;
      for (int p = 0; p < kCount; ++p) parameters_[p].part[v][l] += static_cast<float>(b[p]);
    }
  }

  /// b becomes a^-1 b, a symmetric and given by its upper triangle; false unless it is positive definite.
  template <int kCount>
  static bool solve(double (&a)[kCount][kCount], double (&b)[kCount]) {
    for (int i = 0; i < kCount; ++i) {
      if (!(a[i][i] > 0.0)) return false;
      for (int j = i + 1; j < kCount; ++j) {
        const double factor = a[i][j] / a[i][i];
        for (int k = j; k < kCount; ++k) a[j][k] -= factor * a[i][k];
        b[j] -= factor * b[i];
      }
    }
    for (int i = kCount - 1; i >= 0; --i) {
      for (int j = i + 1; j < kCount; ++j) b[i] -= a[i][j] * b[j];
      b[i] /= a[i][i];
    }
    return true;
  }

  /// Scales >= 0 and ascending; `source_` and `negative_` say what became of the planes.
  void make_canonical() {
    for (int v = 0; v < kVectors; ++v) {
      for (int p = 0; p < kBits; ++p) {
        Floats& scale = parameters_[p].part[v];
        const Ints negative = scale < 0.0f;
        parameters_[kBits].part[v] += where(negative, scale);
        scale = Floats(Ints(scale) & INT32_MAX);
        source_[p].part[v] = Ints{} + p;
        negative_[p].part[v] = negative;
      }
      for (int sorted = kBits - 1; sorted > 0; --sorted) {
        for (int p = 0; p < sorted; ++p) {
          const Ints swap = parameters_[p].part[v] > parameters_[p + 1].part[v];
          swap_where(swap, parameters_[p].part[v], parameters_[p + 1].part[v]);
          swap_where(swap, source_[p].part[v], source_[p + 1].part[v]);
          swap_where(swap, negative_[p].part[v], negative_[p + 1].part[v]);
        }
      }
    }
  }

  template <typename Vector>
  static void swap_where(Ints mask, Vector& a, Vector& b) {
    const Vector old = a;
    a = mask ? b : a;
    b = mask ? old : b;
  }

  void make_storable() {
    for (int p = 0; p <= kBits; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        Floats& value = parameters_[p].part[v];
        if (group_.row_scales == nullptr) {
          value = to_half(value);
          continue;
        }
        const Floats unit = row_scales_.part[v];
        const Ints some = unit > 0.0f;
        const Floats units = where(some, value) / (some ? unit : Floats{} + 1.0f);
        value = unit * to_integer(p < kBits ? limit(units, 0.0f, 255.0f) : limit(units, -128.0f, 127.0f));
      }
    }
  }

  /// Parameters for which codes as they were before make_canonical() stand for the same values.
  void undo_canonical(Column (&former)[kBits + 1]) const {
    for (int v = 0; v < kVectors; ++v) {
      former[kBits].part[v] = parameters_[kBits].part[v];
      for (int p = 0; p < kBits; ++p) former[p].part[v] = Floats{};
      for (int q = 0; q < kBits; ++q) {
        const Floats scale = parameters_[q].part[v];
        const Ints negative = negative_[q].part[v];
        former[kBits].part[v] += where(negative, scale);
        for (int p = 0; p < kBits; ++p) {
          former[p].part[v] += where(source_[q].part[v] == p, negative ? -scale : scale);
        }
      }
    }
  }

  /// Codes follow their planes.
  void move_codes() {
    Ints moved{};
    for (int v = 0; v < kVectors; ++v) {
      for (int p = 0; p < kBits; ++p) moved |= negative_[p].part[v] | (source_[p].part[v] != p);
    }
    bool any = false;
    for (int l = 0; l < kLanes; ++l) any = any || moved[l] != 0;
    if (!any) return;
    for (int64_t j = 0; j < columns_; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        Ints code{};
        for (int p = 0; p < kBits; ++p) {
          code |= ((codes_[j].part[v] >> source_[p].part[v] ^ negative_[p].part[v]) & 1) << p;
        }
        codes_[j].part[v] = code;
      }
    }
  }

  /// Levels in ascending order, their codes, and the borders between them.
  void find_levels() {
    for (int i = 0; i < kLevels; ++i) {
      for (int v = 0; v < kVectors; ++v) level_codes_[i].part[v] = Ints{} + i;
      levels_[i] = value_of(level_codes_[i], parameters_);
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int sorted = kLevels - 1; sorted > 0; --sorted) {
        for (int i = 0; i < sorted; ++i) {
          const Ints swap = levels_[i].part[v] > levels_[i + 1].part[v];
          swap_where(swap, levels_[i].part[v], levels_[i + 1].part[v]);
          swap_where(swap, level_codes_[i].part[v], level_codes_[i + 1].part[v]);
        }
      }
      for (int i = 1; i < kLevels; ++i) {
        borders_[i].part[v] = (levels_[i - 1].part[v] + levels_[i].part[v]) * 0.5f;
      }
    }
  }

  void write_best() const {
    for (int p = 0; p <= kBits; ++p) strip_.store(best_parameters_[p], group_.parameters, p);
    for (int64_t j = 0; j < columns_; ++j) {
      uint8_t* to = group_.codes + j * strip_.stride + strip_.first;
      for (int i = 0; i < strip_.rows; ++i) to[i] = static_cast<uint8_t>(best_codes_[j].part[i / kLanes][i % kLanes]);
      strip_.store(value_of(best_codes_[j], best_parameters_), group_.values, j);
    }
  }

  const CalibratedGroup& group_;
  const int64_t columns_;
  const float* metric_sums_;
  double metric_total_ = 0.0;
  Strip strip_;
  Column row_scales_{};

  Column parameters_[kBits + 1];
  Column levels_[kLevels];      // ascending
  Column borders_[kLevels];     // borders_[i] lies below levels_[i]; the first is not used
  Codes level_codes_[kLevels];  // of levels_
  Codes source_[kBits];         // the plane that each one was
  Codes negative_[kBits];       // -1 where its bits have changed
  Column best_loss_;
  Column best_parameters_[kBits + 1];

  // [columns] each, in scratch memory: as many as kScratch says.
  Column* target_;
  Column* values_;
  Column* gradient_;  // M (x - q)
  Column* work_;
  Column* moved_[kBits];  // M b of each plane's bits b
  Codes* codes_;
  Codes* best_codes_;
};

template <int kBits>
void solve(const CalibratedStrips& strips) {
  for (int64_t index = strips.begin; index < strips.end; ++index) Solver<kBits>(strips, index).run();
}

}  // namespace

int64_t calibrated_rows() { return kRows; }

int64_t calibrated_scratch(const CalibratedGroup& group) {
  const int64_t arrays = Solver<1>::kScratch + group.bits - 1;
  return arrays * group.columns * static_cast<int64_t>(sizeof(Column));
}

void solve_strips(const CalibratedStrips& strips) {
  if (strips.group.bits == 1) solve<1>(strips);
  if (strips.group.bits == 2) solve<2>(strips);
  if (strips.group.bits == 3) solve<3>(strips);
  if (strips.group.bits == 4) solve<4>(strips);
}

}  // namespace elutq::ELUTQ_SOLVER_NAMESPACE
