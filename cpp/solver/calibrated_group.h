#pragma once

#include <cstdint>

namespace elutq {

inline constexpr int kCalibratedMaxBits = 4;

/// One group of columns of a matrix in the metric of a Hessian, for every row
///
///     min (x - q)^T M (x - q)    over codes and parameters, q_j = zero + the scales of the planes that code j has
///
/// by the steps of src/elutq/group_problem.py, which is the reference: error feedback or a known solution, then rounds
/// of coordinate descents on the codes and least squares for the parameters, the best iterate of each row kept. Arrays
/// are [columns][rows]; rows are independent of each other. Memory is owned by the caller.
struct CalibratedGroup {
  int64_t columns = 0;
  int64_t rows = 0;
  int bits = 0;                     ///< 1 to kCalibratedMaxBits
  const float* target = nullptr;    ///< x
  const float* metric = nullptr;    ///< M, [columns][columns], symmetric, its diagonal positive
  const float* feedback = nullptr;  ///< V^T, lower triangular, M = V V^T; without it each code is nearest to its target
  const float* row_scales = nullptr;  ///< [rows], fp16 values: parameters are bytes in these units; without, fp16
  bool resume = false;  ///< `codes` and `parameters` are a solution to begin with, which `feedback` is not
  int rounds = 0;
  int descents = 0;             ///< in each round
  float* parameters = nullptr;  ///< [bits + 1][rows], scales and, last, zero; in: the start, out: scales ascend from 0
  uint8_t* codes = nullptr;     ///< out; in with `resume`
  float* values = nullptr;      ///< out: q
};

/// Some rows of a group: strips of so many rows as a build works on side by side.
struct CalibratedStrips {
  const CalibratedGroup& group;
  const float* metric_sums;  ///< of M's rows, [columns]
  int64_t begin;             ///< first strip
  int64_t end;
  uint8_t* scratch;  ///< calibrated_scratch(group) bytes, aligned to a cache line
};

// The builds for each instruction set: rows of a strip, bytes of scratch memory, and the solver.
#define ELUTQ_CALIBRATED_BUILD(isa)                           \
  namespace solver_##isa {                                    \
    int64_t calibrated_rows();                                \
    int64_t calibrated_scratch(const CalibratedGroup& group); \
    void solve_strips(const CalibratedStrips& strips);        \
  }
ELUTQ_CALIBRATED_BUILD(generic)
#if defined(__x86_64__)
ELUTQ_CALIBRATED_BUILD(avx2)
ELUTQ_CALIBRATED_BUILD(avx512)
#endif
#undef ELUTQ_CALIBRATED_BUILD

}  // namespace elutq
