// y = W x from lookup tables: integer sums over a segment, then the fused multiply-adds that kernels.h fixes.

#include "base/cpu_features.h"

namespace elutq {
namespace {

/// How far ahead weights are fetched, in bytes: by one token into the first-level cache, by more into the second.
constexpr int64_t kFetchAhead = 2048;
constexpr int64_t kFetchFarAhead = 8192;

/// Fetches what is read some time after the `bytes` bytes at `from`. One token is faster than memory and reads one
/// stream, which most prefetchers follow best if left alone. Intel's end with a page and need help: `fetch`. More
/// tokens read as many streams of tables, in which the prefetchers get lost.
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

constexpr int64_t kBlockEntries = kBlockColumns / kSlotColumns * 16;  // bytes of tables per block

/// One segment of one tile, `blocks` blocks of `planes`. acc: [tokens][kPanelRows], the sums so far of the tile's rows.
template <int bits, int param_bits, int tokens>
ELUTQ_INLINE void multiply_segment(const uint8_t* parameters, const uint8_t* planes, int64_t blocks,
                                   const TableView* tables, int64_t segment, int64_t first_block, bool fetch,
                                   float* acc) {
  using Stored = Parameters<param_bits>;
  constexpr int64_t kBlockBytes = bits * kStrips * kStripBytes;
  // Strips of one pass: all, in the order of memory, while their sums leave registers for indices and tables.
  constexpr int kTogether = bits * tokens <= 8 ? kStrips : 1;
  // A pair's sum is found with 128 added; that of padding columns too, which is exactly 128.
  const Sums start = start_sums(static_cast<int>(blocks * (kBlockColumns / kSlotColumns / 2) * -128));
  unroll<kStrips / kTogether>([&](auto part) ELUTQ_FLAT {
    constexpr int kFirst = part * kTogether;
    Sums sums[kTogether][bits][tokens];
    unroll<kTogether>([&](auto s) ELUTQ_FLAT {
      unroll<bits>([&](auto p) ELUTQ_FLAT { unroll<tokens>([&](auto t) ELUTQ_FLAT { sums[s][p][t] = start; }); });
    });
    const uint8_t* strips = planes + kFirst * bits * kStripBytes;
    const uint8_t* entries[tokens];
    unroll<tokens>([&](auto t) ELUTQ_FLAT { entries[t] = tables[t].entries + first_block * kBlockEntries; });
    for (int64_t b = 0; b < blocks; ++b) {
      look_ahead<kTogether * bits * kStripBytes, tokens>(strips, fetch);
      unroll<kTogether>([&](auto s) ELUTQ_FLAT {
        Lookup::template add_block<bits, tokens>(strips + s * bits * kStripBytes, entries, sums[s]);
      });
      strips += kBlockBytes;
      unroll<tokens>([&](auto t) ELUTQ_FLAT { entries[t] += kBlockEntries; });
    }

    if constexpr (part == 0) look_ahead<(bits + 1) * kTileRows * Stored::kBytes, tokens>(parameters, fetch);
    unroll<kTogether * kStripRows / kLanes>([&](auto i) ELUTQ_FLAT {
      constexpr int kRow = kFirst * kStripRows + i * kLanes;
      constexpr int kStrip = i * kLanes / kStripRows;
      constexpr int kPart = i * kLanes % kStripRows / kLanes;
      const uint8_t* of_rows = parameters + (bits + 1) * kRow * Stored::kBytes;
      Floats scales[bits];
      Floats mid = Stored::load_zeros(of_rows + bits * kLanes * Stored::kBytes);
      unroll<bits>([&](auto p) ELUTQ_FLAT {
        scales[p] = Stored::load_scales(of_rows + p * kLanes * Stored::kBytes);
        mid = fma(splat(0.5f), scales[p], mid);
      });
      unroll<tokens>([&](auto t) ELUTQ_FLAT {
        Floats u = scales[0] * to_floats(sums[kStrip][0][t], kPart);
        unroll<bits, 1>([&](auto p) ELUTQ_FLAT { u = fma(scales[p], to_floats(sums[kStrip][p][t], kPart), u); });
        float* to = acc + t * kPanelRows + kRow;
        const Floats with_planes = fma(u, splat(tables[t].scales[segment]), load(to));
        store(fma(mid, splat(tables[t].sums[segment]), with_planes), to);
      });
    });
  });
}

/// Segments [begin, end) of `tiles` neighbors of one panel. acc: [tokens][kPanelRows], the sums so far.
template <int bits, int param_bits, int tokens>
[[gnu::noinline]] void multiply(const Layout& layout, const uint8_t* packed, int64_t tile, int64_t tiles,
                                const TableView* tables, int64_t begin, int64_t end, float* acc) {
  const bool fetch = cpu_features().intel;
  const int64_t segment_blocks = layout.segment_blocks;
  const int64_t segment_bytes = segment_blocks * layout.block_bytes;
  int64_t group = begin / layout.segments_per_group;
  while (begin < end) {
    const int64_t group_begin = group * layout.segments_per_group;
    const int64_t stop = min_of(group_begin + layout.segments_per_group, end);
    const int64_t bytes = layout.bytes_of(group);
    const uint8_t* parameters = packed + layout.offset(tile, group) + layout.parameters_offset(group);
    const int64_t segments_offset = (begin - group_begin) * segment_bytes - layout.parameters_offset(group);
    for (int64_t i = 0; i < tiles; ++i, parameters += bytes) {
      const uint8_t* planes = parameters + segments_offset;
      int64_t block = begin * segment_blocks;
      for (int64_t segment = begin; segment < stop; ++segment, block += segment_blocks, planes += segment_bytes) {
        multiply_segment<bits, param_bits, tokens>(parameters, planes, min_of(segment_blocks, layout.blocks - block),
                                                   tables, segment, block, fetch, acc + i * kTileRows);
      }
    }
    begin = stop;
    ++group;
  }
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

/// The same for rows [row, row + rows) of one panel, with the sums so far in y when begin > 0.
template <int bits, int param_bits, int tokens>
void multiply_rows(const Layout& layout, const uint8_t* packed, const TableView* tables, int64_t begin, int64_t end,
                   int64_t row, int64_t rows, float* y, int64_t y_stride) {
  alignas(64) float acc[tokens * kPanelRows] = {};
  const auto row_bytes = static_cast<size_t>(rows) * sizeof(float);
  for (int t = 0; begin > 0 && t < tokens; ++t) std::memcpy(acc + t * kPanelRows, y + t * y_stride + row, row_bytes);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  multiply<bits, param_bits, tokens>(layout, packed, row / kTileRows, tiles, tables, begin, end, acc);
  if constexpr (param_bits == 8) {
    if (end == layout.segments) scale_rows<tokens>(packed + layout.row_scales_offset(row / kTileRows), tiles, acc);
  }
  for (int t = 0; t < tokens; ++t) std::memcpy(y + t * y_stride + row, acc + t * kPanelRows, row_bytes);
}

// Tables of one pass, tokens * columns * 4 bytes, about fill the first-level cache; the rows of one chunk, read again
// for every pass, in the second.
constexpr int64_t kTableBytes = 24 * 1024;
constexpr int64_t kChunkBytes = 384 * 1024;

/// All rows of a chunk for `tokens` tokens, columns in runs whose tables fit the first-level cache.
template <int bits, int param_bits, int tokens>
void multiply_chunk(const Layout& layout, const uint8_t* packed, const TableView* tables, int64_t row_begin,
                    int64_t row_end, float* y, int64_t y_stride) {
  const int64_t segment_bytes = layout.segment_blocks * kBlockEntries * tokens;
  const int64_t run = tokens == 1 ? layout.segments : (kTableBytes + segment_bytes - 1) / segment_bytes;
  for (int64_t begin = 0; begin < layout.segments; begin += run) {
    const int64_t end = min_of(begin + run, layout.segments);
    for (int64_t row = row_begin; row < row_end;) {
      const int64_t next = min_of(row / kPanelRows * kPanelRows + kPanelRows, row_end);
      multiply_rows<bits, param_bits, tokens>(layout, packed, tables, begin, end, row, next - row, y, y_stride);
      row = next;
    }
  }
}

/// Takes `count` tokens off the front while they last.
template <int bits, int param_bits, int count>
ELUTQ_INLINE void take_tokens(const Layout& layout, const uint8_t* packed, const TableView*& tables, int64_t& tokens,
                              int64_t row_begin, int64_t row_end, float*& y, int64_t y_stride) {
  for (; tokens >= count; tokens -= count, tables += count, y += count * y_stride) {
    multiply_chunk<bits, param_bits, count>(layout, packed, tables, row_begin, row_end, y, y_stride);
  }
}

template <int bits, int param_bits>
void matmul_bits(const HlqShape& shape, const uint8_t* packed, const TableView* tables, int64_t tokens,
                 int64_t row_begin, int64_t row_end, float* y, int64_t y_stride) {
  const Layout layout(shape);
  const int64_t panels = tokens == 1 ? (row_end - row_begin) : kChunkBytes / (layout.tile_bytes * kPanelTiles);
  const int64_t chunk = (panels > 0 ? panels : 1) * kPanelRows;
  for (int64_t begin = row_begin; begin < row_end; begin += chunk) {
    const int64_t end = min_of(begin + chunk, row_end);
    const TableView* next = tables;
    int64_t left = tokens;
    float* to = y;
    constexpr int kMost = kMostTokens[bits];
    take_tokens<bits, param_bits, kMost>(layout, packed, next, left, begin, end, to, y_stride);
    if constexpr (kMost > 4) take_tokens<bits, param_bits, 4>(layout, packed, next, left, begin, end, to, y_stride);
    if constexpr (kMost > 2) take_tokens<bits, param_bits, 2>(layout, packed, next, left, begin, end, to, y_stride);
    if constexpr (kMost > 1) take_tokens<bits, param_bits, 1>(layout, packed, next, left, begin, end, to, y_stride);
  }
}

void matmul(const HlqShape& shape, const uint8_t* packed, const TableView* tables, int64_t tokens, int64_t row_begin,
            int64_t row_end, float* y, int64_t y_stride) {
  constexpr decltype(&matmul) kMatmuls[][kMaxBits] = {
      {matmul_bits<1, 16>, matmul_bits<2, 16>, matmul_bits<3, 16>, matmul_bits<4, 16>},
      {matmul_bits<1, 8>, matmul_bits<2, 8>, matmul_bits<3, 8>, matmul_bits<4, 8>},
  };
  kMatmuls[shape.param_bits == 8][shape.bits - 1](shape, packed, tables, tokens, row_begin, row_end, y, y_stride);
}

}  // namespace
}  // namespace elutq
