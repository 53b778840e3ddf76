#include "solver/solve_group.h"

#include <stdexcept>
#include <vector>

#include "base/aligned.h"
#include "base/cpu_features.h"

namespace elutq {
namespace {

struct Build {
  int64_t (*rows)();
  int64_t (*scratch)(const CalibratedGroup&);
  void (*solve)(const CalibratedStrips&);
};

Build best_build() {
#if defined(__x86_64__)
  if (cpu_features().avx512) {
    return {solver_avx512::calibrated_rows, solver_avx512::calibrated_scratch, solver_avx512::solve_strips};
  }
  if (cpu_features().avx2) {
    return {solver_avx2::calibrated_rows, solver_avx2::calibrated_scratch, solver_avx2::solve_strips};
  }
#endif
  return {solver_generic::calibrated_rows, solver_generic::calibrated_scratch, solver_generic::solve_strips};
}

}  // namespace

void solve_group(const CalibratedGroup& group, ThreadPool& pool) {
  if (group.bits < 1 || group.bits > kCalibratedMaxBits) throw std::invalid_argument("bits must be 1 to 4");
  if (group.columns < 1 || group.rows < 1) throw std::invalid_argument("a group needs at least one row and one column");
  std::vector<float> sums(group.columns);
  for (int64_t j = 0; j < group.columns; ++j) {
    double sum = 0.0;
    for (int64_t k = 0; k < group.columns; ++k) sum += double{group.metric[j * group.columns + k]};
    sums[j] = static_cast<float>(sum);
  }
  const Build build = best_build();
  const int64_t rows = build.rows();
  pool.run_ranges((group.rows + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
    AlignedBuffer<uint8_t> scratch(build.scratch(group));
    build.solve({group, sums.data(), begin, end, scratch.data()});
  });
}

}  // namespace elutq
