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

/// What one row of a matrix stands for, w~ as docs/format.md defines it. Of the problem, dimensions count alone.
/// Writes in_features floats, and zeros up to the next multiple of 8.
void dequantize_row(const FitProblem& problem, const QuantizedView& matrix, int64_t row, float* to);

/// All rows, [out_features][in_features]. Throws as check_dimensions does.
void dequantize(const FitProblem& problem, const QuantizedView& matrix, float* to, ThreadPool& pool);

}  // namespace elutq
