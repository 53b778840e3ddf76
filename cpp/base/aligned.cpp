#include "base/aligned.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace elutq {
namespace {

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

#if defined(__linux__)
constexpr size_t kPageBytes = 65536;  // the largest page of any Linux this runs on

/// Mapped apart from the heap, so that what is freed is given back whatever lies beside it.
void* map_large(size_t bytes) {
  const size_t size = round_up(bytes, kPageBytes);
  void* mapped = mmap(nullptr, size + kHugePageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<char*>(mapped);
  const size_t address = reinterpret_cast<uintptr_t>(mapped);
  char* memory = begin + (round_up(address, kHugePageBytes) - address);
  char* end = begin + size + kHugePageBytes;
  if (memory != begin) munmap(begin, memory - begin);
  if (memory + size != end) munmap(memory + size, end - (memory + size));
  // A stream of weights crosses a 4 KiB page every few hundred cycles. Advice only: a refusal changes nothing.
  static_cast<void>(madvise(memory, bytes / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE));
  return memory;
}
#endif

}  // namespace

void* allocate_aligned(size_t bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
#if defined(__linux__)
  if (bytes >= kHugePageBytes) return map_large(bytes);
#endif
  const size_t alignment = bytes >= kHugePageBytes ? kHugePageBytes : kCacheLineBytes;
  void* memory = std::aligned_alloc(alignment, round_up(bytes, alignment));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void free_aligned(void* memory, size_t bytes) {
#if defined(__linux__)
  if (bytes >= kHugePageBytes) {
    munmap(memory, round_up(bytes, kPageBytes));
    return;
  }
#endif
  static_cast<void>(bytes);
  std::free(memory);
}

}  // namespace elutq
