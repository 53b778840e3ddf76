#pragma once

#include "base/thread_pool.h"
#include "solver/calibrated_group.h"

namespace elutq {

/// Solves a group with the build for this machine. A row's result depends neither on other rows nor on the number of
/// threads, but in last bits on the instruction set, which may fuse multiplications with additions.
/// Throws std::invalid_argument when a dimension is outside what CalibratedGroup states.
void solve_group(const CalibratedGroup& group, ThreadPool& pool);

}  // namespace elutq
