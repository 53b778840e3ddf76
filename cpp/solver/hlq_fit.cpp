#include "solver/hlq_fit.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "base/aligned.h"
#include "base/cpu_features.h"
#include "base/half.h"

namespace elutq {
namespace {

constexpr float kLargestWeight = 65504.0f;

struct SearchBuild {
  void (*search)(GroupBatch& batch);
  int64_t (*scratch_bytes)(int64_t stride);
};

SearchBuild best_build() {
#if defined(__x86_64__)
  if (cpu_features().avx512) return {solver_avx512::search, solver_avx512::scratch_bytes};
  if (cpu_features().avx2) return {solver_avx2::search, solver_avx2::scratch_bytes};
#endif
  return {solver_generic::search, solver_generic::scratch_bytes};
}

void load(const FitProblem& problem, int64_t offset, int64_t count, float* to) {
  if (problem.type == WeightType::kFloat32) {
    std::memcpy(to, static_cast<const float*>(problem.weights) + offset, count * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(problem.weights) + offset;
  if (problem.type == WeightType::kFloat16) {
    for (int64_t k = 0; k < count; ++k) to[k] = half_to_float(from[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) to[k] = bfloat16_to_float(from[k]);
  }
}

/// Largest magnitude, NaN when any value is NaN.
float largest_magnitude(const float* values, int64_t count) {
  float largest = 0.0f;
  bool ordered = true;
  for (int64_t k = 0; k < count; ++k) {
    const float magnitude = std::fabs(values[k]);
    largest = magnitude > largest ? magnitude : largest;
    ordered &= magnitude >= 0.0f;
  }
  return ordered ? largest : std::numeric_limits<float>::quiet_NaN();
}

/// Packs bit `plane` of codes into bytes, least significant bit first, zeros past the end.
void pack_plane(const uint8_t* codes, int64_t count, int plane, uint8_t* to) {
  for (int64_t k = 0; k < count; k += 8) {
    uint64_t eight = 0;
    std::memcpy(&eight, codes + k, std::min<int64_t>(8, count - k));
    // The product moves bit 0 of byte i to bit 56 + i; no two terms meet.
    *to++ = static_cast<uint8_t>(((eight >> plane & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
  }
}

class Fitter {
 public:
  Fitter(const FitProblem& problem, const FitOutput& output)
      : problem_(problem),
        output_(output),
        build_(best_build()),
        row_groups_((problem.in_features + problem.group_size - 1) / problem.group_size),
        row_bytes_((problem.in_features + 7) / 8) {}

  int64_t groups() const { return problem_.out_features * row_groups_; }

  /// Quantizes groups [begin, end), counted row by row; returns their largest magnitude or NaN.
  float run(int64_t begin, int64_t end) const {
    const int64_t stride = problem_.group_size;
    AlignedBuffer<float> values(kSearchLanes * stride);
    AlignedBuffer<uint8_t> codes(kSearchLanes * stride);
    AlignedBuffer<uint8_t> scratch(build_.scratch_bytes(stride));
    GroupBatch batch;
    batch.bits = problem_.bits;
    batch.method = problem_.method;
    batch.stride = stride;
    batch.values = values.data();
    batch.codes = codes.data();
    batch.scratch = scratch.data();
    float largest = 0.0f;
    for (int64_t group = begin; group < end; group += kSearchLanes) {
      batch.lanes = static_cast<int>(std::min<int64_t>(kSearchLanes, end - group));
      for (int lane = 0; lane < batch.lanes; ++lane) {
        const int64_t row = (group + lane) / row_groups_;
        const int64_t column = (group + lane) % row_groups_ * stride;
        const int64_t count = std::min(stride, problem_.in_features - column);
        batch.counts[lane] = count;
        if (problem_.importance != nullptr) batch.importances[lane] = problem_.importance + column;
        load(problem_, row * problem_.in_features + column, count, values.data() + lane * stride);
        const float magnitude = largest_magnitude(values.data() + lane * stride, count);
        if (!(magnitude <= kLargestWeight)) return magnitude;
        largest = std::max(largest, magnitude);
      }
      build_.search(batch);
      for (int lane = 0; lane < batch.lanes; ++lane) write(batch, group + lane, lane);
    }
    return largest;
  }

 private:
  void write(const GroupBatch& batch, int64_t group, int lane) const {
    const int64_t row = group / row_groups_;
    const int64_t column = group % row_groups_ * problem_.group_size;
    output_.zeros[group] = float_to_half(batch.zeros[lane]);
    for (int plane = 0; plane < problem_.bits; ++plane) {
      output_.scales[group * problem_.bits + plane] = float_to_half(batch.scales[lane][plane]);
      pack_plane(batch.codes + lane * batch.stride, batch.counts[lane], plane,
                 output_.planes + (plane * problem_.out_features + row) * row_bytes_ + column / 8);
    }
  }

  const FitProblem& problem_;
  const FitOutput& output_;
  const SearchBuild build_;
  const int64_t row_groups_;
  const int64_t row_bytes_;
};

}  // namespace

void check_dimensions(const FitProblem& problem) {
  if (problem.bits < 1 || problem.bits > kSearchMaxBits) throw std::invalid_argument("bits must be 1 to 4");
  if (problem.out_features < 1 || problem.in_features < 1) {
    throw std::invalid_argument("a matrix to quantize needs at least one row and one column");
  }
  if (problem.group_size != problem.in_features && (problem.group_size < 8 || problem.group_size % 8 != 0)) {
    throw std::invalid_argument("group_size must be a multiple of 8 or the whole row");
  }
}

float fit_hlq(const FitProblem& problem, const FitOutput& output, ThreadPool& pool) {
  check_dimensions(problem);
  const Fitter fitter(problem, output);
  // Parts are small enough to balance the threads and large enough to make their buffers' cost vanish.
  constexpr int64_t kBatchesPerPart = 64;
  const int64_t part_groups = problem.group_size > 4096 ? kSearchLanes : kSearchLanes * kBatchesPerPart;
  const int64_t parts = (fitter.groups() + part_groups - 1) / part_groups;
  std::vector<float> largest(parts);
  pool.run(parts, [&](int64_t part) {
    largest[part] = fitter.run(part * part_groups, std::min((part + 1) * part_groups, fitter.groups()));
  });
  float overall = 0.0f;
  for (const float value : largest) {
    if (std::isnan(value)) return value;
    overall = std::max(overall, value);
  }
  return overall;
}

}  // namespace elutq
