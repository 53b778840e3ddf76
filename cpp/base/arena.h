#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/aligned.h"

namespace elutq {

/// Memory for many buffers that are made one after the other and mostly freed together, like the matrices of a model:
/// they lie side by side in blocks of huge pages. (On its own, a matrix of 5 MB has its last fifth in small pages,
/// which are read more slowly, and a matrix below 2 MB all of it.) A block is freed with the last buffer in it. What
/// was never written takes no memory on Linux. Not for concurrent use.
class Arena {
 public:
  /// Uninitialized and aligned to a cache line. A buffer larger than a block has memory of its own.
  /// Throws std::bad_alloc.
  std::shared_ptr<uint8_t> allocate(size_t bytes);

 private:
  static constexpr size_t kBlockBytes = size_t{128} << 20;

  std::weak_ptr<AlignedBuffer<uint8_t>> block_;  // the newest, while a buffer in it lives
  size_t used_ = 0;                              // bytes of it
};

}  // namespace elutq
