// The packed matrix. A tile of kTileRows rows is what one pass multiplies; the tiles of a panel of kPanelRows rows lie
// side by side, group by group, and are multiplied in that order: one sequential stream that reads the tables of a
// group once per panel. (Tile after tile, the tables of a whole row would be read again for every tile, and the stream
// in between would have driven them out of the first-level cache.) Everything lies in the order in which it is read,
// since prefetchers lose a stream that goes back and forth.
//
//     for each panel:
//         for each group, for each tile of the panel:
//             for each block of 32 columns of the group:
//                 for each strip of kStripRows rows: bits x kStripBytes
//             for each 16 rows of the tile:   scales [bits][16], zeros [16]: fp16, or 8 bits as on disk
//         parameters of 8 bits: row scales fp32 [rows of the panel]
//
// How the bits x 32 x kStripRows bits of a block lie inside their strip is the business of the lookup (Lookup::put and
// Lookup::get). Rows past out_features and columns past in_features are zero; the last panel may have fewer tiles.

namespace elutq {
namespace {

constexpr int64_t kBlockColumns = kColumnPadding;
constexpr int kTileRows = Lookup::kTileRows;
constexpr int kStripRows = Lookup::kStripRows;
constexpr int kStrips = Lookup::kTileRows / kStripRows;
constexpr int64_t kStripBytes = kStripRows * kBlockColumns / 8;  // of one plane
constexpr int kPanelRows = 256;
constexpr int kPanelTiles = kPanelRows / kTileRows;

/// How scales and zeros of one width are read.
template <int param_bits>
struct Parameters;

template <>
struct Parameters<16> {
  static constexpr int64_t kBytes = 2;
  ELUTQ_INLINE static Floats load_scales(const uint8_t* from) { return load_half(from); }
  ELUTQ_INLINE static Floats load_zeros(const uint8_t* from) { return load_half(from); }
  ELUTQ_INLINE static Floats splat_scale(const uint8_t* from) { return splat_half(from); }
  ELUTQ_INLINE static Floats splat_zero(const uint8_t* from) { return splat_half(from); }
};

template <>
struct Parameters<8> {
  static constexpr int64_t kBytes = 1;
  ELUTQ_INLINE static Floats load_scales(const uint8_t* from) { return load_uint8(from); }
  ELUTQ_INLINE static Floats load_zeros(const uint8_t* from) { return load_int8(from); }
  ELUTQ_INLINE static Floats splat_scale(const uint8_t* from) { return splat(static_cast<float>(*from)); }
  ELUTQ_INLINE static Floats splat_zero(const uint8_t* from) {
    return splat(static_cast<float>(static_cast<int8_t>(*from)));
  }
};

struct Layout {
  int64_t in_features;
  int64_t bits;
  int64_t param_bytes;  // of one scale or zero
  int64_t tiles;
  int64_t groups;
  int64_t blocks;              // in a row
  int64_t group_blocks;        // in a full group
  int64_t segment_blocks;      // in a full segment
  int64_t segments;            // in a row
  int64_t segments_per_group;  // in a full group
  int64_t parameter_bytes;     // scales and zeros of a group
  int64_t block_bytes;
  int64_t group_bytes;      // of a full group
  int64_t row_scale_bytes;  // of a tile
  int64_t tile_bytes;

  explicit Layout(const HlqShape& shape)
      : in_features(shape.in_features),
        bits(shape.bits),
        param_bytes(shape.param_bits / 8),
        tiles((shape.out_features + kTileRows - 1) / kTileRows),
        groups(shape.groups()),
        blocks(shape.padded_in() / kBlockColumns),
        group_blocks((shape.group_size + kBlockColumns - 1) / kBlockColumns),
        segment_blocks((shape.segment_size() + kBlockColumns - 1) / kBlockColumns),
        segments(shape.segments()),
        segments_per_group((shape.group_size + shape.segment_size() - 1) / shape.segment_size()),
        parameter_bytes((shape.bits + 1) * kTileRows * param_bytes),
        block_bytes(shape.bits * kStrips * kStripBytes),
        group_bytes(parameter_bytes + group_blocks * block_bytes),
        row_scale_bytes(shape.param_bits == 8 ? kTileRows * static_cast<int64_t>(sizeof(float)) : 0),
        tile_bytes(groups * parameter_bytes + blocks * block_bytes + row_scale_bytes) {}

