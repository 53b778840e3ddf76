#include "kernels/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "base/aligned.h"

namespace elutq {
namespace {

/// Sum of `count` words in four chains: even 16-byte vectors outrun the memory.
uint64_t read_words(const uint64_t* words, int64_t count) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

double read_bandwidth(ThreadPool& pool, int64_t bytes, int passes) {
  if (bytes < (int64_t{1} << 20) || passes < 1) {
    throw std::invalid_argument("read_bandwidth needs at least 1 MiB and one pass");
  }
  constexpr int64_t kPageWords = 4096 / sizeof(uint64_t);
  const int64_t words = bytes / 4096 * kPageWords;
  AlignedBuffer<uint64_t> buffer(static_cast<size_t>(words));
  pool.run_ranges(words, kPageWords,
                  [&](int64_t begin, int64_t end) { std::fill(buffer.data() + begin, buffer.data() + end, 1); });
  double best = 0.0;
  for (int pass = 0; pass < passes; ++pass) {
    std::atomic<uint64_t> sum{0};
    const auto start = std::chrono::steady_clock::now();
    pool.run_ranges(words, kPageWords,
                    [&](int64_t begin, int64_t end) { sum += read_words(buffer.data() + begin, end - begin); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (sum != static_cast<uint64_t>(words)) throw std::runtime_error("read_bandwidth read something it did not write");
    best = std::max(best, static_cast<double>(words) * sizeof(uint64_t) / seconds.count());
  }
  return best;
}

}  // namespace elutq
