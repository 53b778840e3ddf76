#pragma once

/// Data-free HLQ quantization of one matrix; src/elutq/hlq.py states the problem and is the reference.
///
/// WHY IT IS FAST
///
/// Given levels, each weight belongs to the nearest one. In sorted order that is a partition into at most 2^bits
/// intervals. So a group is sorted once, with running sums of a, a*x beside it; afterwards one round of alternating
/// optimization, whatever the group's size, costs 2^bits - 1 binary searches for the borders between intervals, two
/// lookups per border for the sufficient statistics, and one solve of order bits + 1. That makes many starts
/// affordable. Sixteen groups go side by side, one per vector lane: sorting is a network of exchanges, so it too runs
/// in lanes.

#include <cstdint>

#include "base/thread_pool.h"
#include "solver/group_search.h"

namespace elutq {

enum class WeightType { kFloat32, kFloat16, kBFloat16 };

struct FitProblem {
  const void* weights = nullptr;  ///< [out_features][in_features] of `type`
  WeightType type = WeightType::kFloat32;
  int64_t out_features = 0;
  int64_t in_features = 0;
  int bits = 0;            ///< 1 to 4
  int64_t group_size = 0;  ///< in columns, a multiple of 8 unless it is in_features
  FitMethod method = FitMethod::kHlq;
  const float* importance = nullptr;  ///< [in_features], >= 0, not all zero in any group; nullptr: all ones
};

struct FitOutput {
  uint8_t* planes = nullptr;   ///< [bits][out_features][ceil(in_features / 8)]
  uint16_t* scales = nullptr;  ///< fp16 [out_features][groups][bits]
  uint16_t* zeros = nullptr;   ///< fp16 [out_features][groups]
};

/// Throws std::invalid_argument when a dimension is outside what is stated above.
void check_dimensions(const FitProblem& problem);

/// Quantizes a matrix. Returns the largest magnitude among the weights; or, when some are NaN, infinite or beyond the
/// 65504 that HLQ parameters reach, the magnitude of one of them, and then the output is incomplete. Neither output nor
/// return value depends on the number of threads or on the instruction set. Throws std::invalid_argument when a
/// dimension is outside what is stated above.
float fit_hlq(const FitProblem& problem, const FitOutput& output, ThreadPool& pool);

}  // namespace elutq
