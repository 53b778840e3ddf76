#include <stdexcept>
#include <string>

#include "base/cpu_features.h"
#include "kernels/isa/tables.h"
#include "kernels/kernels.h"

namespace elutq {
namespace {

struct Candidate {
  const KernelTable* table;
  bool runs;  // on this machine
};

/// Every table that was built, slowest first.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = {
      {&kScalarKernels, true},
#if defined(__x86_64__)
      {&kAvx2Kernels, cpu_features().avx2},
      {&kAvx512Kernels, cpu_features().avx512},
      {&kAvx512VbmiKernels, cpu_features().avx512_vbmi},
#elif defined(__aarch64__)
      {&kNeonKernels, true},
#endif
  };
  return all;
}

}  // namespace

const KernelTable* find_kernels(std::string_view isa) {
  for (const Candidate& candidate : candidates()) {
    if (candidate.runs && candidate.table->isa == isa) return candidate.table;
  }
  return nullptr;
}

std::vector<std::string_view> available_isas() {
  std::vector<std::string_view> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.runs) names.push_back(candidate.table->isa);
  }
  return names;
}

const KernelTable& select_kernels(std::string_view forced) {
  const std::vector<std::string_view> names = available_isas();
  const KernelTable* table = find_kernels(forced.empty() ? names.back() : forced);
  if (table != nullptr) return *table;
  std::string message = "instruction set '";
  message.append(forced).append("' cannot run on this machine; available are:");
  for (const std::string_view name : names) message.append(1, ' ').append(name);
  throw std::invalid_argument(message);
}

}  // namespace elutq
