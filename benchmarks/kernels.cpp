// Speed of the kernels on every instruction set of this machine, against the memory's read bandwidth measured between
// the runs. Prints one JSON object per line. docs/kernels.md explains the figures.
//
//   cmake -S . -B build/bench -G Ninja -DELUTQ_BUILD_PYTHON=OFF -DELUTQ_BUILD_BENCHMARKS=ON
//   cmake --build build/bench && build/bench/benchmarks/kernels_benchmark [THREADS [ISA]]

#include "kernels/kernels.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/aligned.h"
#include "base/cpu_features.h"
#include "base/half.h"
#include "base/thread_pool.h"
#include "kernels/bandwidth.h"
#include "ops/attention.h"

namespace {

using namespace elutq;

/// Rows and columns of the linears of LLaMA-2-7B and LLaMA-3-8B.
constexpr std::pair<int64_t, int64_t> kShapes[] = {{4096, 4096},  {1024, 4096},  {11008, 4096},
                                                   {4096, 11008}, {14336, 4096}, {4096, 14336}};

/// Median seconds of `repeats` calls, after one that is not counted.
double median_seconds(int repeats, const std::function<void()>& call) {
  call();
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    call();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
  return seconds[static_cast<size_t>(repeats / 2)];
}

std::vector<float> random_floats(int64_t count) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

struct Tokens {
  AlignedBuffer<uint8_t> entries;
  std::vector<float> values;
  std::vector<TableView> tables;

