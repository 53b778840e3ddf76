#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace elutq {

/// A fixed team of threads that runs one parallel region at a time.
///
/// The caller is part of the team: a pool of n has n - 1 workers. Workers spin for a short while after a region, so
/// that the next one starts within about a microsecond, and then sleep, so that an idle model costs nothing.
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

  /// Splits [0, count) into ranges of about equal size whose borders are multiples of `grain`, one or more per
  /// thread, and calls task(begin, end) for each.
  void run_ranges(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& task);

 private:
  void worker();
  void claim_parts();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};  // odd or even does not matter: a change means a new region
  std::atomic<int> running_{0};          // workers that have not finished the region yet
  std::atomic<int64_t> next_part_{0};
  std::atomic<bool> stop_{false};
  int64_t parts_ = 0;
  const std::function<void(int64_t)>* task_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace elutq
