// Lookup tables of one token: 16 int8 entries per slot of four columns, one scale and one sum per segment.

namespace elutq {
namespace {

// Lane i of kSigns[j] is the sign of x[4 * slot + j] in entry i.
alignas(64) constexpr float kSigns[kSlotColumns][kLanes] = {
    {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
    {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
    {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
    {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1},
};

/// The 16 entries of one slot, from twice their values. Adding 1.5 * 2^23 + 64 rounds to an integer whose low byte is
/// 64 + that integer, modulo 256.
ELUTQ_INLINE void build_slot(const float* x, Floats half_inverse, uint8_t* entries) {
  const Floats low = fma(splat(x[1]), load(kSigns[1]), splat(x[0]) * load(kSigns[0]));
  const Floats high = fma(splat(x[3]), load(kSigns[3]), splat(x[2]) * load(kSigns[2]));
  store_low_bytes(fma(low + high, half_inverse, splat(0x1.8p23f + 64.0f)), entries);
}

void build_tables(const float* x, int64_t in_features, int64_t segment_size, TableView tables) {
  int64_t segment = 0;
  for (int64_t begin = 0; begin < in_features; begin += segment_size, ++segment) {
    const int64_t end = min_of(begin + segment_size, in_features);
    Floats sum = zeros();
    Floats largest = zeros();
    // The largest entry of each of four slots, doubled, in the slot's four lanes.
    const auto scan = [&](Floats v) ELUTQ_FLAT {
      sum = sum + v;
      v = abs(v);
      v = v + swap_neighbors(v);
      return v + swap_pairs(v);
    };
    int64_t c = begin;
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
      const Floats low = scan(load(x + c));
      largest = max(largest, low + scan(load(x + c + kLanes)));
    }
    if (c < end) {
      const Floats low = scan(load_part(x + c, min_of(end - c, kLanes)));
      const int64_t high_count = end - c - kLanes;
      largest = max(largest, high_count > 0 ? low + scan(load_part(x + c + kLanes, high_count)) : low);
    }

    const float largest_pair = 0.5f * reduce_max(largest);
    const bool negligible = largest_pair < 0x1p-100f;
    tables.scales[segment] = negligible ? 0.0f : largest_pair / kLargestPair;
    tables.sums[segment] = reduce_add(sum);

    // build_slot leaves its entries doubled; halving the factor instead is exact, since it is never subnormal.
    const Floats half_inverse = splat(negligible ? 0.0f : 0.5f * (kLargestPair / largest_pair));
    uint8_t* entries = tables.entries + begin * (16 / kSlotColumns);
    c = begin;
    for (; c + kSlotColumns <= end; c += kSlotColumns, entries += 16) build_slot(x + c, half_inverse, entries);
    const int64_t padded_end = (end + kColumnPadding - 1) / kColumnPadding * kColumnPadding;
    for (; c < padded_end; c += kSlotColumns, entries += 16) {
      float columns[kSlotColumns] = {};
      for (int64_t j = 0; j < min_of(kSlotColumns, end - c); ++j) columns[j] = x[c + j];
      build_slot(columns, half_inverse, entries);
    }
  }
}

}  // namespace
}  // namespace elutq
