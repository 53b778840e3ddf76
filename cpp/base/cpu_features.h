#pragma once

#include <string>

namespace elutq {

/// What this CPU *and* operating system can run (XCR0 checked, not only CPUID).
struct CpuFeatures {
  bool avx2 = false;             ///< AVX2, FMA and F16C
  bool avx512 = false;           ///< F, BW, VL and DQ
  bool avx512_vbmi = false;      ///< avx512 and VBMI and VNNI
  bool follows_streams = false;  ///< prefetches one stream by itself, page after page; others want lines fetched
};

/// Features of the machine this runs on, measured once.
const CpuFeatures& cpu_features();

/// Marketing name of the CPU, or "unknown".
std::string cpu_model_name();

}  // namespace elutq
