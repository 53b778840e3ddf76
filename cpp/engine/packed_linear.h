#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>

#include "base/thread_pool.h"
#include "ops/linear.h"

namespace elutq {

/// Kernels and threads for linears on their own, outside a decoder. Products of several callers run one after the
/// other.
class LinearRunner {
 public:
  /// As Engine's. Throws std::invalid_argument when the instruction set cannot run here, or threads < 1.
  LinearRunner(std::string_view isa, int threads, bool exact);

  std::string_view isa() const { return backend_.kernels->isa; }
  const Backend& backend() const { return backend_; }
  /// Where linears are packed; guarded by mutex().
  Arena& arena() { return arena_; }
  std::mutex& mutex() { return mutex_; }

 private:
  ThreadPool pool_;
  Backend backend_;
  Arena arena_;
  std::mutex mutex_;
};

/// One HLQ matrix, packed for this machine: the same product, bit for bit, as inside a decoder.
class PackedLinear {
 public:
  /// Packs in parallel; the view may go away afterwards. Throws std::invalid_argument when kernels cannot take the
  /// shape.
  PackedLinear(std::shared_ptr<LinearRunner> runner, const HlqView& matrix);

  int64_t out_features() const { return linear_.out_features(); }
  int64_t in_features() const { return linear_.in_features(); }
  int64_t memory_bytes() const { return linear_.packed_bytes(); }
  /// y [tokens][out_features] = x [tokens][in_features] times the transposed matrix.
  void multiply(const float* x, int64_t tokens, float* y) const;

 private:
  std::shared_ptr<LinearRunner> runner_;
  Linear linear_;
};

}  // namespace elutq
