// y = W x for few tokens: passes over the weights that look up as many tokens as have room in the registers.

namespace elutq {
namespace {

/// One segment of one tile, `blocks` blocks of `planes`. acc: [tokens][kPanelRows], the sums so far of the tile's rows.
template <int bits, int param_bits, int tokens>
ELUTQ_INLINE void multiply_segment(const uint8_t* parameters, const uint8_t* planes, int64_t blocks,
                                   const TableView* tables, int64_t segment, int64_t first_block, bool fetch,
                                   float* acc) {
  using Stored = Parameters<param_bits>;
  constexpr int64_t kBlockBytes = bits * kStrips * kStripBytes;
  // Strips of one pass: all, in the order of memory, while their sums leave registers for indices and tables.
  constexpr int kTogether = bits * tokens <= 8 ? kStrips : 1;
  const Sums start = first_sums(blocks);
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
      const auto rows = RowParameters<bits>::template read<param_bits>(of_rows);
      unroll<tokens>([&](auto t) ELUTQ_FLAT {
        const auto scale = [&](auto p) ELUTQ_FLAT { return rows.scales[p]; };
        const auto sum = [&](auto p) ELUTQ_FLAT { return to_floats(sums[kStrip][p][t], kPart); };
        add_rows<bits>(scale, rows.middle, sum, tables[t], segment, acc + t * kPanelRows + kRow);
      });
    });
  });
}

/// Segments [begin, end) of `tiles` neighbors of one panel. acc: [tokens][kPanelRows], the sums so far.
template <int bits, int param_bits, int tokens>
[[gnu::noinline]] void multiply(const Layout& layout, const uint8_t* packed, int64_t tile, int64_t tiles,
                                const TableView* tables, int64_t begin, int64_t end, float* acc) {
  const bool fetch = !cpu_features().follows_streams;
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

// Tables of one pass, tokens * columns * 4 bytes, about fill the first-level cache.
constexpr int64_t kTableBytes = 24 * 1024;

/// All rows of a chunk for `tokens` tokens, columns in runs whose tables fit the first-level cache.
template <int bits, int param_bits, int tokens>
void multiply_chunk(const Layout& layout, const uint8_t* packed, const TableView* tables, int64_t row_begin,
                    int64_t row_end, float* y, int64_t y_stride) {
  const int64_t segment_bytes = layout.segment_blocks * kBlockEntries * tokens;
  const int64_t run = tokens == 1 ? layout.segments : (kTableBytes + segment_bytes - 1) / segment_bytes;
  for (int64_t begin = 0; begin < layout.segments; begin += run) {
    const int64_t end = min_of(begin + run, layout.segments);
    for_each_panel(row_begin, row_end, [&](int64_t row, int64_t rows) {
      multiply_rows<bits, param_bits, tokens>(layout, packed, tables, begin, end, row, rows, y, y_stride);
    });
  }
}

}  // namespace
}  // namespace elutq
