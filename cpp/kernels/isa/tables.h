#pragma once

#include "kernels/kernels.h"

namespace elutq {

// Constants, so that no code of an instruction set runs before the registry has asked the CPU. One per isa/<name>.cpp.
extern const KernelTable kScalarKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512VbmiKernels;
#elif defined(__aarch64__)
extern const KernelTable kNeonKernels;
#endif

}  // namespace elutq
