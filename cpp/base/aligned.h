#pragma once

#include <cstddef>
#include <memory>
#include <span>

namespace elutq {

/// Uninitialized memory aligned to a cache line; from kHugePageBytes on to a huge page, and Linux is then asked for
/// huge pages, but for the last part that would not fill one. Throws std::bad_alloc. Release it with free_aligned and
/// the same number of bytes.
void* allocate_aligned(size_t bytes);
void free_aligned(void* memory, size_t bytes);

inline constexpr size_t kCacheLineBytes = 64;
inline constexpr size_t kHugePageBytes = size_t{2} << 20;

/// Owning array of trivially copyable T, aligned to a cache line and not initialized. Large ones are zero pages until
/// touched.
template <typename T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size) : size_(size) {
    if (size != 0) data_ = {static_cast<T*>(allocate_aligned(size * sizeof(T))), Free{size * sizeof(T)}};
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }
  std::span<T> span() { return {data(), size_}; }
  std::span<const T> span() const { return {data(), size_}; }

 private:
  struct Free {
    size_t bytes = 0;
    void operator()(T* p) const { free_aligned(p, bytes); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

}  // namespace elutq
