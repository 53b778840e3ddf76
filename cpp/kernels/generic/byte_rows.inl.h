// Lookup for machines that look bytes up in one table of 16 per instruction (pshufb, tbl).
//
// A vector of kBytes bytes holds one pair of slots of kBytes rows of one plane: byte byte_of_row(r) of vector v = 0..3
// is the pair v of row r, slot v in its low nibble and slot 4 + v in its high one. A strip is [v][plane] vectors, in
// the order of their use. Both slots are looked up in the table of their slot, the same for all rows, and added as
// bytes; the sums of pairs are added in 16 bits: a segment has at most 16 pairs, so its sums less 128 per pair lie
// within +-16 * 127.
//
// The instruction set offers: kBytes, Bytes, load_bytes, store_bytes, load_table (16 bytes for every lane),
// low_nibbles, high_nibbles, lookup, add_bytes (modulo 256); Sums, start_sums(int) (all the same), add(Sums&, Bytes),
// to_floats(Sums, part): of rows 16 * part .. 16 * part + 15, times kSumUnit; byte_of_row; kRegisterSums, the Sums that
// fit the registers beside tables.

namespace elutq {
namespace {

struct Lookup {
  static constexpr int kTileRows = kBytes;
  static constexpr int kStripRows = kBytes;

  static void put(const uint32_t (&pairs)[kStripRows], int64_t bits, int64_t plane, uint8_t* strip) {
    uint32_t ordered[kBytes];
    for (int r = 0; r < kStripRows; ++r) ordered[byte_of_row(r)] = pairs[r];
    for (int v = 0; v < 4; ++v) {
      uint8_t* to = strip + (v * bits + plane) * kBytes;
      for (int i = 0; i < kBytes; ++i) to[i] = static_cast<uint8_t>(ordered[i] >> 8 * v);
    }
  }

  static uint32_t get(const uint8_t* strip, int64_t bits, int64_t plane, int row) {
    uint32_t pairs = 0;
    for (int v = 0; v < 4; ++v) {
      pairs |= static_cast<uint32_t>(strip[(v * bits + plane) * kBytes + byte_of_row(row)]) << (8 * v);
    }
    return pairs;
  }

  /// Adds the entries of one block of 32 columns of one strip, for `bits` planes and `tokens` tokens.
  template <int bits, int tokens>
  ELUTQ_INLINE static void add_block(const uint8_t* strip, const uint8_t* const (&entries)[tokens],
                                     Sums (&sums)[bits][tokens]) {
    unroll<4>([&](auto v) ELUTQ_FLAT {
      Bytes low[bits];
      Bytes high[bits];
      unroll<bits>([&](auto p) ELUTQ_FLAT {
        const Bytes both = load_bytes(strip + (v * bits + p) * kBytes);
        low[p] = low_nibbles(both);
        high[p] = high_nibbles(both);
      });
      unroll<tokens>([&](auto t) ELUTQ_FLAT {
        const Bytes low_table = load_table(entries[t] + v * 16);
        const Bytes high_table = load_table(entries[t] + 64 + v * 16);
        unroll<bits>([&](auto p) ELUTQ_FLAT {
          add(sums[p][t], add_bytes(lookup(low_table, low[p]), lookup(high_table, high[p])));
        });
      });
    });
  }

  // Many tokens (many_tokens.inl.h). The indices of a block of `tiles` tiles, a byte each: [4][tiles][bits][low, high].

  static constexpr int kSumsAtOnce = kRegisterSums;

  /// Writes those of one tile's strip.
  template <int bits, int tiles>
  ELUTQ_INLINE static void put_indices(const uint8_t* strip, int64_t tile, uint8_t* indices) {
    unroll<4>([&](auto v) ELUTQ_FLAT {
      unroll<bits>([&](auto p) ELUTQ_FLAT {
        const Bytes both = load_bytes(strip + (v * bits + p) * kBytes);
        uint8_t* to = indices + ((v * tiles + tile) * bits + p) * 2 * kBytes;
        store_bytes(low_nibbles(both), to);
        store_bytes(high_nibbles(both), to + kBytes);
      });
    });
  }

  /// Adds the entries of one block for one token.
  template <int bits, int tiles>
  ELUTQ_INLINE static void add_indexed(const uint8_t* indices, const uint8_t* entries, Sums (&sums)[tiles][bits]) {
    unroll<4>([&](auto v) ELUTQ_FLAT {
      const Bytes low_table = load_table(entries + v * 16);
      const Bytes high_table = load_table(entries + 64 + v * 16);
      unroll<tiles>([&](auto s) ELUTQ_FLAT {
        unroll<bits>([&](auto p) ELUTQ_FLAT {
          const uint8_t* index = indices + ((v * tiles + s) * bits + p) * 2 * kBytes;
          const Bytes low = lookup(low_table, load_bytes(index));
          add(sums[s][p], add_bytes(low, lookup(high_table, load_bytes(index + kBytes))));
        });
      });
    });
  }
};

}  // namespace
}  // namespace elutq