  /// Where a row's strip begins in a block.
  int64_t strip_offset(int64_t row_in_tile) const { return row_in_tile / kStripRows * bits * kStripBytes; }

  /// Where scale `plane` of a row lies among the parameters of a tile's group; at plane = bits, its zero.
  int64_t parameter_offset(int64_t plane, int64_t row_in_tile) const {
    return ((row_in_tile / kLanes * (bits + 1) + plane) * kLanes + row_in_tile % kLanes) * param_bytes;
  }

  /// Blocks in group `group`; the last group may be short.
  int64_t blocks_of(int64_t group) const { return min_of(group_blocks, blocks - group * group_blocks); }

  /// From the planes of a tile's group to its parameters.
  int64_t parameters_offset(int64_t group) const { return blocks_of(group) * block_bytes; }

  /// Bytes of group `group` of one tile: from there to the same group of the panel's next tile.
  int64_t bytes_of(int64_t group) const { return parameters_offset(group) + parameter_bytes; }

  /// The panel of a tile: its first tile, and one past its last.
  static int64_t panel_begin(int64_t tile) { return tile / kPanelTiles * kPanelTiles; }
  int64_t panel_end(int64_t tile) const { return min_of(panel_begin(tile) + kPanelTiles, tiles); }

  /// Where group `group` of a tile begins in the packed matrix.
  int64_t offset(int64_t tile, int64_t group) const {
    const int64_t first = panel_begin(tile);
    const int64_t panel_tiles = panel_end(tile) - first;
    return first * tile_bytes + group * panel_tiles * group_bytes + (tile - first) * bytes_of(group);
  }

  /// Where the row scales of a tile begin: they end the panel.
  int64_t row_scales_offset(int64_t tile) const {
    const int64_t end = panel_end(tile);
    return end * tile_bytes - (end - tile) * row_scale_bytes;
  }
};

/// visit(row, rows) for what lies in each panel of rows [begin, end).
template <typename Visit>
ELUTQ_INLINE void for_each_panel(int64_t begin, int64_t end, const Visit& visit) {
  while (begin < end) {
    const int64_t next = min_of(begin / kPanelRows * kPanelRows + kPanelRows, end);
    visit(begin, next - begin);
    begin = next;
  }
}

int64_t packed_bytes(const HlqShape& shape) {
  const Layout layout(shape);
  return layout.tiles * layout.tile_bytes;
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
  const auto* scales = static_cast<const uint8_t*>(matrix.scales);
  const auto* zeros = static_cast<const uint8_t*>(matrix.zeros);
  const int64_t param_bytes = layout.param_bytes;
  uint8_t* parameters = to + layout.parameters_offset(group);
  std::memset(parameters, 0, static_cast<size_t>(layout.parameter_bytes));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t index = (first + r) * layout.groups + group;
    // Byte by byte, since a memcpy whose size the compiler does not know is a call for each parameter.
    const auto put = [&](int64_t p, const uint8_t* from, int64_t i) {
      uint8_t* place = parameters + layout.parameter_offset(p, r);
      place[0] = from[i * param_bytes];
      if (param_bytes == 2) place[1] = from[i * param_bytes + 1];
    };
    for (int64_t p = 0; p < layout.bits; ++p) put(p, scales, index * layout.bits + p);
    put(layout.bits, zeros, index);
  }