  Tokens(const KernelTable& kernels, const HlqShape& shape, int64_t count)
      : entries(static_cast<size_t>(count * shape.table_stride())),
        values(static_cast<size_t>(2 * count * shape.segments())) {
    const std::vector<float> x = random_floats(shape.in_features);
    for (int64_t t = 0; t < count; ++t) {
      float* segments = values.data() + 2 * t * shape.segments();
      tables.push_back({entries.data() + t * shape.table_stride(), segments, segments + shape.segments()});
      kernels.build_tables(x.data(), shape.in_features, shape.segment_size(), tables.back());
    }
  }
};

AlignedBuffer<uint8_t> random_packed(const KernelTable& kernels, const HlqShape& shape, ThreadPool& pool) {
  std::vector<uint8_t> planes(static_cast<size_t>(shape.bits * shape.out_features * ((shape.in_features + 7) / 8)));
  std::mt19937 generator(2);
  for (uint8_t& byte : planes) byte = static_cast<uint8_t>(generator());
  const std::vector<uint16_t> scales(static_cast<size_t>(shape.out_features * shape.groups() * shape.bits),
                                     float_to_half(0.01f));
  const HlqView view{shape, planes.data(), scales.data(), scales.data()};
  AlignedBuffer<uint8_t> packed(static_cast<size_t>(kernels.packed_bytes(shape)));
  pool.run_ranges(shape.out_features, kernels.row_tile,
                  [&](int64_t begin, int64_t end) { kernels.pack(view, begin, end, packed.data()); });
  return packed;
}

void print(const KernelTable& kernels, const std::string& what, const std::string& figures) {
  std::printf("{\"isa\": \"%s\", \"kernel\": \"%s\", %s}\n", std::string(kernels.isa).c_str(), what.c_str(),
              figures.c_str());
  std::fflush(stdout);
}

std::string figure(const char* name, double value) {
  char text[96];
  std::snprintf(text, sizeof text, "\"%s\": %.5g", name, value);
  return text;
}

std::string shape_figures(const HlqShape& shape) {
  return figure("out", static_cast<double>(shape.out_features)) + ", " +
         figure("in", static_cast<double>(shape.in_features)) + ", " + figure("bits", shape.bits) + ", " +
         figure("group_size", static_cast<double>(shape.group_size));
}

/// `count` tokens against `copies` of a matrix, one after the other: GB/s of packed weights.
double decode_rate(const KernelTable& kernels, ThreadPool& pool, const HlqShape& shape, int64_t count, int64_t copies,
                   int repeats) {
  const auto first = random_packed(kernels, shape, pool);
  const int64_t bytes = kernels.packed_bytes(shape);
  AlignedBuffer<uint8_t> packed(static_cast<size_t>(copies * bytes));
  for (int64_t i = 0; i < copies; ++i) std::copy_n(first.data(), bytes, packed.data() + i * bytes);
  const Tokens tokens(kernels, shape, count);
  std::vector<float> y(static_cast<size_t>(shape.out_features * count));
  const double seconds = median_seconds(repeats, [&] {
    for (int64_t i = 0; i < copies; ++i) {
      pool.run_ranges(shape.out_features, kernels.row_tile, [&](int64_t begin, int64_t end) {
        kernels.matmul(shape, packed.data() + i * bytes, tokens.tables.data(), count, begin, end, y.data(),
                       shape.out_features);
      });
    }
  });
  return static_cast<double>(copies * bytes) / seconds / 1e9;
}

/// From memory, over many times what the caches hold: how near its speed.
void bench_decode(const KernelTable& kernels, ThreadPool& pool, const HlqShape& shape, int64_t count) {
  const int64_t copies = 1 + (int64_t{256} << 20) / kernels.packed_bytes(shape);
  const double rate = decode_rate(kernels, pool, shape, count, copies, 7);
  const double multiplied = static_cast<double>(shape.out_features * shape.in_features * count);
  const double bandwidth = read_bandwidth(pool, int64_t{512} << 20, 5) / 1e9;
  print(kernels, "from memory",
        shape_figures(shape) + ", " + figure("tokens", static_cast<double>(count)) + ", " + figure("gb_s", rate) +
            ", " + figure("gmac_s", multiplied * rate / static_cast<double>(kernels.packed_bytes(shape))) + ", " +
            figure("read_bandwidth_gb_s", bandwidth) + ", " + figure("fraction", rate / bandwidth));
}

void bench_decode_in_cache(const KernelTable& kernels, ThreadPool& pool, int bits) {
  const HlqShape shape{.out_features = 768 / bits / 64 * 64, .in_features = 4096, .bits = bits, .group_size = 128};
  print(kernels, "gemv, L2", shape_figures(shape) + ", " + figure("gb_s", decode_rate(kernels, pool, shape, 1, 1, 50)));
}

#if defined(__x86_64__)
/// Products of int8 that never wait for anything: 12 sums in registers.
[[gnu::target("avx512f")]] void multiply_int8(int64_t rounds) {
  __m512i sums[12] = {};
  for (int64_t i = 0; i < rounds; ++i) {
    for (__m512i& sum : sums) asm volatile("vpdpbusd %0, %0, %0" : "+v"(sum));
  }
}
#endif

/// What dense int8 could do at most on the same threads, in GMAC/s; 0 on machines without an instruction for it.
double int8_peak(ThreadPool& pool) {
#if defined(__x86_64__)
  if (find_kernels("avx512vbmi") == nullptr) return 0;
  constexpr int64_t kRounds = 1 << 20;
  const double seconds = median_seconds(5, [&] { pool.run(pool.size(), [](int64_t) { multiply_int8(kRounds); }); });
  return static_cast<double>(kRounds * 12 * 64 * pool.size()) / seconds / 1e9;
#else
  static_cast<void>(pool);
  return 0;
#endif
}

/// Many tokens, against the int8 peak of the same minute.
void bench_prefill(const KernelTable& kernels, ThreadPool& pool, const HlqShape& shape, int64_t count) {
  const auto packed = random_packed(kernels, shape, pool);
  const Tokens tokens(kernels, shape, count);
  std::vector<float> y(static_cast<size_t>(shape.out_features * count));
  const double seconds = median_seconds(5, [&] {
    pool.run_ranges(shape.out_features, kernels.row_tile, [&](int64_t begin, int64_t end) {
      kernels.matmul(shape, packed.data(), tokens.tables.data(), count, begin, end, y.data(), shape.out_features);
    });
  });
  const double rate = static_cast<double>(shape.out_features * shape.in_features * count) / seconds / 1e9;
  std::string figures =
      shape_figures(shape) + ", " + figure("tokens", static_cast<double>(count)) + ", " + figure("gmac_s", rate);
  if (const double peak = int8_peak(pool); peak > 0) {
    figures += ", " + figure("int8_peak_gmac_s", peak) + ", " + figure("fraction", rate / peak);
  }
  print(kernels, "gemm", figures);
}

void bench_tables(const KernelTable& kernels) {
  const HlqShape shape{.out_features = 1, .in_features = 4096, .bits = 2, .group_size = 128};
  Tokens tokens(kernels, shape, 1);
  const std::vector<float> x = random_floats(4096);
  const double seconds = median_seconds(20, [&] {
    for (int i = 0; i < 100; ++i) kernels.build_tables(x.data(), 4096, 128, tokens.tables[0]);
  });
  print(kernels, "build_tables", figure("columns", 4096) + ", " + figure("us", seconds * 1e4));
}

void bench_dense(const KernelTable& kernels, ThreadPool& pool, int64_t rows, int64_t count) {
  constexpr int64_t kIn = 4096;
  AlignedBuffer<uint16_t> weights(static_cast<size_t>(rows * kIn));
  std::fill_n(weights.data(), weights.size(), uint16_t{0x3c00});
  const std::vector<float> x = random_floats(kIn * count);
  std::vector<float> y(static_cast<size_t>(rows * count));
  const double seconds = median_seconds(5, [&] {
    pool.run_ranges(rows, 4, [&](int64_t begin, int64_t end) {
      kernels.matmul_dense(DenseType::kBFloat16, weights.data(), kIn, x.data(), kIn, count, begin, end, y.data(), rows);
    });
  });
  const double work = static_cast<double>(rows * kIn);
  print(kernels, "dense bf16",
        figure("tokens", static_cast<double>(count)) + ", " + figure("gb_s", 2 * work / seconds / 1e9) + ", " +
            figure("gmac_s", work * static_cast<double>(count) / seconds / 1e9));
}

/// `tokens` queries at the end of a context of 8 key-value heads, in 8 layers: together more than the caches hold.
void bench_attention(const KernelTable& kernels, ThreadPool& pool, KvType type, int64_t group, int64_t context,
                     int64_t tokens) {
  constexpr int64_t kKvHeads = 8;
  constexpr int64_t kLayers = 8;
  const AttentionShape shape{.num_attention_heads = kKvHeads * group, .num_key_value_heads = kKvHeads, .head_dim = 128};
  const KvLayout layout{type, kKvHeads, shape.head_dim};
  const std::vector<float> q = random_floats(tokens * shape.q_size());
  const std::vector<float> kv = random_floats(shape.kv_size());
  std::vector<float> out(q.size());
  std::vector<AlignedBuffer<uint8_t>> pages;
  std::vector<const uint8_t*> addresses;
  for (int64_t position = 0; position < context; ++position) {
    const int64_t slot = position % kPagePositions;
    if (slot == 0) addresses.push_back(pages.emplace_back(kLayers * layout.bytes()).data());
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      kernels.store_kv(layout, kv.data(), kv.data(), slot, pages.back().data() + layer * layout.bytes());
    }
  }
  Attention attention({&kernels, &pool, false}, shape);
  const double seconds = median_seconds(7, [&] {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      const AttentionRun run = {layout, addresses.data(), layer * layout.bytes(), context - tokens, tokens};
      attention.run(q.data(), {&run, 1}, 0, out.data());
    }
  });
  const double positions = static_cast<double>(kLayers * context);
  const double seen =
      static_cast<double>(tokens) * (1.0 - static_cast<double>(tokens - 1) / (2.0 * static_cast<double>(context)));
  print(kernels, "attention",
        figure("kv_bits", static_cast<double>(8 * layout.element_bytes())) + ", " +
            figure("group", static_cast<double>(group)) + ", " + figure("context", static_cast<double>(context)) +
            ", " + figure("tokens", static_cast<double>(tokens)) + ", " +
            figure("gmac_s", 2 * positions * seen * static_cast<double>(shape.q_size()) / seconds / 1e9) + ", " +
            figure("gb_s", positions * static_cast<double>(layout.bytes()) / kPagePositions / seconds / 1e9));
}

}  // namespace

