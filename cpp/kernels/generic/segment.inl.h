// What a segment of a tile comes to, for one token or many: the fused multiply-adds that kernels.h fixes. And how far
// ahead weights are fetched.

namespace elutq {
namespace {

constexpr int64_t kBlockEntries = kBlockColumns / kSlotColumns * 16;  // bytes of tables per block

/// Scales of 16 rows, and the middle of their levels.
template <int bits>
struct RowParameters {
  Floats scales[bits];
  Floats middle;

  /// From the parameters of a tile's group as they are stored.
  template <int param_bits>
  ELUTQ_INLINE static RowParameters read(const uint8_t* from) {
    using Stored = Parameters<param_bits>;
    RowParameters rows;
    rows.middle = Stored::load_zeros(from + bits * kLanes * Stored::kBytes);
    unroll<bits>([&](auto p) ELUTQ_FLAT {
      rows.scales[p] = Stored::load_scales(from + p * kLanes * Stored::kBytes);
      rows.middle = fma(splat(0.5f), rows.scales[p], rows.middle);
    });
    return rows;
  }
};

/// Sums to begin with: a pair's is found with 128 added; that of padding columns too, which is exactly 128.
ELUTQ_INLINE Sums first_sums(int64_t blocks) {
  return start_sums(static_cast<int>(blocks * (kBlockColumns / kSlotColumns / 2) * -128));
}

/// Adds a segment to what 16 rows come to. scale(p) and middle as in RowParameters, sum(p): the integer sums of plane
/// p.
template <int bits, typename Scale, typename Sum>
ELUTQ_INLINE void add_rows(const Scale& scale, const Floats& middle, const Sum& sum, const TableView& table,
                           int64_t segment, float* to) {
  Floats u = scale(Constant<0>{}) * sum(Constant<0>{});
  unroll<bits, 1>([&](auto p) ELUTQ_FLAT { u = fma(scale(p), sum(p), u); });
  // kSumUnit is a power of two: nothing is rounded.
  const Floats with_planes = fma(u, splat(table.scales[segment] * (1.0f / kSumUnit)), load(to));
  store(fma(middle, splat(table.sums[segment]), with_planes), to);
}

/// Multiplies the sums of `tiles` tiles, [tokens][kPanelRows], by their rows' scales.
template <int tokens>
void scale_rows(const uint8_t* row_scales, int64_t tiles, float* acc) {
  for (int64_t row = 0; row < tiles * kTileRows; row += kLanes) {
    const Floats scales = load(row_scales + row * static_cast<int64_t>(sizeof(float)));
    for (int t = 0; t < tokens; ++t) {
      float* sums = acc + t * kPanelRows + row;
      store(scales * load(sums), sums);
    }
  }
}

/// How far ahead weights are fetched, in bytes: by one token into the first-level cache, by more into the second.
constexpr int64_t kFetchAhead = 2048;
constexpr int64_t kFetchFarAhead = 8192;

/// Fetches what is read some time after the `bytes` bytes at `from`. One token is faster than memory and reads one
/// stream, which some prefetchers follow best if left alone; others end with a page and need help: `fetch`. More tokens
/// read as many streams of tables, in which prefetchers get lost.
template <int64_t bytes, int tokens>
ELUTQ_INLINE void look_ahead(const uint8_t* from, [[maybe_unused]] bool fetch) {
  if constexpr (kFetches) {
    constexpr int kLines = (bytes + kCacheLine - 1) / kCacheLine;
    if constexpr (tokens > 1) {
      unroll<kLines>([&](auto i) ELUTQ_FLAT { __builtin_prefetch(from + kFetchFarAhead + i * kCacheLine, 0, 2); });
    } else {
      asm("" : "+r"(fetch));  // asked each time, or the compiler makes a loop for each answer
      if (fetch) {
        unroll<kLines>([&](auto i) ELUTQ_FLAT { __builtin_prefetch(from + kFetchAhead + i * kCacheLine, 0, 3); });
      }
    }
  }
}

}  // namespace
}  // namespace elutq