  const int64_t row_bytes = (shape.in_features + 7) / 8;
  const int64_t first_block = group * layout.group_blocks;
  const int64_t blocks = layout.blocks_of(group);
  for (int64_t p = 0; p < layout.bits; ++p) {
    for (int64_t strip = 0; strip < kTileRows; strip += kStripRows) {
      const int64_t first_row = p * shape.out_features + first + strip;
      uint8_t* first_strip = to + layout.strip_offset(strip);
      for (int64_t b = 0; b < blocks; ++b) {
        uint32_t pairs[kStripRows] = {};
        for (int64_t r = 0; r < min_of(kStripRows, rows - strip); ++r) {
          pairs[r] = read_block(matrix.planes + (first_row + r) * row_bytes, first_block + b, row_bytes);
        }
        for (uint32_t& pair : pairs) pair = pair_slots(pair);
        Lookup::put(pairs, layout.bits, p, first_strip + b * layout.block_bytes);
      }
    }
  }
}

/// The row scales of one tile as fp32. Rows from `rows` on read as zero.
void pack_row_scales(const HlqView& matrix, int64_t first, int64_t rows, uint8_t* to) {
  uint16_t halves[kTileRows] = {};
  std::memcpy(halves, matrix.row_scales + first, static_cast<size_t>(rows) * sizeof(uint16_t));
  for (int r = 0; r < kTileRows; r += kLanes) {
    float scales[kLanes];
    store(load_half(halves + r), scales);
    std::memcpy(to + r * sizeof(float), scales, sizeof scales);
  }
}

void pack(const HlqView& matrix, int64_t row_begin, int64_t row_end, uint8_t* packed) {
  const Layout layout(matrix.shape);
  for (int64_t first = row_begin; first < row_end; first += kTileRows) {
    const int64_t tile = first / kTileRows;
    const int64_t rows = min_of(kTileRows, row_end - first);
    for (int64_t group = 0; group < layout.groups; ++group) {
      pack_group(matrix, layout, first, rows, group, packed + layout.offset(tile, group));
    }
    if (layout.row_scale_bytes != 0) pack_row_scales(matrix, first, rows, packed + layout.row_scales_offset(tile));
  }
}

/// Columns [begin, end) of a row as fp32; begin is a multiple of 32.
template <int param_bits>
void unpack_columns(const Layout& layout, const uint8_t* packed, int64_t row, int64_t begin, int64_t end,
                    float* weights) {
  using Stored = Parameters<param_bits>;
  const int r = static_cast<int>(row % kTileRows);
  Floats row_scale = splat(1.0f);
  if constexpr (param_bits == 8) {
    float scale;
    std::memcpy(&scale, packed + layout.row_scales_offset(row / kTileRows) + r * sizeof scale, sizeof scale);
    row_scale = splat(scale);
  }
  for (int64_t column = begin; column < end; column += kBlockColumns) {
    const int64_t block = column / kBlockColumns;
    const int64_t group = block / layout.group_blocks;
    const uint8_t* of_group = packed + layout.offset(row / kTileRows, group);
    const uint8_t* parameters = of_group + layout.parameters_offset(group);
    const uint8_t* strip =
        of_group + (block - group * layout.group_blocks) * layout.block_bytes + layout.strip_offset(r);
    Floats low = Stored::splat_zero(parameters + layout.parameter_offset(layout.bits, r));
    Floats high = low;
    for (int64_t p = 0; p < layout.bits; ++p) {
      const Floats scale = Stored::splat_scale(parameters + layout.parameter_offset(p, r));
      const uint32_t columns = unpair_slots(Lookup::get(strip, layout.bits, p, r % kStripRows));
      low = fma(scale, from_bits(columns & 0xffffu), low);
      high = fma(scale, from_bits(columns >> 16), high);
    }
    if constexpr (param_bits == 8) {
      low = row_scale * low;
      high = row_scale * high;
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
  const auto unpack = shape.param_bits == 8 ? unpack_columns<8> : unpack_columns<16>;
  unpack(Layout(shape), packed, row, 0, shape.in_features, weights);
}

}  // namespace
}  // namespace elutq