int main(int argc, char** argv) {
  ThreadPool pool(argc > 1 ? std::atoi(argv[1]) : 1);
  const std::string only = argc > 2 ? argv[2] : "";
  std::printf("{\"cpu\": \"%s\", \"threads\": %d}\n", cpu_model_name().c_str(), pool.size());
  for (const std::string_view isa : available_isas()) {
    if (only.empty() ? isa == "scalar" : isa != only) continue;
    const KernelTable& kernels = select_kernels(isa);
    for (const int bits : {1, 2, 3, 4}) {
      for (const auto& [out, in] : kShapes) bench_decode(kernels, pool, {out, in, bits, 128}, 1);
      for (const int64_t count : {2, 3, 4, 6, 8, 12}) bench_decode(kernels, pool, {11008, 4096, bits, 128}, count);
      bench_decode_in_cache(kernels, pool, bits);
      for (const auto& [out, in] : kShapes) bench_prefill(kernels, pool, {out, in, bits, 128}, 128);
    }
    bench_decode(kernels, pool, {4096, 4096, 2, 32}, 1);
    bench_prefill(kernels, pool, {4096, 4096, 2, 128}, 8);
    bench_prefill(kernels, pool, {4096, 4096, 2, 128}, 512);
    bench_tables(kernels);
    bench_dense(kernels, pool, 65536, 1);
    bench_dense(kernels, pool, 1024, 64);
    for (const KvType type : {KvType::kFloat16, KvType::kInt8}) {
      for (const int64_t group : {1, 4}) {
        bench_attention(kernels, pool, type, group, 4096, 1);
        bench_attention(kernels, pool, type, group, 512, 128);
      }
    }
  }
  return 0;
}
