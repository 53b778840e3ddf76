// y = W x for many tokens at once, on machines whose lookups take bytes as indices (byte_rows.inl.h).
//
// What does not depend on the token is done once for up to kTokensAtOnce of them: the nibbles of a segment become bytes
// that an instruction can take from memory as they are, and its parameters become fp32. For a lookup that leaves the
// lookup and the additions. Indices take twice the memory of the bits; those of a few tiles fit the first-level cache.

namespace elutq {
namespace {

constexpr int kTokensAtOnce = 64;
constexpr int64_t kIndexBytes = 16 * 1024;  // half the first-level cache: tables, parameters and sums come by beside it

/// One segment of some tiles of a panel. Where kTogether tiles are asked for and fewer are there, the others come to
/// something, which nobody looks at.
template <typename Lookup, int bits>
struct IndexedSegment {
  /// Tiles whose sums fit the registers: they share the reading of tables.
  static constexpr int kTogether = bits < Lookup::kSumsAtOnce ? Lookup::kSumsAtOnce / bits : 1;
  static_assert(kPanelTiles % kTogether == 0);
  static constexpr int64_t kBlockBytes = kTogether * bits * 2 * kStripBytes;  // of so many tiles
  static constexpr int64_t kParameters = (bits + 1) * kTileRows;              // of one tile

  static constexpr int64_t bytes_of(int tiles) { return tiles / kTogether * kBlockBytes * kMaxSegment / kBlockColumns; }
  static constexpr int most_tiles() {
    int tiles = kPanelTiles;
    while (tiles > kTogether && bytes_of(tiles) > kIndexBytes) tiles /= 2;
    return tiles;
  }
  static constexpr int kTiles = most_tiles();

  alignas(64) uint8_t indices[bytes_of(kTiles)] = {};       ///< [kTiles / kTogether][blocks][kBlockBytes]
  alignas(64) float parameters[kTiles * kParameters] = {};  ///< [rows / 16][bits + 1][16], of RowParameters

  uint8_t* indices_of(int64_t tile, int64_t blocks) { return indices + tile / kTogether * blocks * kBlockBytes; }

  /// Reads `blocks` blocks of planes and the parameters of one tile.
  template <int param_bits>
  ELUTQ_INLINE void read(const uint8_t* planes, const uint8_t* stored, int64_t blocks, int64_t tile) {
    uint8_t* to = indices_of(tile, blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      look_ahead<bits * kStripBytes, kTokensAtOnce>(planes, true);
      Lookup::template put_indices<bits, kTogether>(planes, tile % kTogether, to);
      planes += bits * kStripBytes;
      to += kBlockBytes;
    }
    constexpr int64_t kStored = (bits + 1) * kLanes * Parameters<param_bits>::kBytes;
    look_ahead<kTileRows / kLanes * kStored, kTokensAtOnce>(stored, true);
    float* floats = parameters + tile * kParameters;
    for (int run = 0; run < kTileRows / kLanes; ++run, stored += kStored, floats += (bits + 1) * kLanes) {
      const auto rows = RowParameters<bits>::template read<param_bits>(stored);
      unroll<bits>([&](auto p) ELUTQ_FLAT { store(rows.scales[p], floats + p * kLanes); });
      store(rows.middle, floats + bits * kLanes);
    }
  }

  /// Adds what kTogether tiles from `tile` on come to for one token. acc: the sums so far of their rows.
  ELUTQ_INLINE void multiply(int64_t tile, int64_t blocks, const TableView& table, int64_t segment,
                             const uint8_t* entries, float* acc) {
    const uint8_t* from = indices_of(tile, blocks);
    const Sums start = first_sums(blocks);
    Sums sums[kTogether][bits];
    unroll<kTogether>([&](auto s) ELUTQ_FLAT { unroll<bits>([&](auto p) ELUTQ_FLAT { sums[s][p] = start; }); });
    for (int64_t b = 0; b < blocks; ++b) {
      Lookup::template add_indexed<bits, kTogether>(from, entries, sums);
      from += kBlockBytes;
      entries += kBlockEntries;
    }
    const float* floats = parameters + tile * kParameters;
    unroll<kTogether>([&](auto s) ELUTQ_FLAT {
      unroll<kTileRows / kLanes>([&](auto part) ELUTQ_FLAT {
        constexpr int kRun = s * (kTileRows / kLanes) + part;
        const float* of_rows = floats + kRun * (bits + 1) * kLanes;
        const auto scale = [&](auto p) ELUTQ_FLAT { return load(of_rows + p * kLanes); };
        const auto sum = [&](auto p) ELUTQ_FLAT { return to_floats(sums[s][p], part); };
        add_rows<bits>(scale, load(of_rows + bits * kLanes), sum, table, segment, acc + kRun * kLanes);
      });
    });
  }
};

/// Rows [row, row + rows) of one panel for at most kTokensAtOnce tokens.
template <typename Lookup, int bits, int param_bits>
[[gnu::noinline]] void multiply_many(const Layout& layout, const uint8_t* packed, const TableView* tables,
                                     int64_t tokens, int64_t row, int64_t rows, float* y, int64_t y_stride) {
  using Segment = IndexedSegment<Lookup, bits>;
  Segment indexed;
  alignas(64) float acc[kTokensAtOnce * kPanelRows];
  std::memset(acc, 0, static_cast<size_t>(tokens * kPanelRows) * sizeof(float));
  const int64_t tile = row / kTileRows;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t segment = 0; segment < layout.segments; ++segment) {
    const int64_t group = segment / layout.segments_per_group;
    const int64_t first_block = segment * layout.segment_blocks;
    const int64_t blocks = min_of(layout.segment_blocks, layout.blocks - first_block);
    const int64_t planes_offset = (first_block - group * layout.group_blocks) * layout.block_bytes;
    for (int64_t first = 0; first < tiles; first += Segment::kTiles) {
      const int64_t count = min_of(Segment::kTiles, tiles - first);
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t* of_group = packed + layout.offset(tile + first + i, group);
        const uint8_t* parameters = of_group + layout.parameters_offset(group);
        indexed.template read<param_bits>(of_group + planes_offset, parameters, blocks, i);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        const uint8_t* entries = tables[t].entries + first_block * kBlockEntries;
        float* sums = acc + t * kPanelRows + first * kTileRows;
        for (int64_t i = 0; i < count; i += Segment::kTogether) {
          indexed.multiply(i, blocks, tables[t], segment, entries, sums + i * kTileRows);
        }
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float* sums = acc + t * kPanelRows;
    if constexpr (param_bits == 8) scale_rows<1>(packed + layout.row_scales_offset(tile), tiles, sums);
    std::memcpy(y + t * y_stride + row, sums, static_cast<size_t>(rows) * sizeof(float));
  }
}

}  // namespace
}  // namespace elutq
