// The packed matrix. A tile of kTileRows rows is what one pass multiplies; the tiles of a panel of kPanelRows rows lie
// side by side, group by group, and are multiplied in that order: one sequential stream that reads the tables of a
// group once per panel. (Tile after tile, the tables of a whole row would be read again for every tile, and the stream
// in between would have driven them out of the first-level cache.)
//
//     for each panel, for each group, for each tile of the panel:
//         scales fp16 [bits][kTileRows], zeros fp16 [kTileRows]
//         for each block of 32 columns of the group:
//             for each strip of kStripRows rows:   planes [bits][kStripRows * 4 bytes]
//
// How the 32 x kStripRows bits of one plane lie inside their strip is the business of the lookup (Lookup::put and
// Lookup::get). Rows past out_features and columns past in_features are zero; the last panel may have fewer tiles.

namespace elutq {
namespace {

constexpr int64_t kBlockColumns = kColumnPadding;
constexpr int kTileRows = Lookup::kTileRows;
constexpr int kStripRows = Lookup::kStripRows;
constexpr int kStrips = Lookup::kTileRows / kStripRows;
constexpr int64_t kStripBytes = kStripRows * kBlockColumns / 8;  // of one plane
constexpr int kPanelRows = 128;
constexpr int kPanelTiles = kPanelRows / kTileRows;

struct Layout {
  int64_t in_features;
  int64_t bits;
  int64_t tiles;
  int64_t groups;
  int64_t blocks;              // in a row
  int64_t group_blocks;        // in a full group
  int64_t segment_blocks;      // in a full segment
  int64_t segments;            // in a row
  int64_t segments_per_group;  // in a full group
  int64_t parameter_bytes;     // scales and zeros of a group
  int64_t block_bytes;
  int64_t group_bytes;  // of a full group
  int64_t tile_bytes;

  explicit Layout(const HlqShape& shape)
      : in_features(shape.in_features),
        bits(shape.bits),
        tiles((shape.out_features + kTileRows - 1) / kTileRows),
        groups(shape.groups()),
        blocks(shape.padded_in() / kBlockColumns),
        group_blocks((shape.group_size + kBlockColumns - 1) / kBlockColumns),
        segment_blocks((shape.segment_size() + kBlockColumns - 1) / kBlockColumns),
        segments(shape.segments()),
        segments_per_group((shape.group_size + shape.segment_size() - 1) / shape.segment_size()),
        parameter_bytes((shape.bits + 1) * kTileRows * 2),
        block_bytes(shape.bits * kStrips * kStripBytes),
        group_bytes(parameter_bytes + group_blocks * block_bytes),
        tile_bytes(groups * parameter_bytes + blocks * block_bytes) {}

  /// Where the plane of a row's strip begins in a block.
  int64_t plane_offset(int64_t plane, int64_t row_in_tile) const {
    return (row_in_tile / kStripRows * bits + plane) * kStripBytes;
  }

  /// Blocks in group `group`; the last group may be short.
  int64_t blocks_of(int64_t group) const { return min_of(group_blocks, blocks - group * group_blocks); }

  /// Bytes of group `group` of one tile: from there to the same group of the panel's next tile.
  int64_t bytes_of(int64_t group) const { return parameter_bytes + blocks_of(group) * block_bytes; }

