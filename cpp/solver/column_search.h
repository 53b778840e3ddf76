#pragma once

#include <cstdint>

namespace elutq {

inline constexpr int kColumnSearchColumns = 32;  ///< most columns of a search
inline constexpr int kColumnSearchMaxBits = 4;

/// Columns whose codes are chosen one after the other. For each column j in turn
///
///     q_j = the level nearest to b_j + p_j / D_jj,    then    p_k += D_jk (b_j - q_j) for every column k
///
/// which is a step of error feedback or of coordinate descent; src/elutq/group_problem.py says when, and is the
/// reference. Arrays are [columns][rows]; rows are independent of each other. Memory is owned by the caller.
struct ColumnSearch {
  int64_t columns = 0;  ///< 1 to kColumnSearchColumns
  int64_t rows = 0;
  int bits = 0;                          ///< 1 to 4
  const float* levels = nullptr;         ///< [2^bits][rows], ascending
  const uint8_t* level_codes = nullptr;  ///< [2^bits][rows], code of each level
  const float* matrix = nullptr;         ///< D, [columns][columns], its diagonal not 0
  const float* base = nullptr;           ///< b; may be `values`
  float* pull = nullptr;                 ///< p; in and out
  float* values = nullptr;               ///< out: q
  uint8_t* codes = nullptr;              ///< out: their codes
  float* errors = nullptr;               ///< out: b - q
};

// The builds for each instruction set, all of which return the same bits.
namespace solver_generic {
void search_columns(const ColumnSearch& search);
}
#if defined(__x86_64__)
namespace solver_avx2 {
void search_columns(const ColumnSearch& search);
}
namespace solver_avx512 {
void search_columns(const ColumnSearch& search);
}
#endif

}  // namespace elutq
