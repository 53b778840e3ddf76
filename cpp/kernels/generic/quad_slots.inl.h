// Lookup for machines that look bytes up in four tables of 16 at once (vpermb, tbl over four registers) and add four
// adjacent bytes into 32 bits (vpdpbusd, udot).
//
// A vector of 64 bytes holds the eight slots of a block for 16 rows of a plane: byte 4r + j is the pair j of row r,
// slot j in its low nibble and slot 4 + j in its high one. Setting bits 4 and 5 of byte j to j turns a nibble into an
// index into the 64 bytes of four consecutive tables. The entries of a pair are added as bytes; the four sums that
// belong to one row are added to its 32-bit sum by one instruction.
//
// A tile has two strips of 16 rows. One token takes both at once, for enough sums in flight; many tokens take one after
// the other, so that the indices of a strip serve as many tokens as there are registers for.
//
// The instruction set offers: Bytes (64), load_bytes, low_index, high_index, lookup, add_bytes (modulo 256); Sums (16 x
// 32 bits), start_sums(int) (all the same), add(Sums&, Bytes), to_floats(Sums, part): times kSumUnit.

namespace elutq {
namespace {

struct Lookup {
  static constexpr int kTileRows = 32;
  static constexpr int kStripRows = 16;
  static constexpr int kBytes = 4 * kStripRows;

  static void put(const uint32_t (&pairs)[kStripRows], int64_t /*bits*/, int64_t plane, uint8_t* strip) {
    std::memcpy(strip + plane * kBytes, pairs, sizeof pairs);
  }

  static uint32_t get(const uint8_t* strip, int64_t /*bits*/, int64_t plane, int row) {
    uint32_t pairs;
    std::memcpy(&pairs, strip + plane * kBytes + 4 * row, 4);
    return pairs;
  }

  /// Adds the entries of one block of 32 columns of one strip, for `bits` planes and `tokens` tokens.
  template <int bits, int tokens>
  ELUTQ_INLINE static void add_block(const uint8_t* strip, const uint8_t* const (&entries)[tokens],
                                     Sums (&sums)[bits][tokens]) {
    Bytes low[bits];
    Bytes high[bits];
    unroll<bits>([&](auto p) ELUTQ_FLAT {
      const Bytes both = load_bytes(strip + p * kBytes);
      low[p] = low_index(both);
      high[p] = high_index(both);
    });
    unroll<tokens>([&](auto t) ELUTQ_FLAT {
      const Bytes low_tables = load_tables(entries[t]);
      const Bytes high_tables = load_tables(entries[t] + 64);
      unroll<bits>([&](auto p) ELUTQ_FLAT {
        add(sums[p][t], add_bytes(lookup(low_tables, low[p]), lookup(high_tables, high[p])));
      });
    });
  }
};

}  // namespace
}  // namespace elutq
