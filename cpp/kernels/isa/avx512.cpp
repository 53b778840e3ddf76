// AVX-512 F, BW, VL and DQ: every server since Skylake.

#include "kernels/isa/avx512_floats.inl.h"
#include "kernels/isa/tables.h"

namespace elutq {
namespace {

constexpr int kMostTokens[] = {0, 4, 4, 4, 2};
constexpr int kManyTokens[] = {0, 0, 0, 0, 0};
constexpr bool kFetches = true;

constexpr int kBytes = 64;
using Bytes = __m512i;

/// Sums of bytes, modulo 2^16. `all` adds the vectors as 16-bit numbers, so it holds even + 256 * odd; `odd` adds the
/// odd bytes alone. One shift and two additions per vector, and no shuffle, of which pshufb needs every slot.
struct Sums {
  __m512i all;
  __m512i odd;
};

constexpr int kRegisterSums = 4;

/// Even bytes hold rows 0..31 and odd bytes rows 32..63, so that the sums come out in order.
constexpr int byte_of_row(int row) { return row < 32 ? 2 * row : 2 * (row - 32) + 1; }

ELUTQ_INLINE Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
[[maybe_unused]] ELUTQ_INLINE void store_bytes(Bytes v, uint8_t* to) { _mm512_storeu_si512(to, v); }
ELUTQ_INLINE Bytes load_table(const uint8_t* from) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
ELUTQ_INLINE Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
ELUTQ_INLINE Bytes high_nibbles(Bytes v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
ELUTQ_INLINE Bytes lookup(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
ELUTQ_INLINE Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
/// In this order: GCC would add what is added to each other first, and keep the sums of these in memory.
ELUTQ_INLINE void add(Sums& sums, Bytes v) {
  sums.all = _mm512_add_epi16(sums.all, v);
  sums.odd = _mm512_add_epi16(sums.odd, _mm512_srli_epi16(v, 8));
  asm("" : "+v"(sums.all), "+v"(sums.odd));
}
ELUTQ_INLINE Sums start_sums(int value) {
  return {_mm512_set1_epi16(static_cast<int16_t>(257 * value)), _mm512_set1_epi16(static_cast<int16_t>(value))};
}
constexpr float kSumUnit = 1.0f;
ELUTQ_INLINE Floats to_floats(Sums sums, int part) {
  const __m512i even = _mm512_sub_epi16(sums.all, _mm512_slli_epi16(sums.odd, 8));
  const __m512i words = part < 2 ? even : sums.odd;
  const __m256i half = part % 2 == 0 ? _mm512_castsi512_si256(words) : _mm512_extracti64x4_epi64(words, 1);
  return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(half))};
}

}  // namespace
}  // namespace elutq

#include "kernels/generic/byte_rows.inl.h"
#include "kernels/generic/kernels.inl.h"

namespace elutq {
constinit const KernelTable kAvx512Kernels = make_table("avx512");
}  // namespace elutq
