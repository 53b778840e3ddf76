#pragma once

#include "base/thread_pool.h"
#include "solver/dequantize.h"
#include "solver/hlq_fit.h"

namespace elutq {

struct SquaredError {
  double error = 0.0;  ///< sum of (w - w~)^2
  double norm = 0.0;   ///< sum of w^2
};

/// How far the quantized form of a problem's matrix is from the original, with w~ as docs/format.md defines it. The
/// sums are in double and do not depend on the number of threads. Throws as check_dimensions does.
SquaredError squared_error(const FitProblem& problem, const QuantizedView& matrix, ThreadPool& pool);

}  // namespace elutq
