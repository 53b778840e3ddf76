#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "base/aligned.h"

namespace elutq {

/// A fixed team of threads that runs one parallel region at a time.
///
/// The caller is part of the team: a pool of n has n - 1 workers. Workers spin for a short while after a region, so
/// that the next one starts within about a microsecond, and then sleep, so that an idle model costs nothing. A region
/// waits for its parts, not for the workers: one that the system has put aside holds nothing up unless it has claimed
/// a part.
class ThreadPool {
 public:
  /// Starts `threads` - 1 workers. Throws std::invalid_argument when threads < 1.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls task(part) once for each part in [0, parts) and returns when all are done. Parts are claimed in order by
  /// whichever thread is free. The first exception a part throws is rethrown here. Not reentrant.
  void run(int64_t parts, const std::function<void(int64_t)>& task);

  /// The same in an order that suits memory: every thread goes through parts that follow each other, as many as any
  /// other, and then helps the others with theirs.
  void run_streams(int64_t parts, const std::function<void(int64_t)>& task);

  /// Splits [0, count) into ranges of about equal size whose borders are multiples of `grain`, one or more per
  /// thread, and calls task(begin, end) for each.
  void run_ranges(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& task);

 private:
  /// Parts that follow each other, in a cache line of their own, lest threads wait for each other's.
  struct alignas(kCacheLineBytes) Stream {
    std::atomic<int64_t> next{0};  // part to claim
  };

  void worker();
  void open_region(uint64_t parts);
  void claim_parts();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};     // region, its parts, the next part to claim: one word, so that claims are safe
  std::atomic<int64_t> unfinished_{0};  // parts of the region that are not done
  std::atomic<bool> stop_{false};
  std::vector<Stream> streams_;  // one for each thread
  const std::function<void(int64_t)>* task_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace elutq
