#pragma once

#include <cstdint>

#include "base/thread_pool.h"
#include "kernels/kernels.h"

namespace elutq {

/// What operations run on. Both outlive whatever holds a Backend.
struct Backend {
  const KernelTable* kernels = nullptr;
  ThreadPool* pool = nullptr;
  bool exact = false;  ///< HLQ products from fp32 activations, without int8 tables
};

/// Calls function(i) for every i in [0, count), split evenly over the threads.
template <typename Function>
void for_each(const Backend& backend, int64_t count, const Function& function) {
  backend.pool->run_ranges(count, 1, [&function](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

}  // namespace elutq
