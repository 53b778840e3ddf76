// Lookup for machines that look bytes up in four tables of 16 at once (vpermb, tbl over four registers) and add four
// adjacent bytes into 32 bits (vpdpbusd, udot).
//
// A vector of 64 bytes holds eight slots of 16 rows:
//
//     byte 4r + j = row r:    low nibble  = slot j        (columns 4j .. 4j+3)
//                             high nibble = slot 4 + j    (columns 4j+16 .. 4j+19)        j = 0..3
//
// which is 32 columns: one block is one vector per 16 rows. Setting bits 4 and 5 of byte j to j turns a nibble into an
// index into the 64 bytes of four consecutive tables; the four bytes found belong to one row, and one instruction adds
// them to the row's 32-bit sum. A tile has two strips of 16 rows: enough sums in flight for one
// token, and every load of a table serves both.
//
// The instruction set offers: Bytes (64), load_bytes, low_index, high_index, lookup; Sums (16 x 32 bits),
// start_sums(int) (all the same), add(Sums&, Bytes), to_floats(Sums, part).

namespace elutq {
namespace {

struct Lookup {
  static constexpr int kTileRows = 32;
  static constexpr int kStripRows = 16;

  /// Nibbles 7654'3210 -> 73'62'51'40.
  static void put(const uint32_t (&columns)[kStripRows], uint8_t* plane) {
    uint32_t bytes[kStripRows];
    for (int r = 0; r < kStripRows; ++r) bytes[r] = spread(columns[r]) | spread(columns[r] >> 16) << 4;
    std::memcpy(plane, bytes, sizeof bytes);
  }

  static uint32_t get(const uint8_t* plane, int row) {
    uint32_t bytes;
    std::memcpy(&bytes, plane + 4 * row, 4);
    return gather(bytes) | gather(bytes >> 4) << 16;
  }

  /// Adds the entries of one block of 32 columns of one strip, for `bits` planes and `tokens` tokens.
  template <int bits, int tokens>
  ELUTQ_INLINE static void add_block(const uint8_t* planes, const uint8_t* const (&entries)[tokens],
                                     Sums (&sums)[bits][tokens]) {
    Bytes low[bits];
    Bytes high[bits];
    unroll<bits>([&](auto p) ELUTQ_FLAT {
      const Bytes both = load_bytes(planes + p * 4 * kStripRows);
      low[p] = low_index(both);
      high[p] = high_index(both);
    });
    unroll<tokens>([&](auto t) ELUTQ_FLAT {
      const Bytes low_tables = load_bytes(entries[t]);
      const Bytes high_tables = load_bytes(entries[t] + 64);
      unroll<bits>([&](auto p) ELUTQ_FLAT {
        add(sums[p][t], lookup(low_tables, low[p]));
        add(sums[p][t], lookup(high_tables, high[p]));
      });
    });
  }

 private:
  /// The low four nibbles into the low halves of four bytes, and back.
  static uint32_t spread(uint32_t v) {
    v = (v & 0xffu) | (v & 0xff00u) << 8;
    return (v | v << 4) & 0x0f0f0f0fu;
  }
  static uint32_t gather(uint32_t v) {
    v &= 0x0f0f0f0fu;
    v = (v | v >> 4) & 0x00ff00ffu;
    return (v | v >> 8) & 0xffffu;
  }
};

}  // namespace
}  // namespace elutq
