#include "solver/choose_columns.h"

#include <stdexcept>

#include "base/cpu_features.h"

namespace elutq {

void choose_columns(const ColumnSearch& search) {
  if (search.bits < 1 || search.bits > kColumnSearchMaxBits) throw std::invalid_argument("bits must be 1 to 4");
  if (search.columns < 1 || search.columns > kColumnSearchColumns) {
    throw std::invalid_argument("a search has 1 to 32 columns");
  }
#if defined(__x86_64__)
  if (cpu_features().avx512) return solver_avx512::search_columns(search);
  if (cpu_features().avx2) return solver_avx2::search_columns(search);
#endif
  solver_generic::search_columns(search);
}

}  // namespace elutq
