#pragma once

#include "base/thread_pool.h"
#include "kernels/kernels.h"

namespace elutq {

/// What operations run on. Both outlive whatever holds a Backend.
struct Backend {
  const KernelTable* kernels = nullptr;
  ThreadPool* pool = nullptr;
  bool exact = false;  ///< HLQ products from fp32 activations, without int8 tables
};

}  // namespace elutq
