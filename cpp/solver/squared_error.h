#pragma once

#include <cstdint>

#include "base/thread_pool.h"
#include "solver/hlq_fit.h"

namespace elutq {

/// The quantized form of a matrix: with parameters of fp16, as fit_hlq makes them, or of 8 bits under a scale per row.
struct QuantizedView {
  const uint8_t* planes = nullptr;       ///< [bits][out_features][ceil(in_features / 8)]
  const void* scales = nullptr;          ///< fp16 or uint8 [out_features][groups][bits]
  const void* zeros = nullptr;           ///< fp16 or int8 [out_features][groups]
  const uint16_t* row_scales = nullptr;  ///< fp16 [out_features], or nullptr when parameters are fp16
};

struct SquaredError {
  double error = 0.0;  ///< sum of (w - w~)^2
  double norm = 0.0;   ///< sum of w^2
};

/// How far the quantized form of a problem's matrix is from the original, with w~ as docs/format.md defines it. The
/// sums are in double and do not depend on the number of threads. Throws as check_dimensions does.
SquaredError squared_error(const FitProblem& problem, const QuantizedView& matrix, ThreadPool& pool);

}  // namespace elutq