  /// Where group `group` of a tile begins in the packed matrix.
  int64_t offset(int64_t tile, int64_t group) const {
    const int64_t first = tile / kPanelTiles * kPanelTiles;
    const int64_t panel_tiles = min_of(kPanelTiles, tiles - first);
    return first * tile_bytes + group * panel_tiles * group_bytes + (tile - first) * bytes_of(group);
  }
};

int64_t packed_bytes(const HlqShape& shape) {
  const Layout layout(shape);
  return layout.tiles * layout.tile_bytes + kLookAhead;
}

/// Nibbles 7654'3210, the slots of a block, to the bytes 73'62'51'40, its pairs of slots.
ELUTQ_INLINE uint32_t pair_slots(uint32_t columns) {
  const auto spread = [](uint32_t v) {  // four nibbles into the low halves of four bytes
    v = (v & 0xffu) | (v & 0xff00u) << 8;
    return (v | v << 4) & 0x0f0f0f0fu;
  };
  return spread(columns) | spread(columns >> 16) << 4;
}

ELUTQ_INLINE uint32_t unpair_slots(uint32_t pairs) {
  const auto gather = [](uint32_t v) {
    v &= 0x0f0f0f0fu;
    v = (v | v >> 4) & 0x00ff00ffu;
    return (v | v >> 8) & 0xffffu;
  };
  return gather(pairs) | gather(pairs >> 4) << 16;
}

/// Bits of the 32 columns from 32 * block on, from the row of one plane on disk; the tail reads as zero.
ELUTQ_INLINE uint32_t read_block(const uint8_t* row, int64_t block, int64_t row_bytes) {
  uint32_t columns = 0;
  const int64_t bytes = min_of(4, row_bytes - block * 4);
  if (bytes == 4) {
    std::memcpy(&columns, row + block * 4, 4);
  } else {
    std::memcpy(&columns, row + block * 4, static_cast<size_t>(bytes));
  }
  return columns;
}

/// One group of one tile. Rows from `rows` on read as zero.
void pack_group(const HlqView& matrix, const Layout& layout, int64_t first, int64_t rows, int64_t group, uint8_t* to) {
  const HlqShape& shape = matrix.shape;
  uint16_t parameters[kMaxBits + 1][kTileRows] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t index = (first + r) * layout.groups + group;
    for (int64_t p = 0; p < layout.bits; ++p) parameters[p][r] = matrix.scales[index * layout.bits + p];
    parameters[layout.bits][r] = matrix.zeros[index];
  }
  std::memcpy(to, parameters, static_cast<size_t>(layout.parameter_bytes));

  const int64_t row_bytes = (shape.in_features + 7) / 8;
  const int64_t first_block = group * layout.group_blocks;
  const int64_t blocks = layout.blocks_of(group);
  for (int64_t p = 0; p < layout.bits; ++p) {
    for (int64_t strip = 0; strip < kTileRows; strip += kStripRows) {
      const int64_t first_row = p * shape.out_features + first + strip;
      uint8_t* plane = to + layout.parameter_bytes + layout.plane_offset(p, strip);
      for (int64_t b = 0; b < blocks; ++b) {
        uint32_t pairs[kStripRows] = {};
        for (int64_t r = 0; r < min_of(kStripRows, rows - strip); ++r) {
          pairs[r] = pair_slots(read_block(matrix.planes + (first_row + r) * row_bytes, first_block + b, row_bytes));
        }
        Lookup::put(pairs, plane + b * layout.block_bytes);
      }
    }
  }
}

void pack(const HlqView& matrix, int64_t row_begin, int64_t row_end, uint8_t* packed) {
  const Layout layout(matrix.shape);
  for (int64_t first = row_begin; first < row_end; first += kTileRows) {
    for (int64_t group = 0; group < layout.groups; ++group) {
      pack_group(matrix, layout, first, min_of(kTileRows, row_end - first), group,
                 packed + layout.offset(first / kTileRows, group));
    }
  }
}

/// Columns [begin, end) of a row as fp32; begin is a multiple of 32.
void unpack_columns(const Layout& layout, const uint8_t* packed, int64_t row, int64_t begin, int64_t end,
                    float* weights) {
  const int r = static_cast<int>(row % kTileRows);
  for (int64_t column = begin; column < end; column += kBlockColumns) {
    const int64_t block = column / kBlockColumns;
    const int64_t group = block / layout.group_blocks;
    const uint8_t* parameters = packed + layout.offset(row / kTileRows, group);
    const uint8_t* planes =
        parameters + layout.parameter_bytes + (block - group * layout.group_blocks) * layout.block_bytes;
    Floats low = splat_half(parameters + (layout.bits * kTileRows + r) * 2);
    Floats high = low;
    for (int64_t p = 0; p < layout.bits; ++p) {
      const Floats scale = splat_half(parameters + (p * kTileRows + r) * 2);
      const uint32_t columns = unpair_slots(Lookup::get(planes + layout.plane_offset(p, r), r % kStripRows));
      low = fma(scale, from_bits(columns & 0xffffu), low);
      high = fma(scale, from_bits(columns >> 16), high);
    }
    float* to = weights + (column - begin);
    const int64_t left = end - column;
    if (left >= kBlockColumns) {
      store(low, to);
      store(high, to + kLanes);
    } else if (left > kLanes) {
      store(low, to);
      store_part(high, to + kLanes, left - kLanes);
    } else {
      store_part(low, to, left);
    }
  }
}

void unpack_row(const HlqShape& shape, const uint8_t* packed, int64_t row, float* weights) {
  unpack_columns(Layout(shape), packed, row, 0, shape.in_features, weights);
}

}  // namespace
}  // namespace elutq
