#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/aligned.h"
#include "base/arena.h"
#include "base/cpu_features.h"
#include "base/half.h"
#include "base/thread_pool.h"

using namespace elutq;

TEST_CASE("a pool runs every part once, region after region, with more threads than cores") {
  for (const int threads : {1, 2, 3, 9}) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads);
    for (int region = 0; region < 2000; ++region) {
      const int64_t parts = region % 20;
      std::vector<std::atomic<int>> runs(static_cast<size_t>(parts));
      pool.run(parts, [&](int64_t part) { ++runs[static_cast<size_t>(part)]; });
      pool.run_streams(parts, [&](int64_t part) { ++runs[static_cast<size_t>(part)]; });
      for (const auto& count : runs) REQUIRE(count == 2);
    }
  }
}

TEST_CASE("streams are runs of consecutive parts, and a thread that has none left helps the others") {
  ThreadPool pool(2);
  std::vector<int64_t> order;
  std::mutex mutex;
  std::atomic<int> finished{0};
  pool.run_streams(8, [&](int64_t part) {
    while (part == 0 && finished < 7) std::this_thread::yield();  // the other thread has to do all the rest
    ++finished;
    const std::lock_guard lock(mutex);
    order.push_back(part);
  });
  CHECK(order == std::vector<int64_t>{4, 5, 6, 7, 1, 2, 3, 0});
}

TEST_CASE("ranges cover everything once and break at multiples of the grain") {
  ThreadPool pool(3);
  for (const int64_t count : {0, 1, 5, 31, 32, 33, 64, 100, 1003}) {
    for (const int64_t grain : {1, 4, 32}) {
      std::vector<std::atomic<int>> covered(static_cast<size_t>(count));
      std::atomic<bool> aligned{true};
      pool.run_ranges(count, grain, [&](int64_t begin, int64_t end) {
        if (begin % grain != 0 || (end % grain != 0 && end != count) || begin >= end) aligned = false;
        for (int64_t i = begin; i < end; ++i) ++covered[static_cast<size_t>(i)];
      });
      CHECK(aligned);
      for (const auto& times : covered) REQUIRE(times == 1);
    }
  }
}

TEST_CASE("a pool hands back the exception of a part and stays usable") {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int region = 0; region < 200; ++region) {
      CHECK_THROWS_WITH_AS(pool.run(16,
                                    [](int64_t part) {
                                      if (part == 7) throw std::runtime_error("part 7");
                                    }),
                           "part 7", std::runtime_error);
      std::atomic<int64_t> sum{0};
      pool.run(16, [&](int64_t part) { sum += part; });
      CHECK(sum == 120);
    }
  }
  CHECK_THROWS_AS(ThreadPool(0), std::invalid_argument);
}

TEST_CASE("buffers are aligned to cache lines, and to huge pages when large") {
  for (const size_t size : {size_t{1}, size_t{63}, size_t{1000}, kHugePageBytes - 1}) {
    AlignedBuffer<uint8_t> buffer(size);
    CHECK(reinterpret_cast<uintptr_t>(buffer.data()) % kCacheLineBytes == 0);
    CHECK(buffer.size() == size);
    buffer[size - 1] = 3;
    CHECK(buffer.span().back() == 3);
  }
  AlignedBuffer<float> large(kHugePageBytes / 4 + 5);
  CHECK(reinterpret_cast<uintptr_t>(large.data()) % kHugePageBytes == 0);
  large[large.size() - 1] = 1.0f;
  AlignedBuffer<float> moved = std::move(large);
  CHECK(moved[kHugePageBytes / 4 + 4] == 1.0f);
  CHECK(AlignedBuffer<float>().empty());
  CHECK_THROWS_AS(AlignedBuffer<uint8_t>(std::numeric_limits<size_t>::max() - 5), std::bad_alloc);
}

TEST_CASE("an arena's buffers lie side by side and outlive it; a block goes with the last of them") {
  std::shared_ptr<uint8_t> first, second;
  {
    Arena arena;
    first = arena.allocate(kHugePageBytes + 1);
    second = arena.allocate(100);
    CHECK(reinterpret_cast<uintptr_t>(first.get()) % kHugePageBytes == 0);
    CHECK(second.get() == first.get() + kHugePageBytes + kCacheLineBytes);
    const std::shared_ptr<uint8_t> large = arena.allocate(size_t{129} << 20);
    large.get()[(size_t{129} << 20) - 1] = 1;
    CHECK(arena.allocate(100).get() == second.get() + 2 * kCacheLineBytes);
    CHECK(arena.allocate(size_t{127} << 20).use_count() == 1);  // did not fit: a block of its own, freed at once
    CHECK_THROWS_AS(arena.allocate(std::numeric_limits<size_t>::max() - 5), std::bad_alloc);
    CHECK(first.use_count() == 2);
  }
  first.get()[kHugePageBytes] = 7;
  second.get()[99] = 8;
  first = nullptr;
  CHECK(second.use_count() == 1);
  CHECK(second.get()[99] == 8);
}

TEST_CASE("every fp16 value survives the way through float") {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = half_to_float(half);
    if (std::isnan(value)) {
      CHECK(std::isnan(half_to_float(float_to_half(value))));
    } else {
      CHECK(float_to_half(value) == half);
    }
  }
  CHECK(half_to_float(0x3c00) == 1.0f);
  CHECK(half_to_float(0x0001) == 0x1p-24f);
  CHECK(half_to_float(0xfbff) == -65504.0f);
  CHECK(bfloat16_to_float(0x3f80) == 1.0f);
}

TEST_CASE("fp16 rounds to the nearest, ties to even") {
  CHECK(float_to_half(1.0f + 0x1p-11f) == 0x3c00);
  CHECK(float_to_half(1.0f + 0x3p-11f) == 0x3c02);
  CHECK(float_to_half(65519.9f) == 0x7bff);
  CHECK(float_to_half(65520.0f) == 0x7c00);
  CHECK(float_to_half(-std::numeric_limits<float>::infinity()) == 0xfc00);
  CHECK(float_to_half(0x1p-25f) == 0);
  CHECK(float_to_half(0x1.1p-25f) == 1);
}

TEST_CASE("the CPU has a name and consistent features") {
  CHECK(!cpu_model_name().empty());
  const CpuFeatures& features = cpu_features();
  if (features.avx512_vbmi) CHECK(features.avx512);
  if (features.avx512) CHECK(features.avx2);
}
