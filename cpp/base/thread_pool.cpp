#include "base/thread_pool.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace elutq {
namespace {

constexpr int kSpins = 4000;  // some tens of microseconds, about the gap between two regions of a decode step

// A ticket is (region number, parts of the region, next part to claim), from high bits to low.
constexpr int kPartBits = 20;
constexpr uint64_t kPartMask = (uint64_t{1} << kPartBits) - 1;

uint64_t region_of(uint64_t ticket) { return ticket >> (2 * kPartBits); }
uint64_t parts_of(uint64_t ticket) { return (ticket >> kPartBits) & kPartMask; }
uint64_t next_of(uint64_t ticket) { return ticket & kPartMask; }

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) : streams_(std::max(threads, 1)) {
  if (threads < 1) throw std::invalid_argument("a thread pool needs at least one thread");
  workers_.reserve(threads - 1);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { worker(); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  open_region(0);
  for (std::thread& thread : workers_) thread.join();
}

void ThreadPool::run(int64_t parts, const std::function<void(int64_t)>& task) {
  if (parts <= 0) return;
  if (workers_.empty() || parts == 1) {
    for (int64_t part = 0; part < parts; ++part) task(part);
    return;
  }
  if (static_cast<uint64_t>(parts) > kPartMask / 2) throw std::invalid_argument("too many parts for a thread pool");
  task_ = &task;
  error_ = nullptr;
  unfinished_.store(parts, std::memory_order_relaxed);
  open_region(static_cast<uint64_t>(parts));
  claim_parts();
  for (int spin = 0; unfinished_.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpins) {
      relax();
    } else {
      std::this_thread::yield();  // fewer cores than threads: let the worker have this one
    }
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::run_streams(int64_t parts, const std::function<void(int64_t)>& task) {
  const int64_t streams = std::min<int64_t>(size(), parts);
  if (streams <= 1) return run(parts, task);
  const auto begin = [&](int64_t stream) { return parts * stream / streams; };
  for (int64_t stream = 0; stream < streams; ++stream) {
    streams_[stream].next.store(begin(stream), std::memory_order_relaxed);
  }
  run(streams, [&](int64_t own) {
    for (int64_t i = 0; i < streams; ++i) {
      const int64_t stream = (own + i) % streams;
      std::atomic<int64_t>& next = streams_[stream].next;
      for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < begin(stream + 1);) task(part);
    }
  });
}

void ThreadPool::run_ranges(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& task) {
  if (count <= 0) return;
  const int64_t units = (count + grain - 1) / grain;
  const int64_t parts = std::min<int64_t>(units, size());
  run(parts, [&](int64_t part) {
    const int64_t begin = units * part / parts * grain;
    const int64_t end = std::min(units * (part + 1) / parts * grain, count);
    if (begin < end) task(begin, end);
  });
}

void ThreadPool::open_region(uint64_t parts) {
  {
    const std::lock_guard lock(mutex_);  // a worker is either about to look at the ticket or already waiting
    const uint64_t region = region_of(ticket_.load(std::memory_order_relaxed)) + 1;
    ticket_.store((region << (2 * kPartBits)) | (parts << kPartBits), std::memory_order_release);
  }
  wake_.notify_all();
}

void ThreadPool::claim_parts() {
  for (;;) {
    // The part is of whatever region is open now. That region cannot close before the part is done, and its task
    // was set before it opened.
    const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
    if (next_of(ticket) >= parts_of(ticket)) return;
    try {
      (*task_)(static_cast<int64_t>(next_of(ticket)));
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    unfinished_.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::worker() {
  uint64_t seen = 0;
  for (;;) {
    const auto current = [this] { return region_of(ticket_.load(std::memory_order_acquire)); };
    for (int spin = 0; spin < kSpins && current() == seen; ++spin) relax();
    if (current() == seen) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return current() != seen; });
    }
    seen = current();
    if (stop_.load()) return;
    claim_parts();
  }
}

}  // namespace elutq
