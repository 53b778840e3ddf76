#pragma once

#include <cstdint>

#include "base/thread_pool.h"

namespace elutq {

/// Bytes per second at which the pool's threads together read `bytes` bytes of memory once, sequentially: the best of
/// `passes` passes. That is the most any decode step can reach, since it reads every weight once. `bytes` must be
/// much larger than the caches.
double read_bandwidth(ThreadPool& pool, int64_t bytes, int passes);

}  // namespace elutq
