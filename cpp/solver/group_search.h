#pragma once

#include <cstdint>

namespace elutq {

inline constexpr int kSearchLanes = 16;  ///< groups solved side by side, one per vector lane
inline constexpr int kSearchMaxBits = 4;

/// How (s, z) of a group is found. See hlq_fit.h for what each one is.
enum class FitMethod { kHlq, kAo, kUniform, kRtn };

/// Up to kSearchLanes groups of weights and what is found for them. Memory is owned by the caller.
struct GroupBatch {
  int bits = 0;
  FitMethod method = FitMethod::kHlq;
  int lanes = 0;                                ///< groups present; the others are ignored
  int64_t stride = 0;                           ///< weights from one group to the next in `values`, >= every count
  int64_t counts[kSearchLanes] = {};            ///< weights of each group, >= 1
  const float* values = nullptr;                ///< [lanes][stride], finite, within +-65504
  const float* importances[kSearchLanes] = {};  ///< [count] per group, not all zero; nullptr for all groups: all ones
  void* scratch = nullptr;                      ///< scratch_bytes(stride), aligned to 64 bytes

  uint8_t* codes = nullptr;                    ///< out: [lanes][stride]
  float scales[kSearchLanes][kSearchMaxBits];  ///< out: representable in fp16, ascending, >= 0
  float zeros[kSearchLanes];                   ///< out: representable in fp16
};

// The builds for each instruction set, all of which return the same bits. search solves a batch; scratch_bytes is
// what a batch of that stride needs.
namespace solver_generic {
void search(GroupBatch& batch);
int64_t scratch_bytes(int64_t stride);
}  // namespace solver_generic
#if defined(__x86_64__)
namespace solver_avx2 {
void search(GroupBatch& batch);
int64_t scratch_bytes(int64_t stride);
}  // namespace solver_avx2
namespace solver_avx512 {
void search(GroupBatch& batch);
int64_t scratch_bytes(int64_t stride);
}  // namespace solver_avx512
#endif

}  // namespace elutq
