#include "base/arena.h"

#include <cstdint>
#include <new>
#include <utility>

namespace elutq {

std::shared_ptr<uint8_t> Arena::allocate(size_t bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  const size_t size = (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
  std::shared_ptr<AlignedBuffer<uint8_t>> block = block_.lock();
  if (size > kBlockBytes) {
    block = std::make_shared<AlignedBuffer<uint8_t>>(size);
    return {block, block->data()};
  }
  if (block == nullptr || size > kBlockBytes - used_) {
    block = std::make_shared<AlignedBuffer<uint8_t>>(kBlockBytes);
    block_ = block;
    used_ = 0;
  }
  uint8_t* memory = block->data() + used_;
  used_ += size;
  return {std::move(block), memory};
}

}  // namespace elutq
